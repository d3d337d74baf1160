"""What a run shows of itself while it trains: preview pictures (which ones, and drawing them) and the
validation loss.

Validation takes the same pictures, noise and noise levels every time, so that steps and runs compare. It is
kept aside from training: no dropout, no gradient, nothing drawn from the generators that training uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders
from ppcoat.data.captions import final_caption
from ppcoat.data.pairs import Reference, with_companions
from ppcoat.data.sources import load_image, scan_folder
from ppcoat.errors import ConfigError
from ppcoat.objective import Objective
from ppcoat.train.base_model import vae_on_device

NOISE_SEED = 0  # not the run's: runs of different seeds compare
DEFAULT_SIGMAS = (1.0, 0.75, 0.5, 0.25)  # as ai-toolkit's validation_config has them


def previews(config: RunConfig) -> list[PreviewConfig]:
    """Those of the section `sample`, with their final prompts."""
    return [
        preview.model_copy(update={"prompt": final_prompt(preview.prompt, config.trigger_word)})
        for preview in config.sample.previews
    ]


def preview_prompts(config: RunConfig) -> list[str]:
    """The final prompt of every preview; none where no preview is drawn."""
    return [preview.prompt for preview in previews(config)] if config.sample.wanted else []


def final_prompt(prompt: str, trigger_word: str | None) -> str:
    """[trigger] filled in; a prompt without it is drawn as it stands."""
    return final_caption(prompt, trigger_word) if "[trigger]" in prompt else prompt


def draw_previews(
    config: RunConfig, pipeline: Any, draw: Callable[[PreviewConfig], list[Image.Image]]
) -> tuple[list[Image.Image], list[str]]:
    """What `draw` makes of each preview with this pipeline, and its prompt. Draws nothing from the generator
    that training uses."""
    pictures, wanted = [], previews(config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.eval()
    try:
        with vae_on_device(pipeline):
            for preview in wanted:
                pictures += draw(preview)
    finally:
        pipeline.transformer.train()
    return pictures, [preview.prompt for preview in wanted]


@dataclass(frozen=True)
class Validation:
    """pictures: one batch of a single picture each, as TrainingCache.batch gives them. sigmas: noise levels
    in 0..1. draws: noises of a picture, each at every level. at_once: losses of one forward pass."""

    pictures: Sequence[dict[str, paddle.Tensor]]
    objective: Objective
    sigmas: Sequence[float] = DEFAULT_SIGMAS
    draws: int = 1
    at_once: int = 1

    @paddle.no_grad()
    def losses(self, transformer: paddle.nn.Layer) -> dict[str, float]:
        """{"validation_loss": mean of all, "validation_loss_sigma_0.50": mean of a noise level, ...}.

        The loss of the run's loss_type without any weights. The model is left in the mode that it had.
        """
        training = transformer.training
        transformer.eval()
        rows = [self._losses_of(transformer, number) for number in range(len(self.pictures))]
        if training:
            transformer.train()
        table = paddle.stack(rows).numpy()  # the one read from the device
        of_sigmas = table.astype(np.float64).reshape([-1, len(self.sigmas)]).mean(0)
        named = {f"validation_loss_sigma_{sigma:.2f}": float(loss)
                 for sigma, loss in zip(self.sigmas, of_sigmas, strict=True)}  # fmt: skip
        return {"validation_loss": float(of_sigmas.mean()), **named}

    def _losses_of(self, transformer: paddle.nn.Layer, number: int) -> paddle.Tensor:
        """Of one picture, float32 [draws * sigmas]."""
        batch, found = self.pictures[number], []
        # a noise serves all levels, whatever the order and the number of the pictures
        noises = [self.objective.draw(batch, np.random.default_rng([NOISE_SEED, number, *more]))[1]
                  for more in ((), *((draw,) for draw in range(1, self.draws)))]  # fmt: skip
        pairs = [(noise, sigma) for noise in noises for sigma in self.sigmas]
        for start in range(0, len(pairs), self.at_once):
            some, sigmas = zip(*pairs[start : start + self.at_once], strict=True)
            levels = self.objective.noise_levels(np.array(sigmas, dtype=np.float32))
            copies = {name: paddle.concat([each] * len(some)) if isinstance(each, paddle.Tensor) else each
                      for name, each in batch.items()}  # fmt: skip
            losses = self.objective.losses_at(transformer, copies, levels, np.concatenate(some))
            found.append(losses.of_pictures)
        return paddle.concat(found)


@dataclass(frozen=True)
class KeptPicture:
    """A picture of train.validation, its final caption, and its references."""

    path: Path
    caption: str
    references: tuple[Reference, ...] = ()


def kept_pictures(config: RunConfig) -> list[KeptPicture]:
    """Those of train.validation; before any model is loaded.

    Raises ConfigError for a picture or folder that is not there or cannot be read, and for references of
    which none is found.
    """
    wanted, kept = config.train.validation, []
    if wanted.control_path and wanted.folder_path is None:
        raise ConfigError("train.validation.control_path has references of a folder: give folder_path, too")
    if wanted.folder_path is not None:
        images = scan_folder(wanted.folder_path, aside=wanted.control_path)
        own = {"folder_path": wanted.folder_path, "control_path": wanted.control_path, "skip_bad": False}
        data = config.data.model_copy(update={**own, "mask_path": None, "alpha_mask": False})
        images, found = with_companions(images, data, "train.validation")
        kept += [
            KeptPicture(item.image_path, item.caption_raw, found[item.image_path].references if found else ())
            for item in images.items
        ]
    for item in wanted.items:
        path = Path(item.image_path)
        if not path.is_file():
            raise ConfigError(f"train.validation: there is no picture {path}; check the path")
        load_image(path, wanted.resolution, wanted.resolution)  # raises for a file that is no picture
        kept.append(KeptPicture(path, item.prompt))
    return [replace(each, caption=final_caption(each.caption, config.trigger_word)) for each in kept]


@paddle.no_grad()
def encode_validation(
    config: RunConfig, kept: Sequence[KeptPicture], encoders: Encoders, objective: Objective
) -> Validation | None:
    """Encode the pictures, cropped to squares, their captions and references; None where there are none."""
    if not kept:
        return None
    side, pictures = config.train.validation.resolution, []
    whole = not config.data.full_size_control_images
    for each in kept:
        shown = {"latents": load_image(each.path, side, side)}
        for number, reference in enumerate(each.references):
            size = reference.own_size(side) if whole else (side, side)
            shown[f"reference_{number}"] = reference.picture(size).pixels()
        text = [paddle.stack(list(rows)) for rows in encoders.text([each.caption])]
        named = dict(zip(encoders.text_names, text, strict=True))
        latents = {name: encoders.image(paddle.to_tensor(pixels[None])) for name, pixels in shown.items()}
        for name, tensor in (latents | named).items():
            made = name if name in named else "latents"
            encoders.check(tensor, made, f"{name} of the validation picture {each.path}")
        pictures.append(latents | named)
    return Validation(pictures, objective, config.train.validation.sigmas)
