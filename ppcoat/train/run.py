"""An adapter run of any model: check every input, encode once, put in adapter and COAT, train, save.

Its commands are in cli/train.py. What depends on the model is a ModelSpec (model_spec.py), looked up once in
`MODEL_SPECS` and passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ppcoat.atomic import is_disk_error
from ppcoat.coat import COATTrainer, prepare, trained_parameters
from ppcoat.config.load import dump_config
from ppcoat.config.resume import PLACES, settings_that_matter
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import TrainingCache, build_cache
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Dataset, Example, all_examples, data_report, scan_datasets
from ppcoat.device import (
    GpuMeter,
    HostMeter,
    compute_dtype,
    on_gpu,
    set_device,
    use_deterministic_kernels,
)
from ppcoat.errors import ConfigError
from ppcoat.fp8 import backend
from ppcoat.fp8.formats import fp8_support
from ppcoat.plan.settings import (
    allowed_bases,
    check_fits,
    line_of_plan,
    with_earlier_plan,
    with_memory_plan,
)
from ppcoat.train.base_model import compatible
from ppcoat.train.checkpoint import check_run_folder, only_run_in
from ppcoat.train.flux import FluxSpec
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.newbie import NewbieSpec
from ppcoat.train.optimizers import run_optimizer
from ppcoat.train.previews import (
    KeptPicture,
    Validation,
    draw_previews,
    encode_validation,
    kept_pictures,
    preview_prompts,
)
from ppcoat.train.rank_line import Patience
from ppcoat.train.ranks import Ranks, rank_scratch
from ppcoat.train.resume import Start, check_resume
from ppcoat.train.run_state import Records, RunningMean, RunState
from ppcoat.train.start import AdapterStart, adapter_start, as_it_started, settings_before
from ppcoat.train.trainer import Side, StepResult, Trainer, TrainingResult

MODEL_SPECS: dict[str, ModelSpec] = {"flux": FluxSpec(), "newbie": NewbieSpec()}  # by model.family
DRY_STEPS = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from, checked: pictures, validation pictures with captions, compute dtype, ranks, and
    the adapter's first values where they are those of a file."""

    datasets: list[Dataset]
    validation: list[KeptPicture]
    dtype: str | None
    ranks: Ranks
    start: AdapterStart | None = None

    @property
    def examples(self) -> list[Example]:
        """Those of all datasets."""
        return all_examples(self.datasets)


def train_lora(config: RunConfig) -> TrainingResult:
    """The whole run, on all ranks that paddle.distributed.launch started. Raises ConfigError for wrong inputs
    before any model is loaded or any file is written."""
    spec = MODEL_SPECS[config.model.family]
    inputs = check_inputs(spec, config)
    ranks = inputs.ranks
    ranks.agree(_alike(config, inputs.examples))
    config = with_steps_of_epochs(with_fitting_settings(spec, as_it_started(config), ranks), inputs)
    if ranks.is_first:
        check_run_folder(config.run_dir)
    with only_run_in(config.run_dir, ranks):
        batches = ResumableBatches(inputs.examples, config.train.batch_size * ranks.size, config.seed)
        start = Start(compatible(config), batches, Records(settings_that_matter(config)))
        records = check_resume(config, start, inputs.datasets, spec.parts(config), ranks)
        pipeline = spec.load_encoders(config, inputs.dtype)
        cache = encode_for_all(spec, config, inputs.examples, pipeline, ranks)
        validation = None
        if ranks.is_first:
            encoders = spec.encoders(config, pipeline)
            validation = encode_validation(config, inputs.validation, encoders, spec.objective(config))
        spec.load_base(pipeline, config, inputs.dtype, ranks)
        trainer = build_trainer(spec, config, pipeline, cache, validation, ranks, inputs.start)
        trainer.state.records = records
        return trainer.run()


def dry_run(config: RunConfig) -> Iterator[tuple[StepResult, float]]:
    """The first two steps of a new run, each with its seconds; writes and resumes nothing.

    Only the pictures of these steps are encoded. Raises ConfigError as train_lora does.
    """
    spec = MODEL_SPECS[config.model.family]
    inputs = check_inputs(spec, config)
    config = with_steps_of_epochs(with_fitting_settings(spec, config, inputs.ranks), inputs)
    train, examples, ranks = config.train, inputs.examples, inputs.ranks
    batches = ResumableBatches(examples, train.batch_size * ranks.size, config.seed)
    needed = sorted({i for _ in range(DRY_STEPS * train.gradient_accumulation) for i in next(batches)})
    pipeline = spec.load_encoders(config, inputs.dtype)
    in_memory = tuple(data.model_copy(update={"cache_to_disk": False}) for data in config.datasets)
    config = config.model_copy(update={"datasets": in_memory})
    cache = encode_dataset(spec, config, [examples[i] for i in needed], pipeline)
    latents = dict(zip(needed, cache.latents, strict=True))
    beside = dict(zip(needed, cache.beside, strict=False))  # or empty
    cache = replace(
        cache,
        examples=examples,
        latents=[latents.get(i) for i in range(len(examples))],
        beside=[beside.get(i, {}) for i in range(len(examples))],
    )
    spec.load_base(pipeline, config, inputs.dtype, ranks, keep_copy=False)
    trainer = build_trainer(spec, config, pipeline, cache, ranks=ranks, start=inputs.start)
    for _ in range(DRY_STEPS):
        began = time.perf_counter()
        yield trainer.train_step(), time.perf_counter() - began
    ranks.close()


def check_inputs(spec: ModelSpec, config: RunConfig) -> RunInputs:
    """Find and check everything that a run reads, print what it will train on, set the device and
    initialise the process group. Raises ConfigError for a mistake in any of it."""
    spec.check(config)
    start = adapter_start(config, spec.unfilled)
    datasets = scan_datasets(config)
    validation = kept_pictures(config)
    spec.check_examples(config, all_examples(datasets))
    captions = [caption for each in all_examples(datasets) for caption in each.texts]
    captions += [*preview_prompts(config), *(kept.caption for kept in validation)]
    spec.check_captions(config, list(dict.fromkeys(captions)))
    set_device(config.device)
    backend.check_forced()
    if config.model.quantize_matmul and on_gpu() and not fp8_support().matmul:
        raise ConfigError(
            f"model.quantize_matmul: {fp8_support().reason}: leave it out; quantize: fp8 alone is as small"
        )
    dtype = compute_dtype(config.model.dtype)
    ranks = Ranks.current(config.device, Patience(config.train.rank_timeout))
    cost = use_deterministic_kernels() if config.train.deterministic else None
    if ranks.is_first:
        print(
            *filter(
                None,
                (data_report(datasets, config.train.batch_size * ranks.size), start and start.told, cost),
            ),
            sep="\n",
        )
    return RunInputs(datasets, validation, dtype, ranks, start)


def with_fitting_settings(spec: ModelSpec, config: RunConfig, ranks: Ranks) -> RunConfig:
    """What `memory: auto` asks for, the same on all ranks. Without vram_gb a run is planned for the memory
    that is free when it starts, the least of all ranks; a run that goes on keeps what was planned
    then. Raises ConfigError as `with_memory_plan` does.
    """
    if config.memory == "as_given":
        check_fits(config, spec.memory_model)
        return config
    if config.vram_gb is not None:
        planned, note = with_memory_plan(config, spec.memory_model), f"the {config.vram_gb:g} GB of vram_gb"
        return _tell_plan(config, planned, note, ranks)
    # CUDA's context, which asking makes, is counted here and in the plan: that is on the safe side.
    meter = GpuMeter() if on_gpu() else HostMeter()
    free, total = meter.free_memory(), meter.total_memory()
    if free is None:
        return with_memory_plan(config, spec.memory_model)
    earlier = _planned_before(config)  # rank 0's counts
    earlier = ranks.from_first(b"" if earlier is None else earlier.model_dump_json().encode())
    free = int(ranks.gather([free]).min())
    if earlier:
        before = RunConfig.model_validate_json(earlier)
        planned, note = with_earlier_plan(config, before), "the settings with which this run began"
    else:
        planned = with_memory_plan(config, spec.memory_model, free)
        note = f"the {free / 1e9:.1f} GB that are free of {total / 1e9:.1f}"
    return _tell_plan(config, planned, note, ranks)


def _alike(config: RunConfig, examples: Sequence[Example]) -> dict[str, object]:
    """What the ranks of a run must share: settings and pictures, wherever these lie; the base model is
    compared by `check_resume`, which reads it."""
    settings = {key: value for key, value in settings_that_matter(config).items() if key not in PLACES}
    permissions = {f"save.{name}": getattr(config.save, name) for name in ("restart_data", "strict_resume")}
    return {
        **settings,
        **permissions,
        "memory": config.memory,
        "vram_gb": config.vram_gb,
        **alike_pictures(examples),
    }


def alike_pictures(examples: Sequence[Example]) -> dict[str, int]:
    """What ranks compare of their pictures."""
    facts = ResumableBatches(examples, 1, 0).state_dict()
    return {
        "the number of pictures": facts["num_examples"],
        "a checksum of their sizes and repeats": facts["sizes_and_repeats"],
        "a checksum of their names, bytes and captions": facts["contents"],
    }


def _tell_plan(config: RunConfig, planned: RunConfig, note: str, ranks: Ranks) -> RunConfig:
    if ranks.is_first:
        print(f"memory: auto takes {note}: {line_of_plan(config, planned)}")
    return planned


def _planned_before(config: RunConfig) -> RunConfig | None:
    """The config of a run that this one goes on from, if that was planned for free memory, too, and for the
    same pictures a step, sizes and adapter."""
    earlier = settings_before(config)
    if earlier is None:
        return None
    if earlier.memory != "auto" or earlier.vram_gb is not None or _load(earlier) != _load(config):
        return None
    return earlier if earlier.model.quantize in allowed_bases(config) else None


def _load(config: RunConfig) -> tuple:
    """What decides how much memory a run needs, apart from what a plan chooses."""
    train = config.train
    pictures = train.batch_size * train.gradient_accumulation
    network = config.network.model_copy(
        update={"pretrained_lora_path": None, "pretrained_lora_partly": False}
    )
    shown = [(data.resolution, len(data.control_path), data.full_size_control_images)
             for data in config.datasets]  # fmt: skip
    return pictures, shown, network, train.ema.use_ema


def with_steps_of_epochs(config: RunConfig, inputs: RunInputs) -> RunConfig:
    """The config with train.steps, and save.save_every, of train.num_epochs; as it is without that.

    Raises ConfigError for a warmup that is longer than the run.
    """
    train, save = config.train, config.save
    if train.num_epochs is None:
        return config
    per_step = train.batch_size * inputs.ranks.size
    batches = ResumableBatches(inputs.examples, per_step, config.seed)
    steps, of_one = (-(-batches.batches_of(epochs) // train.gradient_accumulation)
                     for epochs in (train.num_epochs, save.save_every_epochs or 1))  # fmt: skip
    if train.lr_warmup_steps > steps:
        raise ConfigError(
            f"lr_warmup_steps {train.lr_warmup_steps} is more than the {steps} steps of {train.num_epochs} "
            "epochs; lower it or train longer"
        )
    every = min(save.save_every, of_one) if save.save_every_epochs else save.save_every
    return config.model_copy(
        update={
            "train": train.model_copy(update={"steps": steps}),
            "save": save.model_copy(update={"save_every": every}),
        }
    )


def encode_for_all(
    spec: ModelSpec, config: RunConfig, examples: Sequence[Example], pipeline: Any, ranks: Ranks
) -> TrainingCache:
    """encode_dataset on all ranks: the first encodes, the others read what it found.

    From config.cache_folder if a dataset has cache_to_disk, else from a folder in the run folder that is
    removed when all have read it. A rank on a machine that does not share these encodes for itself. Raises
    ConfigError where the folder cannot be written to.
    """
    try:
        with rank_scratch(config.run_dir, ranks) as scratch, ranks.first_ahead():
            return encode_dataset(spec, config, examples, pipeline, scratch)
    except OSError as error:
        if not is_disk_error(error):
            raise
        raise ConfigError(
            f"encoded pictures and captions could not be written ({error.strerror}); make room on the disk, "
            "or choose another output_dir or cache_dir"
        ) from error


def encode_dataset(
    spec: ModelSpec,
    config: RunConfig,
    examples: Sequence[Example],
    pipeline: Any,
    scratch: Path | None = None,
) -> TrainingCache:
    """VAE latents of the pictures, text embeddings of their captions and of the preview prompts: each
    once, or from config.cache_folder if a dataset has cache_to_disk, else from the folder `scratch`.

    scratch: a folder of this run alone, because encoders without a cache on disk do not say who they are.
    """
    prompts = preview_prompts(config)
    folder = config.cache_folder if any(data.cache_to_disk for data in config.datasets) else scratch
    return build_cache(
        examples,
        spec.encoders(config, pipeline),
        extra_captions=[*prompts, *spec.preview_negatives] if prompts else (),
        reg_weight=config.reg_weight,
        store=None if folder is None else EmbeddingStore(folder),
    )


def build_trainer(
    spec: ModelSpec,
    config: RunConfig,
    pipeline: Any,
    cache: TrainingCache,
    validation: Validation | None = None,
    ranks: Ranks | None = None,
    start: AdapterStart | None = None,
) -> Trainer:
    """Put adapter and COAT into the transformer and everything a Trainer needs around it. ranks: by default,
    this process alone. start: first values of the adapter, by default random ones."""
    ranks = ranks or Ranks()
    global_batch = config.train.batch_size * ranks.size
    train, transformer = config.train, pipeline.transformer
    coat = COATTrainer(config.coat, train.gradient_checkpointing)
    if config.coat.memory.checkpoint_blocks and not train.gradient_checkpointing:
        _log.warning("coat.memory.checkpoint_blocks has no effect without train.gradient_checkpointing")
    modules = prepare(transformer, coat, config.network, config.model, seed=config.seed)
    if start is not None:
        start.put(modules)
    parameters = trained_parameters(modules)
    optimizer, schedule = run_optimizer(config, coat, list(parameters.values()))

    def draw() -> tuple[list[Image.Image], list[str]]:
        return draw_previews(config, pipeline, lambda preview: spec.draw(config, pipeline, preview, cache))

    side = Side(parameters, spec.objective(config), optimizer, schedule, coat, train.preservation_weight)
    state = RunState(
        parameters,
        optimizer,
        schedule,
        ResumableBatches(cache.examples, global_batch, config.seed),
        side.bins,
        RunningMean(parameters, train.ema.ema_decay) if train.ema.use_ema else None,
        compatible(config, list(modules)),
        Records(settings_that_matter(config)),
    )
    return Trainer(
        config=config,
        model=transformer,
        sides={"adapter": side},
        state=state,
        cache=cache,
        save_weights=spec.save_weights(config, transformer),
        draw_previews=draw if config.sample.wanted else None,
        validation=validation,
        ranks=ranks,
        settings=dump_config(_without_permissions(config)),
    )


def _without_permissions(config: RunConfig) -> RunConfig:
    """The config to go on with: what was allowed for one start only is not allowed for the next."""
    return config.model_copy(update={"save": config.save.model_copy(update={"restart_data": False})})
