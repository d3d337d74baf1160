"""Settings of a run: a strict schema, config files of ours and of other programs, messages that name the
line. Others use `schema`, `load.load_config`, `newbie.load_newbie_config` and `lightning.lightning_config`.
"""
