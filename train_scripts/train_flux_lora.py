"""Train a FLUX LoRA with COAT:

python train_scripts/train_flux_lora.py configs/quickstart.yaml --set train.steps=50
"""

__command__ = "train"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
