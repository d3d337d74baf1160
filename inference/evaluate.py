"""Score the tiny FLUX on captions that it was not trained on:

python inference/evaluate.py --model ppcoat/assets/tiny_flux --samples 2000
"""

import sys

from ppcoat.cli.main import run

sys.exit(run("evaluate"))
