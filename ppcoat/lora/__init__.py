"""LoRA and LoKr for frozen models: put in, take out, save, load, merge; files of other programs."""

from .delta import LoRAModule, LoRASummary, relative_difference, summarize
from .files import LoRAFile, read_lora_file
from .layer import (
    adapter_layers,
    inject_lokr,
    inject_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
)
from .loading import LoRAInfo, load_adapter, load_lora, read_adapter
from .lokr import LoKrLinear, LoKrSettings
from .peft import save_comfyui, save_peft
from .writing import lora_modules, save_lora, write_lora_file

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
    "write_lora_file",
]
