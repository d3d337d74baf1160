"""Train a NewBie-image LoRA or LoKr:

python train_scripts/train_newbie_lora.py --config_file configs/newbie_lora.toml
"""

__command__ = "train-newbie"

import sys

from ppcoat.cli.main import run

sys.exit(run(__command__))
