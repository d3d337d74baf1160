"""What models are built of: ops (ops.py) and what they save for backward, Linears and their frozen weights,
attention, gradient checkpointing, block swapping. Others use any module here; start with ops.py.
"""
