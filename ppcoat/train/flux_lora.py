"""What a LoRA run needs to know of FLUX.1; the run itself is in lora_run.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache, folder_identity
from ppcoat.data.examples import Example
from ppcoat.errors import ConfigError
from ppcoat.host import compute_dtype
from ppcoat.models.flux_pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.nn.swap import last_blocks
from ppcoat.train import lora_run
from ppcoat.train.base_model import check_swap, exchange_for_transformer, load_encoders
from ppcoat.train.lora_files import LoRAFiles
from ppcoat.train.objective import FlowMatching
from ppcoat.train.plan import with_memory_plan
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights, StepResult, Trainer, TrainingResult
from ppcoat.train.validation import Validation


def train_flux_lora(config: RunConfig) -> TrainingResult:
    """The whole run, on all ranks that paddle.distributed.launch started. Raises ConfigError for wrong inputs
    before any model is loaded or any file is written."""
    return lora_run.train_lora(FluxFamily(), config)


def dry_run(config: RunConfig) -> Iterator[tuple[StepResult, float]]:
    """See lora_run.dry_run."""
    return lora_run.dry_run(FluxFamily(), config)


def encode_dataset(config: RunConfig, examples: Sequence[Example], pipeline: FluxPipeline) -> TrainingCache:
    """See lora_run.encode_dataset."""
    return lora_run.encode_dataset(FluxFamily(), config, examples, pipeline)


def build_trainer(
    config: RunConfig,
    pipeline: FluxPipeline,
    cache: TrainingCache,
    validation: Validation | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """See lora_run.build_trainer."""
    return lora_run.build_trainer(FluxFamily(), config, pipeline, cache, validation, ranks)


class FluxFamily:
    """FLUX.1-dev and schnell; see lora_run.Family."""

    preview_negatives = ()
    with_memory_plan = staticmethod(with_memory_plan)
    load_encoders = staticmethod(load_encoders)
    exchange_for_transformer = staticmethod(exchange_for_transformer)
    last_blocks = staticmethod(last_blocks)

    def check(self, config: RunConfig) -> None:
        """Folder, kind of model and number of swapped blocks."""
        if config.model.family != "flux":
            raise ConfigError(
                f"model.family is {config.model.family}: train it with train_scripts/train_newbie_lora.py"
            )
        check_folder(config.model.name_or_path, "model.name_or_path")
        check_swap(config)

    def check_captions(self, config: RunConfig, captions: Sequence[str]) -> None:
        """Nothing: T5 and CLIP cut, and no length stops the transformer."""

    def encoders(self, config: RunConfig, pipeline: FluxPipeline) -> Encoders:
        """The VAE; T5 and CLIP."""
        vae, text = "", ""
        if any(data.cache_to_disk for data in config.datasets):  # reads files, so only where it is of use
            model, dtype = Path(config.model.name_or_path), compute_dtype(config.model.dtype)
            vae = f"{folder_identity(model / 'vae')} {dtype}"
            names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            identity = folder_identity(*(model / name for name in names))
            text = f"{identity} {dtype} {config.train.max_sequence_length}"

        def encode_text(captions: list[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
            return pipeline.encode_prompt(captions, max_sequence_length=config.train.max_sequence_length)[:2]

        return Encoders(pipeline.encode_image, encode_text, vae, text)

    def objective(self, config: RunConfig) -> FlowMatching:
        """Flow matching with the run's noise levels and loss."""
        return FlowMatching(config.train.timestep_type, config.train.cfg_scale, config.train.loss_type)

    def set_up_checkpointing(self, config: RunConfig, transformer: paddle.nn.Layer) -> None:
        """Nothing: COATTrainer.convert has done it."""

    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """LoRA files in the formats of save.format."""
        return LoRAFiles(config, transformer).write

    def draw(self, pipeline: FluxPipeline, preview: PreviewConfig, cache: TrainingCache) -> list[Image.Image]:
        """One preview."""
        embeds, pooled = cache.text([preview.prompt])
        return pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=preview.height,
            width=preview.width,
            num_inference_steps=preview.sample_steps,
            guidance_scale=preview.guidance_scale,
            seed=preview.seed,
        ).images
