"""Features of Inception v3 (arXiv 1512.00567) for Frechet distances: its 2048 averages before the classes.

The network is paddle.vision's and its weights come from a local safetensors file with Paddle's names. They
were trained on ImageNet as the weights of the original FID were, but are not the same numbers: compare
distances with each other, not with those of other programs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
from PIL import Image
from safetensors import SafetensorError
from safetensors.paddle import load_file

from ppcoat.errors import ConfigError

SIZE = 299
# Mean and deviation of ImageNet's pictures, red, green, blue, in 0..1, as paddle.vision trains with.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
CONVERT = (
    "fetch https://paddle-hapi.bj.bcebos.com/models/inception_v3.pdparams and write it as safetensors once: "
    'python -c "import paddle; from safetensors.paddle import save_file; '
    "save_file(paddle.load('inception_v3.pdparams'), 'inception_v3.safetensors')\""
)


class Inception:
    """PIL pictures -> float32 [N, 2048]. Pictures are scaled to 299 x 299 (bicubic).

    Raises ConfigError for a file that is missing, a pickle, damaged, or not of this network.
    """

    def __init__(self, file: str | Path):
        tensors = _read(Path(file))
        self.model = paddle.vision.models.InceptionV3(num_classes=0)
        wanted = self.model.state_dict()
        for name, parameter in wanted.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = list(tensors[name].shape) if name in tensors else "nothing"
                raise ConfigError(
                    f"{file} has {found} for {name}, wanted {list(parameter.shape)}: it is not of "
                    f"paddle.vision's Inception v3; {CONVERT}"
                )
        self.model.set_state_dict({name: tensors[name].astype("float32") for name in wanted})
        self.model.eval()

    @paddle.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> np.ndarray:
        arrays = [np.asarray(p.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC)) for p in pictures]
        pixels = (np.stack(arrays).astype("float32") / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
        pixels = paddle.to_tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return self.model(pixels).flatten(1).numpy()


def _read(file: Path) -> dict[str, paddle.Tensor]:
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file} is no .safetensors, and reading a pickle can run code; {CONVERT}")
    if not file.is_file():
        raise ConfigError(f"no Inception weights at {file}; {CONVERT}")
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error
