"""Evidence: benchmark, full size, parity, ablation, accuracy, quickstart. Commands only: nothing imports it,
the command table names its modules.
"""
