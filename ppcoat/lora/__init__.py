"""Adapters (LoRA, DoRA, LoKr, LoHa, OFT, ...) for frozen models: put in, take out, save, load, merge; files
of all programs.

The way of a file: a file or folder (files.py) -> tensors, header, PEFT's config beside it -> what each key
means and which program wrote it (keys.py), how strong it is meant (header.py) -> `LoRAFile`, a list of
`Change`s, one for each Linear's weight or bias and each norm, in diffusers' names (parse.py), whose kind
(delta.py for plain LoRA, kinds.py for the others) says W' - W at a strength -> put into a model for drawing
or merging (loading.py, adapters.py, layer.py), or written for another program (writing.py, peft.py).
"""

from .adapters import Adapters, load_lora, put_adapters
from .delta import LoRAModule, LoRASummary, relative_difference, summarize
from .dora import DoRALinear
from .files import read_lora_file
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
from .loading import LoRAInfo, info_of, inputs_of, read_fitting, tell
from .lokr import LoKrLinear, LoKrSettings
from .parse import LoRAFile
from .peft import save_comfyui, save_peft
from .writing import lora_modules, save_lora, write_lora_file

__all__ = [
    "Adapters",
    "DoRALinear",
    "LoKrLinear",
    "LoKrSettings",
    "LoRAFile",
    "LoRAInfo",
    "LoRAModule",
    "LoRASummary",
    "adapter_layers",
    "info_of",
    "inject_lokr",
    "inject_lora",
    "inputs_of",
    "load_lora",
    "lora_disabled",
    "lora_layers",
    "lora_modules",
    "lora_parameters",
    "merge_lora",
    "put_adapters",
    "read_fitting",
    "read_lora_file",
    "relative_difference",
    "remove_lora",
    "save_comfyui",
    "save_lora",
    "save_peft",
    "summarize",
    "tell",
    "write_lora_file",
]
