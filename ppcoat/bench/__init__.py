"""Evidence: benchmark, full size, parity, ablation, accuracy, quickstart, demonstrations. Commands only:
nothing imports it, the command table names its modules.
"""
