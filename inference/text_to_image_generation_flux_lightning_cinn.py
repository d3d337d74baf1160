"""Draw in four steps with a FLUX-Lightning LoRA and take the time, with --inference_optimize by CINN:

python inference/text_to_image_generation_flux_lightning_cinn.py --path_to_lora lora.safetensors \
    --prompt "a beautiful girl" --output_dir ./ --inference_optimize

Add FLAGS_use_cuda_managed_memory=true to the environment if the card is too small for the model.
"""

__command__ = "lightning"

import os
import sys

# Paddle reads these once, when it is imported; what the user has set stays.
os.environ.setdefault("FLAGS_use_cinn", "1")
os.environ.setdefault("FLAGS_prim_all", "true")
os.environ.setdefault("FLAGS_prim_enable_dynamic", "true")

sys.argv[1:1] = ["--repeat", "3"]

from ppcoat.__main__ import start  # noqa: E402

sys.exit(start(__command__))
