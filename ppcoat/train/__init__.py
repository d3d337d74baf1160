"""The trainer of adapters: `run.train_lora` is a whole run of any model, `run.MODEL_SPECS` has what differs
between them; distill builds on `trainer`, `ranks`, `report` and the spec of FLUX.
"""
