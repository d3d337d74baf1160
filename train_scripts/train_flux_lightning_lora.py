"""Distil FLUX to 4 steps (FLUX-Lightning). The built-in tiny FLUX, on pictures with captions beside them:

python train_scripts/train_flux_lightning_lora.py --data_path pictures --resolution 64 --guidance_scale 3

The published recipe, on 8 GPUs:

python -u -m paddle.distributed.launch --gpus "0,1,2,3,4,5,6,7" train_scripts/train_flux_lightning_lora.py \
    --data_path laion-45w --file_list_path filelist_hwge1024_pwatermarkle0.5.txt \
    --pretrained_teacher_model FLUX.1-dev --output_dir outputs/lora_flux_lightning --gradient_checkpointing \
    --use_dmd_loss --apply_reflow_loss --pre_alloc_memory 76 --resume_from_checkpoint latest
"""

__command__ = "train-flux-lightning"

import sys

from ppcoat.__main__ import start

sys.exit(start(__command__))
