"""Memory before anything is allocated, and settings that fit a card. Others use `settings.plan` and
`settings.with_memory_plan`, the memory models of phases.py, lightning.py and newbie.py, and what is below.

GB is 1e9 bytes; a card sold as 24 GB has 25.8 of them, and the rest is what fragments and the desktop take.
"""

import math

from ppcoat.errors import ConfigError

GB = 1e9
COMPONENTS = {  # what holds memory -> what a user calls it
    "context": "context and libraries",
    "encoders": "text encoders, VAE",
    "base": "base weights",
    "LoRA": "LoRA",
    "EMA": "its running mean",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "kept": "kept for backward",
    "heads": "heads",
    "head states": "their optimizer states",
    "head gradients": "their gradients",
    "head features": "gradients of features",
    "working": "working memory",
}


def check_budget(vram_gb: float | None) -> float | None:
    """The budget as it came; raises ConfigError unless it is a positive number or None."""
    if vram_gb is not None and not (math.isfinite(vram_gb) and vram_gb > 0):
        raise ConfigError(f"vram: came {vram_gb}, wanted the card's memory in GB, say 24")
    return vram_gb
