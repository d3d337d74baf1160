"""LoRA and LoKr for frozen models: put in, take out, save, load, merge; files of other programs."""

from .adapters import load_adapter, read_adapter
from .delta import LoRAModule, LoRASummary, relative_difference, summarize
from .files import LoRAFile, read_lora_file
from .formats import LoRAInfo, load_lora, lora_modules, save_lora, unload_lora
from .layer import (
    adapter_layers,
    inject_lokr,
    inject_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    remove_lora,
)
from .lokr import LoKrLinear, LoKrSettings
from .merge import merge_lora
from .peft import save_comfyui, save_peft
from .writing import write_lora_file

__all__ = [
    "LoKrLinear",
    "LoKrSettings",
    "LoRAFile",
    "LoRAInfo",
    "LoRAModule",
    "LoRASummary",
    "adapter_layers",
    "inject_lokr",
    "inject_lora",
    "load_adapter",
    "load_lora",
    "lora_disabled",
    "lora_layers",
    "lora_modules",
    "lora_parameters",
    "merge_lora",
    "read_adapter",
    "read_lora_file",
    "relative_difference",
    "remove_lora",
    "save_comfyui",
    "save_lora",
    "save_peft",
    "summarize",
    "unload_lora",
    "write_lora_file",
]
