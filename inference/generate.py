"""Draw with a FLUX or NewBie folder and a LoRA:

    python inference/generate.py --model ppcoat/assets/tiny_flux --prompt "a red dress with white dots" \
        --path_to_lora output/quickstart/quickstart.safetensors --output_dir output/pictures
"""

__command__ = "generate"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
