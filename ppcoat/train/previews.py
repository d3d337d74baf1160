"""Preview pictures of a run: which ones, and drawing them in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.captions import final_caption
from ppcoat.train.base_model import vae_on_device


def previews(config: RunConfig) -> list[PreviewConfig]:
    """sample.prompts, then sample.samples, each with every setting filled in from the section `sample`."""
    sample = config.sample
    entries = [*(PreviewConfig(prompt=prompt) for prompt in sample.prompts), *sample.samples]
    shared = {name: getattr(sample, name) for name in ("width", "height", "guidance_scale", "sample_steps")}
    filled = []
    for number, entry in enumerate(entries):
        own = entry.model_dump(exclude_none=True)
        seed = sample.seed + (number if sample.walk_seed else 0)
        prompt = final_prompt(entry.prompt, config.trigger_word)
        filled.append(PreviewConfig(**(shared | {"seed": seed} | own | {"prompt": prompt})))
    return filled


def preview_prompts(config: RunConfig) -> list[str]:
    """The final prompt of every preview."""
    return [preview.prompt for preview in previews(config)]


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
    with vae_on_device(pipeline):
        for preview in wanted:
            pictures += draw(preview)
    pipeline.transformer.train()
    return pictures, [preview.prompt for preview in wanted]
