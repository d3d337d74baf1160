"""Train a FLUX LoRA with COAT:

python train_scripts/train_flux_lora.py configs/quickstart.yaml --set train.steps=50
"""

__command__ = "train"

import sys

from ppcoat.cli.main import run

sys.exit(run(__command__))
