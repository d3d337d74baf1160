"""ppcoat: FLUX LoRAs on PaddlePaddle with FP8 optimizer states and FP8 saved activations (COAT, arXiv
2410.19313).

It makes FLUX known to ppdiffusers where that has none, once a program imports ppdiffusers
(models/flux/registration.py). That takes seconds, so the names below are imported when they are asked for.
"""

# Nothing slow here: it comes before a command can take its signals.
from ppcoat.models.flux.registration import register_when_imported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ppcoat.coat import COATConfig, COATTrainer
    from ppcoat.errors import ConfigError
    from ppcoat.lora import load_lora, save_lora
    from ppcoat.models.flux.editing import (
        FluxFillPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
        FluxKontextPipeline,
    )
    from ppcoat.models.flux.pipeline import FluxPipeline
    from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
    from ppcoat.models.flux.transformer import FluxTransformer2DModel
    from ppcoat.nn.convert import replace_linear_with_fp8
    from ppcoat.nn.saved_tensors import fp8_saved_tensors
    from ppcoat.optim import FP8AdamW, FP8QuantizationConfig

__version__ = "0.1.0"

__all__ = [
    "COATConfig",
    "COATTrainer",
    "ConfigError",
    "FP8AdamW",
    "FP8QuantizationConfig",
    "FlowMatchEulerDiscreteScheduler",
    "FluxFillPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxKontextPipeline",
    "FluxPipeline",
    "FluxTransformer2DModel",
    "fp8_saved_tensors",
    "load_lora",
    "replace_linear_with_fp8",
    "save_lora",
]

_HOMES = {  # module -> the names that are imported from it
    "coat": ("COATConfig", "COATTrainer"),
    "errors": ("ConfigError",),
    "lora": ("load_lora", "save_lora"),
    "models.flux.editing": (
        "FluxFillPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
    ),
    "models.flux.pipeline": ("FluxPipeline",),
    "models.flux.scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "models.flux.transformer": ("FluxTransformer2DModel",),
    "nn.convert": ("replace_linear_with_fp8",),
    "nn.saved_tensors": ("fp8_saved_tensors",),
    "optim": ("FP8AdamW", "FP8QuantizationConfig"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(_imported(module), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(module: str) -> object:
    import importlib
    import warnings

    from ppcoat.errors import ignore_warnings_of_libraries, not_installed

    try:
        with warnings.catch_warnings():
            ignore_warnings_of_libraries()
            return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(not_installed(error), name=error.name) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
