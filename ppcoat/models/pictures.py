"""What drawing is for FLUX and NewBie alike: noise from seeds, and the way between pixels and the latents
that a transformer sees, through FLUX's autoencoder, which NewBie shares. FLUX's transformer sees latents as
tokens, each a patch of 2 x 2: packing them, and where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle.base.core import Generator, default_cpu_generator

from ppcoat.device import COMPUTE_DTYPES, compute_dtype, set_device
from ppcoat.errors import ConfigError, unknown_name
from ppcoat.finite import damaged_weight, is_finite
from ppcoat.models import vae_tiling
from ppcoat.models.offload import Offloading
from ppcoat.nn.base_weight import BaseWeight

TOKEN_SIDE = 16  # pixels that a token stands for, each way: the VAE's 8 times the transformers' patches of 2

# Options of diffusers' and ppdiffusers' from_pretrained: those that say how to download, or ask for what is
# done anyway, and those that ask for more.
_NEEDLESS = (
    *("cache_dir", "force_download", "resume_download", "proxies", "local_files_only", "token", "revision"),
    *(
        "from_diffusers",
        "from_hf_hub",
        "from_aistudio",
        "use_safetensors",
        "low_cpu_mem_usage",
        "disable_mmap",
    ),
    *("map_location", "trust_remote_code", "offload_state_dict"),
)
_INSTEAD = {
    **dict.fromkeys(("device_map", "max_memory", "offload_folder"), "call paddle.set_device first"),
    **dict.fromkeys(("custom_pipeline", "custom_revision", "use_onnx", "provider"), "leave it out"),
    "quantization_config": "give quantize='fp4' (or fp8, int8, nf4)",
    **dict.fromkeys(
        ("image_encoder", "feature_extractor", "safety_checker"), "FLUX.1 has none; leave it out"
    ),
}


def check_drawing(height: int, width: int, step: int, output_type: str) -> None:
    """Raise ConfigError for a size in pixels that is not a multiple of `step`, and an unknown output type."""
    if height < step or width < step or height % step or width % step:
        raise ConfigError(f"picture size {width}x{height}: width and height must be multiples of {step}")
    if output_type not in ("pil", "np", "latent"):
        raise ConfigError(f"output_type is {output_type!r}: choose pil, np or latent")


def noise_of_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> paddle.Tensor:
    """Normal noise float32 [pictures, *shape], drawn on the host: row i is of seeds[i], whatever the
    others."""
    generators = [np.random.default_rng(seed) for seed in seeds]
    return paddle.to_tensor(np.stack([g.standard_normal(shape, dtype="float32") for g in generators]))


def check_options(options: dict[str, Any], others: Sequence[str]) -> None:
    """Raises ConfigError for an option of diffusers' or ppdiffusers' `from_pretrained` that asks for what is
    not done here, and for one that neither has. None and False ask for nothing. others: those that the caller
    knows."""
    for name, value in options.items():
        if name in _INSTEAD and value not in (None, False):
            raise ConfigError(f"from_pretrained({name}=...) is not done here: {_INSTEAD[name]}")
        if name == "use_safetensors" and value is False:
            raise ConfigError(
                "from_pretrained(use_safetensors=False): only safetensors are read; leave it out"
            )
        if name not in _INSTEAD and name not in _NEEDLESS:
            raise ConfigError(unknown_name("option of from_pretrained", name, (*others, *_NEEDLESS)))


def picture_seeds(batch: int, seed: int | None = None, generator: Any = None) -> list[int]:
    """One seed for each of `batch` pictures: seed + i for picture i.

    generator: draws the seed where none is given: an int is a seed; a NumPy or Paddle generator draws one, as
    does the text that ppdiffusers' `paddle.Generator().manual_seed(7)` gives; of a list, each draws that of
    one picture. With neither, Paddle's own generator draws, which `paddle.seed` sets. Raises ConfigError for
    a negative seed, another kind of generator, and a list of another length.
    """
    if seed is None and isinstance(generator, list | tuple) and len(generator) != 1:
        if len(generator) != batch:
            raise ConfigError(
                f"generator: came {len(generator)} for {batch} pictures, wanted one or one each"
            )
        return [picture_seeds(1, None, each)[0] for each in generator]
    first = seed if seed is not None else _drawn_seed(generator)
    first = int(first) if isinstance(first, np.integer) else first
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ConfigError(f"seed: came {first!r}, wanted a whole number from 0, or None for any")
    return [first + i for i in range(batch)]


def _drawn_seed(generator: Any) -> int:
    if isinstance(generator, list | tuple):
        (generator,) = generator
    if isinstance(generator, int | np.integer):
        return generator
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**63))
    if generator is None or isinstance(generator, Generator):
        return (generator or default_cpu_generator()).random()
    states = getattr(paddle, "Generator", None)  # ppdiffusers' table of states, each under a name
    if isinstance(generator, str) and generator in getattr(states and states(), "states_", ()):
        with states().rng_state(generator):
            return int(paddle.randint(0, 2**31 - 1, [1]))
    raise ConfigError(
        f"generator: came {generator!r:.60}, wanted an int, np.random.default_rng(7), "
        "paddle.Generator().manual_seed(7), or a list of these"
    )


class LatentPictures(Offloading):
    """For a DiffusionPipeline with a `vae`: latents are shifted and scaled as its config says; and what its
    methods of diffusers' names do here."""

    @paddle.no_grad()
    def encode_image(self, pixels: paddle.Tensor) -> paddle.Tensor:
        """Pixels [B, 3, height, width] in -1..1 -> latents [B, 16, height/8, width/8].

        As the transformer sees them: shifted and scaled, the mean of the VAE's distribution. In its dtype.
        """
        latents = vae_tiling.through_encoder(self.vae, pixels.astype(self.vae.dtype)).mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @paddle.no_grad()
    def decode_latents(self, latents: paddle.Tensor) -> paddle.Tensor:
        """The way back: latents [B, 16, h, w] -> pixels [B, 3, 8h, 8w], about -1..1, not clipped,
        in the VAE's dtype."""
        config = self.vae.config
        latents = latents.astype(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return vae_tiling.through_decoder(self.vae, latents)

    def pictures(self, latents: paddle.Tensor, output_type: str):
        """Latents [B, 16, h, w] -> "pil": a list of pictures; "np": float32 [B, 8h, 8w, 3] in 0..1. Raises
        ConfigError for a picture that is not finite, which would be black; it names a damaged weight."""
        pixels = self.decode_latents(latents).astype("float32")
        if not is_finite(pixels):
            raise ConfigError(self._why_not_finite(latents))
        pixels = (pixels / 2 + 0.5).clip(0, 1).numpy().transpose(0, 2, 3, 1)
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels

    def _why_not_finite(self, latents: paddle.Tensor) -> str:
        models = {name: part for name, part in self.components.items() if isinstance(part, paddle.nn.Layer)}
        for name, model in models.items():
            if (weight := damaged_weight(model)) is not None:
                return f"the picture is not finite: {weight} of {name} holds NaN or infinity: fetch it again"
        where = "its latents are" if is_finite(latents) else "nor are its latents"
        return f"the picture is not finite ({where}): use dtype float32 or bfloat16, or a weaker LoRA"

    @property
    def device(self) -> Any:
        """Paddle's place of the first model's weights; the current device without a model."""
        parts = (part for part in self.components.values() if isinstance(part, paddle.nn.Layer))
        return next((each.place for part in parts for each in part.parameters()), paddle.get_device())

    def to(self, *where: Any, device: Any = None, dtype: Any = None) -> Any:
        """Moves the models to a device ("cpu", "gpu:1", "cuda") and casts them, in place -> the pipeline.

        where: a device, a dtype, or both. The device becomes Paddle's current one, where drawing makes its
        tensors; offloading and block swapping end. Raises ConfigError for a device that is not there, a dtype
        in which it does not compute, and to cast quantised weights.
        """
        for each in (*where, device, dtype):
            text = str(each).removeprefix("Place(").removesuffix(")").replace("cuda", "gpu")
            if each is None:
                continue
            if text.rpartition(".")[-1] in COMPUTE_DTYPES:
                dtype = compute_dtype(text)
            else:
                set_device(text)
                device = paddle.get_device()
        models = [part for part in self.components.values() if isinstance(part, paddle.nn.Layer)]
        layers = (layer for model in models for layer in model.sublayers())
        if dtype is not None and any(isinstance(layer, BaseWeight) for layer in layers):
            raise ConfigError(f"to: quantised weights are not cast to {dtype}; load the model in that dtype")
        if device is not None:
            self._end_offload()
        for model in models:
            model.to(device=device, dtype=dtype)
        return self


def pack_latents(latents: paddle.Tensor) -> paddle.Tensor:
    """[B, channels, 2 * rows, 2 * columns] -> tokens [B, rows * columns, 4 * channels], each a 2x2 patch;
    any dtype."""
    b, c, h, w = latents.shape
    patches = latents.reshape([b, c, h // 2, 2, w // 2, 2]).transpose([0, 2, 4, 1, 3, 5])
    return patches.reshape([b, (h // 2) * (w // 2), c * 4])


def unpack_latents(tokens: paddle.Tensor, rows: int, columns: int) -> paddle.Tensor:
    """The way back: [B, rows * columns, 4 * channels] -> [B, channels, 2 * rows, 2 * columns], in any
    dtype."""
    b, _, c = tokens.shape
    patches = tokens.reshape([b, rows, columns, c // 4, 2, 2]).transpose([0, 3, 1, 4, 2, 5])
    return patches.reshape([b, c // 4, 2 * rows, 2 * columns])


def latent_image_ids(rows: int, columns: int) -> paddle.Tensor:
    """Position ids of image tokens, float32 [rows * columns, 3]: (0, row, column), rows first."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return paddle.to_tensor(np.stack([np.zeros_like(row), row, column], axis=1).astype("float32"))
