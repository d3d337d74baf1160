"""Draw in four steps with a FLUX-Lightning LoRA and the model in --model, a local folder:

python inference/text_to_image_generation_flux_lightning.py --path_to_lora lora.safetensors \
    --prompt "a beautiful girl" --output_dir ./
"""

__command__ = "lightning"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
