"""Add a NewBie-image LoRA or LoKr to the weights of its base model:

    python train_scripts/merge_lora.py --base_model_path models/newbie-diffusers --lora_path output/my_lora \
        --output_path output/merged_model
"""

__command__ = "merge-newbie"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
