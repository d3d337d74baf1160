"""Make the folder that NewBie-image training and drawing read, from the released parts:

    python train_scripts/convert_newbie_to_diffusers.py --checkpoint consolidated.00-of-01.pth \
        --gemma3 models/gemma-3-4b-it --jina models/jina-clip-v2 --vae models/FLUX.1-dev \
        --output models/newbie-diffusers --dtype bf16
"""

__command__ = "convert-newbie"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
