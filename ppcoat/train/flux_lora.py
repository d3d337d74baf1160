"""A FLUX LoRA run: check every input, load the pipeline, encode once, put in LoRA and COAT, train, save."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import paddle

from ppcoat.config.load import dump_config
from ppcoat.config.schema import NetworkConfig, RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, TrainingCache, build_cache, folder_identity
from ppcoat.data.data_report import data_report
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example, all_examples, scan_datasets
from ppcoat.errors import ConfigError
from ppcoat.host import compute_dtype, set_device
from ppcoat.lora import inject_lora
from ppcoat.lora.layer import target_paths
from ppcoat.models.flux_pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.optim import ScheduleShape, lr_scheduler
from ppcoat.train.coat import COATTrainer
from ppcoat.train.ema import RunningMean
from ppcoat.train.lora_files import LoRAFiles
from ppcoat.train.objective import FlowMatching
from ppcoat.train.previews import draw_previews, preview_prompts, previews
from ppcoat.train.trainer import Trainer, TrainingResult
from ppcoat.train.validation import Validation, encode_validation, validation_pairs

_log = logging.getLogger(__name__)


def train_flux_lora(config: RunConfig) -> TrainingResult:
    """The whole run. Raises ConfigError for wrong inputs before any model is loaded or any file is
    written."""
    datasets = scan_datasets(config)
    print(data_report(datasets))
    validation_set = validation_pairs(config)
    check_folder(config.model.name_or_path)
    set_device(config.device)
    dtype = compute_dtype(config.model.dtype)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    pipeline = FluxPipeline.from_pretrained(config.model.name_or_path, paddle_dtype=dtype)
    cache = encode_dataset(config, all_examples(datasets), pipeline)
    validation = encode_validation(config, validation_set, pipeline, objective(config))
    pipeline.text_encoder = pipeline.text_encoder_2 = None  # from here on, all text comes from the cache
    return build_trainer(config, pipeline, cache, validation).run()


def encode_dataset(config: RunConfig, examples: Sequence[Example], pipeline: FluxPipeline) -> TrainingCache:
    """VAE latents of the pictures, text embeddings of their captions and of the preview prompts: each
    once, or from config.cache_folder if a dataset has cache_to_disk."""
    store, vae, text = None, "", ""
    if any(data.cache_to_disk for data in config.datasets):
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
    config: RunConfig, pipeline: FluxPipeline, cache: TrainingCache, validation: Validation | None = None
) -> Trainer:
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
        batches=ResumableBatches(cache.examples, train.batch_size, config.seed),
        optimizer=optimizer,
        schedule=schedule,
        coat=coat,
        save_weights=LoRAFiles(config, transformer).write,
        draw_previews=(lambda: draw_previews(config, pipeline, cache)) if previews(config) else None,
        ema=RunningMean(parameters, train.ema.ema_decay) if train.ema.use_ema else None,
        validation=validation,
        compatible=_compatible(config, list(modules)),
    )


def chosen_modules(network: NetworkConfig, transformer: paddle.nn.Layer) -> list[str]:
    """Paths of the Linears that get a LoRA. Raises ConfigError if the filters leave none."""
    all_paths = target_paths(transformer, network.targets)
    paths = [p for p in all_paths if _is_in_range(p, network, transformer)]
    if network.only_if_contains:
        paths = [p for p in paths if any(part in f"transformer.{p}" for part in network.only_if_contains)]
    if network.ignore_if_contains:
        paths = [
            p for p in paths if not any(part in f"transformer.{p}" for part in network.ignore_if_contains)
        ]
    if not paths:
        raise ConfigError(
            f"network: only_if_contains {network.only_if_contains}, ignore_if_contains "
            f"{network.ignore_if_contains} and the ranges of blocks leave no module; "
            f"names look like transformer.{all_paths[0]}"
        )
    return paths


def _is_in_range(path: str, network: NetworkConfig, transformer: paddle.nn.Layer) -> bool:
    """Whether network.double_blocks and network.single_blocks let the LoRA onto this Linear. Raises
    ConfigError for a range beyond the blocks of the model."""
    kinds = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
    blocks, _, rest = path.partition(".")
    wanted = getattr(network, kinds[blocks]) if blocks in kinds else None
    if wanted is None:
        return True
    count = len(getattr(transformer, blocks))
    if wanted and wanted[1] >= count:
        raise ConfigError(
            f"network.{kinds[blocks]}: came {list(wanted)}, but this model has {count}: 0 to {count - 1}"
        )
    return bool(wanted) and wanted[0] <= int(rest.partition(".")[0]) <= wanted[1]


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
        "batch_size": config.train.batch_size,
        "resolution": config.data.resolution,
    }
