"""Memory before anything is allocated, and settings that fit a card. Others use `settings.plan` and
`settings.with_memory_plan`, and the memory models of phases.py, lightning.py and newbie.py.
"""
