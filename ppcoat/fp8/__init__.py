"""FP8 numerics: each op in plain Paddle, its Triton twin beside it, and one float64 truth (truth.py) that
checks both; backend.py chooses. Others use any module here; nothing else of ppcoat is imported but errors.
"""
