"""LoRA for frozen models: put in, take out, save, load, merge; LoRA files of other programs."""

from .delta import LoRAModule, LoRASummary, relative_difference, summarize
from .files import LoRAFile, read_lora_file
from .formats import LoRAInfo, load_lora, lora_modules, save_lora, unload_lora
from .layer import inject_lora, lora_disabled, lora_layers, lora_parameters, remove_lora
from .merge import merge_lora
from .writing import write_lora_file

__all__ = [
    "LoRAFile",
    "LoRAInfo",
    "LoRAModule",
    "LoRASummary",
    "inject_lora",
    "load_lora",
    "lora_disabled",
    "lora_layers",
    "lora_modules",
    "lora_parameters",
    "merge_lora",
    "read_lora_file",
    "relative_difference",
    "remove_lora",
    "save_lora",
    "summarize",
    "unload_lora",
    "write_lora_file",
]
