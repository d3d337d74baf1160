"""A FLUX LoRA run: check every input, load the pipeline, encode once, put in LoRA and COAT, train, save."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import paddle
from PIL import Image

from ppcoat.config.load import dump_config
from ppcoat.config.schema import NetworkConfig, RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import TrainingCache, build_cache
from ppcoat.data.captions import final_caption
from ppcoat.data.sources import Item, scan_folder
from ppcoat.errors import ConfigError
from ppcoat.host import compute_dtype, set_device
from ppcoat.lora import inject_lora, save_lora
from ppcoat.lora.layer import target_paths
from ppcoat.models.flux_pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.optim import lr_scheduler
from ppcoat.train.coat import COATTrainer
from ppcoat.train.objective import FlowMatching
from ppcoat.train.trainer import Trainer, TrainingResult

_log = logging.getLogger(__name__)


def train_flux_lora(config: RunConfig) -> TrainingResult:
    """The whole run. Raises ConfigError for wrong inputs before any model is loaded or any file is
    written."""
    data = config.data
    images = scan_folder(data.folder_path, data.caption_ext, data.default_caption, data.skip_bad)
    check_folder(config.model.name_or_path)
    set_device(config.device)
    dtype = compute_dtype(config.model.dtype)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    pipeline = FluxPipeline.from_pretrained(config.model.name_or_path, paddle_dtype=dtype)
    cache = encode_dataset(config, images.items, pipeline)
    pipeline.text_encoder = pipeline.text_encoder_2 = None  # from here on, all text comes from the cache
    return build_trainer(config, pipeline, cache).run()


def encode_dataset(config: RunConfig, items: Sequence[Item], pipeline: FluxPipeline) -> TrainingCache:
    """VAE latents of the pictures, text embeddings of their captions and of the preview prompts: each
    once."""

    def encode_text(captions: list[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
        return pipeline.encode_prompt(captions, max_sequence_length=config.train.max_sequence_length)[:2]

    return build_cache(
        items,
        pipeline.encode_image,
        encode_text,
        config.data.resolution,
        trigger_word=config.trigger_word,
        caption_dropout_rate=config.data.caption_dropout_rate,
        extra_captions=preview_prompts(config),
    )


def build_trainer(config: RunConfig, pipeline: FluxPipeline, cache: TrainingCache) -> Trainer:
    """Put LoRA and COAT into the transformer and everything a Trainer needs around it."""
    train, network, transformer = config.train, config.network, pipeline.transformer
    coat = COATTrainer(config.coat, train.gradient_checkpointing)
    if config.coat.memory.checkpoint_blocks and not train.gradient_checkpointing:
        _log.warning("coat.memory.checkpoint_blocks has no effect without train.gradient_checkpointing")
    modules = inject_lora(
        transformer,
        rank=network.linear,
        alpha=network.linear_alpha,
        dropout=network.dropout,
        targets=chosen_modules(network, transformer),
        policy=coat.policy,
        group_size=coat.linear_group_size,
        seed=config.seed,
    )
    coat.convert(transformer)
    transformer.train()
    parameters = {f"{path}.{name}": p for path, layer in modules.items()
                  for name, p in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))}  # fmt: skip
    schedule = lr_scheduler(train.lr_scheduler, train.lr, train.steps, train.lr_warmup_steps)
    optimizer = coat.create_optimizer(
        parameters.values(),
        schedule,
        train.weight_decay,
        (train.beta1, train.beta2),
        train.epsilon,
        train.max_grad_norm,
        fp8_states=config.uses_fp8_optimizer,
    )
    return Trainer(
        config=config,
        model=transformer,
        parameters=parameters,
        objective=FlowMatching(train.timestep_type, train.cfg_scale),
        cache=cache,
        batches=ResumableBatches(len(cache.latents), train.batch_size, config.seed, config.data.num_repeats),
        optimizer=optimizer,
        schedule=schedule,
        coat=coat,
        save_weights=lambda step: _save_weights(config, transformer, step),
        draw_previews=(lambda: draw_previews(config, pipeline, cache)) if config.sample.prompts else None,
        compatible=_compatible(config, list(modules)),
    )


def chosen_modules(network: NetworkConfig, transformer: paddle.nn.Layer) -> list[str]:
    """Paths of the Linears that get a LoRA. Raises ConfigError if the filters leave none."""
    all_paths = target_paths(transformer, network.targets)
    paths = all_paths
    if network.only_if_contains:
        paths = [p for p in paths if any(part in f"transformer.{p}" for part in network.only_if_contains)]
    if network.ignore_if_contains:
        paths = [
            p for p in paths if not any(part in f"transformer.{p}" for part in network.ignore_if_contains)
        ]
    if not paths:
        raise ConfigError(
            f"network: only_if_contains {network.only_if_contains} and ignore_if_contains "
            f"{network.ignore_if_contains} leave no module; "
            f"names look like transformer.{all_paths[0]}"
        )
    return paths


def preview_prompts(config: RunConfig) -> list[str]:
    """sample.prompts with [trigger] filled in; a prompt without it is drawn as it stands."""
    prompts = config.sample.prompts
    return [final_caption(p, config.trigger_word) if "[trigger]" in p else p for p in prompts]


def draw_previews(
    config: RunConfig, pipeline: FluxPipeline, cache: TrainingCache
) -> tuple[list[Image.Image], list[str]]:
    """One picture per preview prompt, from cached embeddings."""
    sample, prompts, pictures = config.sample, preview_prompts(config), []
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.eval()
    for i, prompt in enumerate(prompts):
        embeds, pooled = cache.text([prompt])
        pictures += pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            height=sample.height,
            width=sample.width,
            num_inference_steps=sample.sample_steps,
            guidance_scale=sample.guidance_scale,
            seed=sample.seed + (i if sample.walk_seed else 0),
        ).images
    pipeline.transformer.train()
    return pictures, prompts


def _save_weights(config: RunConfig, transformer: paddle.nn.Layer, step: int) -> Path:
    file = config.run_dir / f"{config.name}.safetensors"
    save_lora(
        file,
        transformer,
        trigger_word=config.trigger_word or "",
        step=step,
        base_model=Path(config.model.name_or_path).name,
        dtype=config.save.dtype,
    )
    return file


def _compatible(config: RunConfig, modules: list[str]) -> dict:
    """What a checkpoint must share with the run that resumes from it; everything else may change."""
    network = config.network
    optimizer = {"fp8": config.uses_fp8_optimizer}
    if config.uses_fp8_optimizer:
        optimizer |= config.coat.optimizer.model_dump()
    return {
        "model": Path(config.model.name_or_path).name,
        "network": {"linear": network.linear, "linear_alpha": network.linear_alpha, "modules": modules},
        "optimizer": optimizer,
        "batch_size": config.train.batch_size,
        "resolution": config.data.resolution,
    }
