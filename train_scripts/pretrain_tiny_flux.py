"""Make the built-in tiny FLUX from nothing (about four hours on two CPU cores):

python train_scripts/pretrain_tiny_flux.py --work_dir output/pretrain --output_dir output/tiny_flux

With python -m paddle.distributed.launch --nproc_per_node 2 before the script the transformer, the longest
part, is trained by a process on each core.
"""

__command__ = "pretrain-tiny-flux"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
