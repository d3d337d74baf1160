"""A FLUX LoRA run: check every input, load the pipeline, encode once, put in LoRA and COAT, train, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import paddle

from ppcoat.config.load import dump_config
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, TrainingCache, build_cache, folder_identity
from ppcoat.data.data_report import data_report
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Dataset, Example, all_examples, scan_datasets
from ppcoat.errors import ConfigError
from ppcoat.host import compute_dtype, set_device
from ppcoat.lora import inject_lora
from ppcoat.models.flux_pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.nn.swap import last_blocks, swap_blocks
from ppcoat.optim import ScheduleShape, lr_scheduler
from ppcoat.train.base_model import check_swap, exchange_for_transformer, load_encoders
from ppcoat.train.coat import COATTrainer
from ppcoat.train.ema import RunningMean
from ppcoat.train.lora_files import LoRAFiles
from ppcoat.train.objective import FlowMatching
from ppcoat.train.plan import with_memory_plan
from ppcoat.train.previews import draw_previews, preview_prompts
from ppcoat.train.ranks import Ranks
from ppcoat.train.targets import chosen_modules
from ppcoat.train.trainer import StepResult, Trainer, TrainingResult
from ppcoat.train.validation import Validation, encode_validation, validation_pairs

DRY_STEPS = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, checked: pictures, validation pictures with captions, compute dtype, ranks."""

    datasets: list[Dataset]
    validation: list[tuple[Path, str]]
    dtype: str | None
    ranks: Ranks

    @property
    def examples(self) -> list[Example]:
        """Those of all datasets."""
        return all_examples(self.datasets)


def train_flux_lora(config: RunConfig) -> TrainingResult:
    """The whole run, on all ranks that paddle.distributed.launch started. Raises ConfigError for wrong inputs
    before any model is loaded or any file is written."""
    config = with_memory_plan(config)
    inputs = check_inputs(config)
    ranks = inputs.ranks
    if ranks.is_first:
        _start_run_folder(config)
    pipeline = load_encoders(config, inputs.dtype)
    # with a cache on disk the first rank encodes and the others read; without, each encodes for itself
    with ranks.first_ahead() if _caches_to_disk(config) else nullcontext():
        cache = encode_dataset(config, inputs.examples, pipeline)
    validation = None
    if ranks.is_first:
        validation = encode_validation(config, inputs.validation, pipeline, objective(config))
    exchange_for_transformer(pipeline, config, inputs.dtype, ranks)
    return build_trainer(config, pipeline, cache, validation, ranks).run()


def dry_run(config: RunConfig) -> Iterator[tuple[StepResult, float]]:
    """The first two steps of a new run, each with its seconds; writes and resumes nothing.

    Only the pictures of these steps are encoded. Raises ConfigError as train_flux_lora does.
    """
    config = with_memory_plan(config)
    inputs, train = check_inputs(config), config.train
    examples, ranks = inputs.examples, inputs.ranks
    batches = ResumableBatches(examples, train.batch_size * ranks.size, config.seed)
    needed = sorted({i for _ in range(DRY_STEPS * train.gradient_accumulation) for i in next(batches)})
    pipeline = load_encoders(config, inputs.dtype)
    in_memory = tuple(data.model_copy(update={"cache_to_disk": False}) for data in config.datasets)
    config = config.model_copy(update={"datasets": in_memory})
    cache = encode_dataset(config, [examples[i] for i in needed], pipeline)
    latents = dict(zip(needed, cache.latents, strict=True))
    cache = replace(cache, examples=examples, latents=[latents.get(i) for i in range(len(examples))])
    exchange_for_transformer(pipeline, config, inputs.dtype, ranks, keep_copy=False)
    trainer = build_trainer(config, pipeline, cache, ranks=ranks)
    for _ in range(DRY_STEPS):
        began = time.perf_counter()
        yield trainer.train_step(), time.perf_counter() - began
    ranks.close()


def check_inputs(config: RunConfig) -> Inputs:
    """Find and check everything that a run reads, print what it will train on, set the device and meet the
    other ranks. Raises ConfigError for a mistake in any of it."""
    datasets = scan_datasets(config)
    validation = validation_pairs(config)
    check_folder(config.model.name_or_path)
    check_swap(config)
    set_device(config.device)
    dtype = compute_dtype(config.model.dtype)
    ranks = Ranks.current(config.device)
    if ranks.is_first:
        print(data_report(datasets))
    return Inputs(datasets, validation, dtype, ranks)


def _start_run_folder(config: RunConfig) -> None:
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output folder {config.run_dir}: cannot be written to ({error.strerror}); choose another "
            "output_dir or make it writable"
        ) from None


def _caches_to_disk(config: RunConfig) -> bool:
    return any(data.cache_to_disk for data in config.datasets)


def encode_dataset(config: RunConfig, examples: Sequence[Example], pipeline: FluxPipeline) -> TrainingCache:
    """VAE latents of the pictures, text embeddings of their captions and of the preview prompts: each
    once, or from config.cache_folder if a dataset has cache_to_disk."""
    store, vae, text = None, "", ""
    if _caches_to_disk(config):
        model, dtype = Path(config.model.name_or_path), compute_dtype(config.model.dtype)
        store = EmbeddingStore(config.cache_folder)
        vae = f"{folder_identity(model / 'vae')} {dtype}"
        folders = (model / name for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        text = f"{folder_identity(*folders)} {dtype} {config.train.max_sequence_length}"

    def encode_text(captions: list[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
        return pipeline.encode_prompt(captions, max_sequence_length=config.train.max_sequence_length)[:2]

    return build_cache(
        examples,
        Encoders(pipeline.encode_image, encode_text, vae, text),
        extra_captions=preview_prompts(config),
        reg_weight=config.reg_weight,
        store=store,
    )


def objective(config: RunConfig) -> FlowMatching:
    """What the steps of this run minimise."""
    return FlowMatching(config.train.timestep_type, config.train.cfg_scale, config.train.loss_type)


def build_trainer(
    config: RunConfig,
    pipeline: FluxPipeline,
    cache: TrainingCache,
    validation: Validation | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """Put LoRA and COAT into the transformer and everything a Trainer needs around it. ranks: by default,
    this process alone."""
    ranks = ranks or Ranks()
    global_batch = config.train.batch_size * ranks.size
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
    if config.model.blocks_to_swap:
        swap_blocks(list(last_blocks(transformer, config.model.blocks_to_swap).values()))
    transformer.train()
    parameters = {f"{path}.{name}": p for path, layer in modules.items()
                  for name, p in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))}  # fmt: skip
    shape = ScheduleShape(train.lr_num_cycles, train.lr_power, train.lr_step_size or 1, train.lr_gamma)
    schedule = lr_scheduler(train.lr_scheduler, train.lr, train.steps, train.lr_warmup_steps, shape)
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
        objective=objective(config),
        cache=cache,
        batches=ResumableBatches(cache.examples, global_batch, config.seed),
        optimizer=optimizer,
        schedule=schedule,
        coat=coat,
        save_weights=LoRAFiles(config, transformer).write,
        draw_previews=(lambda: draw_previews(config, pipeline, cache)) if config.sample.wanted else None,
        ema=RunningMean(parameters, train.ema.ema_decay) if train.ema.use_ema else None,
        validation=validation,
        compatible=_compatible(config, list(modules)) | {"batch_size": global_batch},
        ranks=ranks,
    )


def _compatible(config: RunConfig, modules: list[str]) -> dict:
    """What a checkpoint must share with the run that resumes from it; everything else may change."""
    network = config.network
    optimizer = {"fp8": config.uses_fp8_optimizer}
    ema = {"ema_decay": config.train.ema.ema_decay} if config.train.ema.use_ema else {}
    if config.uses_fp8_optimizer:
        optimizer |= config.coat.optimizer.model_dump()
    return {
        "model": Path(config.model.name_or_path).name,
        "network": {"linear": network.linear, "linear_alpha": network.linear_alpha, "modules": modules},
        "optimizer": optimizer,
        **ema,
        "resolution": config.data.resolution,
    }
