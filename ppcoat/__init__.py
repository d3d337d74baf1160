"""ppcoat: FLUX LoRAs on PaddlePaddle with FP8 optimizer states and FP8 saved activations (COAT, arXiv
2410.19313).

Importing it makes FLUX known to ppdiffusers where that has none (models/flux/registration.py); nothing else
happens.
"""

import warnings

with warnings.catch_warnings():  # notes of Paddle's own imports that mean nothing to a user
    warnings.filterwarnings("ignore", message="No ccache|Setuptools is replacing|pkg_resources is deprecated")
    try:
        import ppdiffusers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.msg}: ppcoat needs paddlepaddle or paddlepaddle-gpu 3.3 and what requirements.txt names "
            "(README.md, Install)", name=error.name,
        ) from None  # fmt: skip

from ppcoat.coat import COATConfig, COATTrainer
from ppcoat.errors import ConfigError
from ppcoat.lora import load_lora, save_lora
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.registration import register
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.saved_tensors import fp8_saved_tensors
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig

__all__ = [
    "COATConfig",
    "COATTrainer",
    "ConfigError",
    "FP8AdamW",
    "FP8QuantizationConfig",
    "FlowMatchEulerDiscreteScheduler",
    "FluxPipeline",
    "FluxTransformer2DModel",
    "fp8_saved_tensors",
    "load_lora",
    "replace_linear_with_fp8",
    "save_lora",
]

register()
