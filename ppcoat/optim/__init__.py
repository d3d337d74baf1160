"""Optimizers over one flat buffer with states in FP8 or float32, and learning rate schedules.

For others: the optimizers (`FP8AdamW`, `Prodigy`, `ScheduleFreeAdamW`, `Lion`, `Adafactor`) and their
settings, `FP8QuantizationConfig` and `FlatSettings`; `lr_scheduler` with `ScheduleShape`.
"""

from .adafactor import Adafactor, AdafactorSettings
from .adamw import FP8AdamW, Lion, update_bytes
from .flat_optimizer import FlatOptimizer
from .prodigy import Prodigy, ProdigySettings
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSettings
from .schedules import ScheduleShape, lr_scheduler
from .settings import FlatSettings, FP8QuantizationConfig

__all__ = [
    "Adafactor", "AdafactorSettings", "FP8AdamW", "FP8QuantizationConfig", "FlatOptimizer", "FlatSettings",
    "Lion", "Prodigy", "ProdigySettings", "ScheduleFreeAdamW", "ScheduleFreeSettings", "ScheduleShape",
    "lr_scheduler", "update_bytes",
]  # fmt: skip
