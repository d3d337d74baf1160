"""Train a NewBie-image LoRA or LoKr:

python train_scripts/train_newbie_lora.py --config_file configs/newbie_lora.toml
"""

__command__ = "train-newbie"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
