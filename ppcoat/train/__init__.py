"""The trainer of adapters: `flux.train_flux_lora` and `newbie.train_newbie_lora` are whole runs,
`coat.COATTrainer` is COAT for a loop of one's own; distill builds on `trainer`, `objective`, `ranks` and
`report`.
"""
