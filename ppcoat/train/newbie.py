"""What an adapter run needs to know of NewBie-image, and the files that it writes; the run itself is in
run.py.

The files are the folder of the run at the end, and <run>_step_<step> at saved steps:

    <output_dir>/<name>/adapter_model.safetensors, adapter_config.json     for the original's tools and PEFT
    <output_dir>/<name>/<name>.safetensors                                 for ComfyUI

The original trainer's faults that are not repeated here are listed in the tests (tests/train/test_newbie.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paddle
from PIL import Image

from ppcoat.atomic import remove_dead_drafts
from ppcoat.coat import warn_of_rank
from ppcoat.config.schema import ModelConfig, NetworkConfig, PreviewConfig, RunConfig, TrainConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.device import compute_dtype
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRASummary, save_comfyui, save_peft
from ppcoat.lora.files import CONFIG, WEIGHTS
from ppcoat.models.newbie.files import (
    NEWBIE_COMPONENTS,
    check_newbie_folder,
    load_nextdit,
    load_quantized_nextdit,
    unfilled_nextdit,
)
from ppcoat.models.newbie.jina_clip import load_gemma3_tokenizer
from ppcoat.models.newbie.pipeline import PROMPT_PREFIX, NewbiePipeline, warn_of_cut, with_prefix
from ppcoat.models.tensor_files import Component
from ppcoat.nn.swap import last_blocks
from ppcoat.objective import NewbieFlowMatching
from ppcoat.plan.newbie import NewbieMemoryModel
from ppcoat.train.base_model import load_encoders
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.start import fields_of_start
from ppcoat.train.trainer import SaveWeights

TEXT_NAMES = ("cap_feats", "cap_mask", "clip_text_pooled")
_MAKERS = {"latents": "vae", "cap_feats": "text_encoder", "clip_text_pooled": "clip_model"}
# Settings of FLUX's objective and blocks: (section, its model, keys).
_OF_FLUX = (
    ("train", TrainConfig, ("timestep_type", "cfg_scale", "loss_type")),
    ("network", NetworkConfig, ("double_blocks", "single_blocks")),
    ("model", ModelConfig, ("text_encoders", "vae", "tokenizers")),
)


class NewbieSpec(ModelSpec):
    """NewBie-image."""

    config_format = "toml"
    memory_model = NewbieMemoryModel
    text_encoders = ("text_encoder", "clip_model")
    load_plain, load_quantized = staticmethod(load_nextdit), staticmethod(load_quantized_nextdit)
    preview_negatives = ("",)

    def check(self, config: RunConfig) -> None:
        """Settings that it has, folder, targets and number of swapped blocks."""
        for name, section, keys in _OF_FLUX:
            for key in keys:
                if getattr(getattr(config, name), key) != section.model_fields[key].default:
                    raise ConfigError(f"{name}.{key} is FLUX's: leave it out for model.family newbie")
        check_newbie_folder(config.model.name_or_path, "base_model_path (model.name_or_path)")
        model = self.unfilled(config)
        warn_of_rank(config.network, model)
        last_blocks(model, config.model.blocks_to_swap)

    def unfilled(self, config: RunConfig) -> paddle.nn.Layer:
        """That of the folder."""
        return unfilled_nextdit(Path(config.model.name_or_path) / "transformer")

    def check_captions(self, config: RunConfig, captions: Sequence[str]) -> None:
        """How many captions Gemma will cut; the rest must fit into the transformer's positions."""
        model = Path(config.model.name_or_path)
        tokenizer, limit = load_gemma3_tokenizer(model / "text_encoder"), config.train.max_sequence_length
        tokens = tokenizer(with_prefix(captions, _prefix(config)), limit)
        warn_of_cut(tokens, captions, limit or tokenizer.max_tokens)
        positions = self.unfilled(config).config.axes_lens[0]
        longest = int(tokens.mask.sum(-1).argmax())
        if tokens.mask[longest].sum() >= positions:
            raise ConfigError(
                f"a caption of {tokens.mask[longest].sum()} tokens is too long for the transformer, which "
                f"has {positions} positions: lower train.max_sequence_length to {positions - 1}, or "
                f"shorten {captions[longest][:60]!r}"
            )

    def parts(self, config: RunConfig) -> dict[str, Component]:
        """The folder's; tokenizers lie in those of the text encoders."""
        return {name: Path(config.model.name_or_path) / name for name in NEWBIE_COMPONENTS}

    def load_encoders(self, config: RunConfig, dtype: str | None) -> NewbiePipeline:
        """Gemma3, Jina CLIP and the VAE."""
        streamed = "text_encoder" if config.model.stream_encoders else None
        return load_encoders(NewbiePipeline, config.model.name_or_path, dtype, streamed)

    def encoders(self, config: RunConfig, pipeline: NewbiePipeline) -> Encoders:
        """The VAE (float32); Gemma3 with the prefix and Jina CLIP without. Rows have no padding."""
        prefix, tokens = _prefix(config), config.train.max_sequence_length
        vae, text = self.identities(config)
        text = f"{text} {compute_dtype(config.model.dtype)} {tokens} {prefix!r}"

        def encode_text(captions: list[str]) -> tuple[paddle.Tensor | list[paddle.Tensor], ...]:
            found = pipeline.encode_prompt(captions, prefix, tokens, warn=False)
            lengths = found["cap_mask"].sum(-1).tolist()
            features, masks = ([rows[:length] for rows, length in zip(found[name], lengths, strict=True)]
                               for name in TEXT_NAMES[:2])  # fmt: skip
            return features, masks, found["clip_text_pooled"]

        def maker(name: str) -> tuple[Path, paddle.nn.Layer]:
            part = _MAKERS[name]
            return Path(config.model.name_or_path) / part, getattr(pipeline, part)

        return Encoders(pipeline.encode_image, encode_text, vae, text, TEXT_NAMES, maker=maker)

    def objective(self, config: RunConfig) -> NewbieFlowMatching:
        """Flow matching with logit-normal times, shifted by the size of the batch's pictures."""
        return NewbieFlowMatching()

    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """The adapter directory of the original, and a file for ComfyUI in it."""
        return NewbieFiles(config, transformer).write

    def draw(
        self, config: RunConfig, pipeline: NewbiePipeline, preview: PreviewConfig, cache: TrainingCache
    ) -> list[Image.Image]:
        """One preview, guided away from the empty prompt."""
        text = cache.text([preview.prompt, *self.preview_negatives])
        return pipeline(
            conditions=dict(zip(TEXT_NAMES, text, strict=True)),
            height=preview.height,
            width=preview.width,
            num_inference_steps=preview.sample_steps,
            guidance_scale=preview.guidance_scale,
            seed=preview.seed,
        ).images


def _prefix(config: RunConfig) -> str:
    return PROMPT_PREFIX if config.model.prompt_prefix is None else config.model.prompt_prefix


@dataclass(frozen=True)
class NewbieFiles:
    """Writes the adapter of `transformer`, in save.dtype."""

    config: RunConfig
    transformer: paddle.nn.Layer

    def write(self, step: int, final: bool) -> list[tuple[Path, LoRASummary]]:
        """Both forms and what they hold. Folders of steps beyond the newest save.max_step_saves_to_keep are
        removed afterwards, and drafts of killed processes; the files of the end are always kept."""
        config, dtype = self.config, self.config.save.dtype
        folder = config.run_dir if final else self._folder_of(step)
        targets, dropout = config.network.targets or (), config.network.dropout
        extra, alone = fields_of_start(config), folder / f"{config.name}.safetensors"
        summary = save_peft(folder, self.transformer, targets, dropout, dtype, extra)
        written = [(folder / WEIGHTS, summary), (alone, save_comfyui(alone, self.transformer, dtype, extra))]
        self._remove_old(step)
        return written

    def _folder_of(self, step: int) -> Path:
        return self.config.run_dir.with_name(f"{self.config.name}_step_{step}")

    def _remove_old(self, step: int) -> None:
        """Only files that `write` makes; later steps belong to a history that was given up, and stay."""
        name, files = re.escape(self.config.name), (WEIGHTS, CONFIG, f"{self.config.name}.safetensors")
        found = [re.fullmatch(rf"{name}_step_([0-9]+)", path.name)
                 for path in self.config.run_dir.parent.iterdir() if path.is_dir()]  # fmt: skip
        steps = sorted(int(match[1]) for match in found if match)
        for folder in (self.config.run_dir, *map(self._folder_of, steps)):
            remove_dead_drafts(folder)
        history = [number for number in steps if number <= step]
        for old in history[: -self.config.save.max_step_saves_to_keep]:
            folder = self._folder_of(old)
            for file in files:
                (folder / file).unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
