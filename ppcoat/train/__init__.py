"""The trainer of adapters: `run.train_lora` is a whole run of any model,
`coat.COATTrainer` is COAT for a loop of one's own; distill builds on `trainer`, `objective`, `ranks` and
`report`.
"""
