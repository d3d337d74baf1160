"""Score folders of pictures: Frechet distance to a reference folder, CLIP score with their prompts:

    python inference/evaluate.py --pictures Student=output/student --references output/teacher \
        --features inception --inception inception_v3.safetensors --clip models/clip-vit-base-patch16

or score the tiny FLUX on captions that it was not trained on:

    python inference/evaluate.py --model ppcoat/assets/tiny_flux --samples 2000
"""

__command__ = "evaluate"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
