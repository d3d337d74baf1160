"""What a LoRA run needs to know of FLUX.1, and the LoRA files that it writes; the run itself is in run.py.

The files of a run are <name>.safetensors at the end and <name>_000000250.safetensors at saved steps. A format
other than diffusers' has its name at the end: <name>_kohya.safetensors. Every file is written whole or not at
all and read back (ppcoat/lora/writing.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paddle
from PIL import Image

from ppcoat.coat import warn_of_rank
from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.data.examples import Example
from ppcoat.device import compute_dtype
from ppcoat.lora import LoRASummary, save_lora
from ppcoat.lora.writing import FORMATS
from ppcoat.models.flux.files import FLUX_COMPONENTS, FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import check_folder, check_without_control, load_transformer, unfilled
from ppcoat.models.quantized_base import load_quantized_transformer
from ppcoat.models.tensor_files import Component
from ppcoat.nn.swap import last_blocks
from ppcoat.objective import FlowMatching
from ppcoat.plan.phases import MemoryModel
from ppcoat.train import editing
from ppcoat.train.base_model import load_encoders
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.start import fields_of_start
from ppcoat.train.trainer import SaveWeights

_MAKERS = {"latents": "vae", "prompt_embeds": "text_encoder_2", "pooled": "text_encoder"}


class FluxSpec(ModelSpec):
    """FLUX.1-dev, schnell, Kontext and Fill. Captions of any length are taken: T5 and CLIP cut them."""

    config_format = "yaml"
    memory_model = MemoryModel
    text_encoders = ("text_encoder", "text_encoder_2")
    load_plain, load_quantized = staticmethod(load_transformer), staticmethod(load_quantized_transformer)

    def check(self, config: RunConfig) -> None:
        """Folder, number of swapped blocks, and what does not go with a Fill model."""
        files = _files(config)
        check_folder(files, control=True)
        transformer = self.unfilled(config)
        check_without_control(transformer, files, fill=True)
        warn_of_rank(config.network, transformer)
        if config.model.blocks_to_swap:
            last_blocks(transformer, config.model.blocks_to_swap)
        fill = editing.is_fill(files)
        if fill:
            editing.check_fill(config)
        editing.check_previews(config, fill)

    def check_examples(self, config: RunConfig, examples: Sequence[Example]) -> None:
        """Masks of a Fill model."""
        if editing.is_fill(_files(config)):
            editing.check_masks(examples)

    def unfilled(self, config: RunConfig) -> FluxTransformer2DModel:
        """That of the folder or file, whose headers are checked."""
        return unfilled(FluxTransformer2DModel, _files(config)["transformer"])[0]

    def parts(self, config: RunConfig) -> dict[str, Component]:
        """All but the scheduler's."""
        files = _files(config)
        return {name: files[name] for name in FLUX_COMPONENTS if name != "scheduler"}

    def load_encoders(self, config: RunConfig, dtype: str | None) -> FluxPipeline:
        """T5, CLIP and the VAE."""
        files = _files(config)
        streamed = "text_encoder_2" if config.model.stream_encoders else None
        return load_encoders(editing.drawing_class(config, files), files, dtype, streamed)

    def encoders(self, config: RunConfig, pipeline: FluxPipeline) -> Encoders:
        """The VAE; T5 and CLIP."""
        tokens, dtype = config.train.max_sequence_length, compute_dtype(config.model.dtype)
        vae, text = self.identities(config)

        def encode_text(captions: list[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
            return pipeline.encode_prompt(captions, max_sequence_length=tokens)[:2]

        masked = editing.masked_encoder(pipeline) if editing.is_fill(_files(config)) else None

        def maker(name: str) -> tuple[Component, paddle.nn.Layer]:
            part = _MAKERS[name]
            return _files(config)[part], getattr(pipeline, part)

        identities = f"{vae} {dtype}", f"{text} {dtype} {tokens}"
        return Encoders(pipeline.encode_image, encode_text, *identities, masked=masked, maker=maker)

    def objective(self, config: RunConfig) -> FlowMatching:
        """Flow matching with the run's noise levels and loss."""
        return FlowMatching(config.train.timestep_type, config.train.cfg_scale, config.train.loss_type)

    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """LoRA files in the formats of save.format."""
        return LoRAFiles(config, transformer).write

    def draw(
        self, config: RunConfig, pipeline: FluxPipeline, preview: PreviewConfig, cache: TrainingCache
    ) -> list[Image.Image]:
        """One preview, after its references or in its picture."""
        embeds, pooled = cache.text([preview.prompt])
        return pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=preview.height,
            width=preview.width,
            num_inference_steps=preview.sample_steps,
            guidance_scale=preview.guidance_scale,
            seed=preview.seed,
            **editing.preview_pictures(config, preview),
        ).images


def _files(config: RunConfig) -> FluxFiles:
    """Where the components of the run's model lie."""
    return FluxFiles.found(config.model.name_or_path, "model.name_or_path", **config.model.beside)


@dataclass(frozen=True)
class LoRAFiles:
    """Writes the LoRA of `transformer` in every format of save.format, in save.dtype."""

    config: RunConfig
    transformer: paddle.nn.Layer

    def write(self, step: int, final: bool) -> list[tuple[Path, LoRASummary]]:
        """One file per format and what it holds. Files of steps beyond the newest
        save.max_step_saves_to_keep are removed afterwards; those of the end are always kept."""
        config = self.config
        stem = config.name if final else f"{config.name}_{step:09d}"
        written = []
        for file_format in config.save.format:
            path = config.run_dir / f"{stem}{_ending(file_format)}"
            summary = save_lora(
                path,
                self.transformer,
                trigger_word=config.trigger_word or "",
                step=step,
                base_model=Path(config.model.name_or_path).name,
                dtype=config.save.dtype,
                file_format=file_format,
                extra=fields_of_start(config) | editing.fields_of_references(config, _files(config)),
            )
            written.append((path, summary))
        self._remove_old(step)
        return written

    def _remove_old(self, step: int) -> None:
        """Only names that `write` gives; later steps belong to a history that was given up, and stay."""
        stem, endings = re.escape(self.config.name), "|".join(re.escape(_ending(each)) for each in FORMATS)
        files = [(number, path) for number, path in self._named(rf"{stem}_([0-9]{{9}})(?:{endings})")
                 if number <= step]  # fmt: skip
        kept = sorted({number for number, _ in files})[-self.config.save.max_step_saves_to_keep :]
        for number, path in files:
            if number not in kept:
                path.unlink()

    def _named(self, pattern: str) -> list[tuple[int, Path]]:
        """Files of the run whose name is `pattern`, each with the number in it."""
        found = [(re.fullmatch(pattern, path.name), path) for path in self.config.run_dir.iterdir()]
        return [(int(match[1]), path) for match, path in found if match]


def _ending(file_format: str) -> str:
    """Of the name of a LoRA file: that of diffusers' format is the plain one."""
    return ".safetensors" if file_format == "diffusers" else f"_{file_format}.safetensors"
