"""LoRA for frozen models: put in, take out, save, load."""

from .formats import LoRAInfo, load_lora, save_lora, unload_lora
from .layer import inject_lora, lora_disabled, lora_layers, lora_parameters, remove_lora

__all__ = [
    "LoRAInfo",
    "inject_lora",
    "load_lora",
    "lora_disabled",
    "lora_layers",
    "lora_parameters",
    "remove_lora",
    "save_lora",
    "unload_lora",
]
