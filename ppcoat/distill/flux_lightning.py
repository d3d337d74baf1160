"""A FLUX-Lightning run: check, unpack, encode, put LoRA, COAT and heads together, train."""

from __future__ import annotations

from pathlib import Path

import paddle
import yaml
from PIL import Image

from ppcoat.coat import COATTrainer, prepare, trained_parameters
from ppcoat.config.lightning import LightningConfig
from ppcoat.config.resume import PLACES, settings_that_matter
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import TrainingCache, WindowedCache
from ppcoat.data.examples import Example, all_examples, data_report, scan_datasets
from ppcoat.data.laion import LaionSource, unpack_laion
from ppcoat.device import (
    GpuMeter,
    compute_dtype,
    computes_in_half,
    on_gpu,
    set_device,
    use_deterministic_kernels,
)
from ppcoat.distill.discriminator import Discriminator
from ppcoat.distill.encoding import OneByOne, encode_pictures
from ppcoat.distill.objective import DiscriminatorObjective, Distillation, Rules, Terms
from ppcoat.distill.trainer import (
    DISCRIMINATOR,
    GENERATOR,
    HeadsOptimizer,
    LightningTrainer,
    NothingSaved,
    RestartedBatches,
    joint_state,
)
from ppcoat.errors import ConfigError
from ppcoat.fp8 import backend
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.scheduler import calculate_shift
from ppcoat.models.loading import check_folder
from ppcoat.optim import lr_scheduler
from ppcoat.train.checkpoint import check_run_folder, only_run_in
from ppcoat.train.flux import LoRAFiles
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.previews import draw_previews
from ppcoat.train.rank_line import Patience
from ppcoat.train.ranks import Ranks
from ppcoat.train.resume import Start, check_resume
from ppcoat.train.run import alike_pictures
from ppcoat.train.run_state import Records, ResumeWords
from ppcoat.train.trainer import Side, TrainingResult

GIGABYTE = 10**9
WORDS = ResumeWords(
    "give --resume_from_checkpoint latest", "--strict_resume", "", "start a new run under another name"
)


def train_flux_lightning(config: LightningConfig) -> TrainingResult:
    """The whole run, on all ranks that paddle.distributed.launch started. Raises ConfigError for wrong inputs
    before any model is loaded."""
    spec, run = OneByOne(), config.run_config(config.data_path)
    teacher = FluxFiles.found(
        config.pretrained_teacher_model, "--pretrained_teacher_model", **run.model.beside
    )
    check_folder(teacher)
    spec.check(run)
    _check_fresh(config, run)
    set_device(config.device)
    backend.check_forced()
    dtype = compute_dtype(run.model.dtype)
    patience = Patience(config.rank_timeout, "--rank_timeout", WORDS.again)
    ranks = Ranks.current(config.device, patience)
    ranks.agree(config.model_dump(mode="json", exclude=set(PLACES)))
    if config.file_list_path is not None:
        run = config.run_config(_unpacked(config, run, ranks))
    datasets = scan_datasets(run)
    ranks.agree(alike_pictures(all_examples(datasets)))
    if ranks.is_first:
        print(data_report(datasets, config.train_batch_size * ranks.size))
        check_run_folder(run.run_dir)
        _say_dtype(config)
    if config.deterministic:
        cost = use_deterministic_kernels()
        if ranks.is_first:
            print(cost)
    with only_run_in(run.run_dir, ranks):
        examples = all_examples(datasets)
        batches = _batches(config, examples, ranks)
        start = Start(_compatible(config), batches, Records(settings_that_matter(config)))
        records = check_resume(run, start, datasets, spec.parts(run), ranks, WORDS)
        pre_allocate(config.pre_alloc_memory)
        pipeline = spec.load_encoders(run, dtype)
        cache = encode_pictures(spec, config, run, examples, batches, pipeline, ranks)
        spec.load_base(pipeline, run, dtype, ranks)
        trainer = build_lightning_trainer(spec, config, run, pipeline, cache, ranks)
        trainer.state.records = records
        return trainer.run()


def build_lightning_trainer(
    spec: ModelSpec,
    config: LightningConfig,
    run: RunConfig,
    pipeline: FluxPipeline,
    cache: TrainingCache | WindowedCache,
    ranks: Ranks | None = None,
) -> LightningTrainer:
    """Put LoRA, COAT and heads on the transformer and everything a trainer needs around them. A
    WindowedCache brings its sampler."""
    ranks, transformer = ranks or Ranks(), pipeline.transformer
    coat = COATTrainer(run.coat, config.gradient_checkpointing)
    modules = prepare(transformer, coat, run.network, run.model, seed=run.seed)
    parameters = trained_parameters(modules)
    sides = build_sides(config, coat, transformer, parameters, pipeline.scheduler.config)

    def draw() -> tuple[list[Image.Image], list[str]]:
        return draw_previews(run, pipeline, lambda preview: spec.draw(run, pipeline, preview, cache))

    windowed = isinstance(cache, WindowedCache)
    batches = cache.batches if windowed else _batches(config, cache.examples, ranks)
    state = joint_state(sides, batches, _compatible(config) | {"modules": list(modules)})
    state.records = Records(settings_that_matter(config))
    return LightningTrainer(
        config=run,
        model=transformer,
        sides=sides,
        state=state,
        cache=cache,
        save_weights=LoRAFiles(run, transformer).write,
        draw_previews=draw if run.sample.wanted else None,
        words=WORDS,
        ranks=ranks,
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def build_sides(
    config: LightningConfig,
    coat: COATTrainer,
    transformer: paddle.nn.Layer,
    parameters: dict[str, paddle.Tensor],
    scheduler: dict,
) -> dict[str, Side]:
    """The LoRA's side and, with adv_weight, that of the heads. parameters: what trains of the LoRA, by name,
    float32 of any shape. scheduler: its config, for the shift."""
    steps = max(1, config.generator_steps)
    heads = None
    if config.adv_weight > 0:
        heads = Discriminator(transformer, config.seed, config.head_blocks)
    distillation = _distillation(config, heads, scheduler)
    schedule = lr_scheduler(config.lr_scheduler, config.learning_rate, steps, config.lr_warmup_steps)
    shared = {"weight_decay": config.adam_weight_decay, "epsilon": config.adam_epsilon,
              "max_grad_norm": config.max_grad_norm, "fp8_states": config.fp8_optimizer}  # fmt: skip
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = coat.create_optimizer(parameters.values(), schedule, betas=betas, **shared)
    sides = {GENERATOR: Side(parameters, distillation, optimizer, schedule, coat)}
    if heads is not None:
        # beta1 is 0 as in the public code: the first moment is the gradient, and need not be stored
        constant = lr_scheduler("constant", config.adv_lr, config.max_train_steps)
        own = shared | {"betas": (0.0, config.adam_beta2), "max_grad_norm": 0.0}

        def make(head: list[paddle.Tensor]) -> paddle.optimizer.Optimizer:
            return coat.create_optimizer(head, constant, **own)

        optimizer = HeadsOptimizer(heads.heads, make, config.max_grad_norm)
        judging = DiscriminatorObjective(distillation, config.gradient_accumulation_steps)
        named = dict(heads.named_parameters())
        sides[DISCRIMINATOR] = Side(named, judging, optimizer, constant, NothingSaved())
    return sides


def _distillation(config: LightningConfig, heads: Discriminator | None, scheduler: dict) -> Distillation:
    """The LoRA's objective, with the losses and rules of the flags."""
    terms = Terms(
        loss_type=config.loss_type,
        huber_c=config.huber_c,
        adv_weight=config.adv_weight,
        dmd_weight=config.dmd_weight if config.use_dmd_loss else 0.0,
        reflow_weight=config.reflow_loss_weight if config.apply_reflow_loss else 0.0,
        whole_phase=config.use_distill_loss,
    )
    rules = Rules(**{name: getattr(config, name) for name in Rules.__dataclass_fields__})

    def shift(tokens: int) -> float:
        return calculate_shift(
            tokens, scheduler["base_image_seq_len"], scheduler["max_image_seq_len"],
            scheduler["base_shift"], scheduler["max_shift"],
        )  # fmt: skip

    return Distillation(
        config.num_euler_timesteps, config.multiphase, config.guidance_scale, terms, rules, heads, shift
    )


def pre_allocate(gigabytes: int) -> None:
    """Take so many GB of the GPU's memory and give them to Paddle's pool, so that it lies in one piece.

    Raises ConfigError for more than is free. On a CPU one line says that there is nothing to do.
    """
    if not gigabytes:
        return
    if not on_gpu():
        print("pre_alloc_memory: nothing to do, this run is on a CPU")
        return
    meter = GpuMeter()
    free, total = (count / GIGABYTE for count in (meter.free_memory(), meter.total_memory()))
    if gigabytes >= free:
        raise ConfigError(
            f"pre_alloc_memory: came {gigabytes} GB, wanted less than the {free:.1f} GB that are free of "
            f"this GPU's {total:.1f}"
        )
    paddle.empty([gigabytes * GIGABYTE], dtype="uint8")  # freed at once; Paddle keeps it for what comes


def _batches(config: LightningConfig, examples: list[Example], ranks: Ranks) -> ResumableBatches:
    order = RestartedBatches if config.resume_order == "published" else ResumableBatches
    return order(examples, config.train_batch_size * ranks.size, config.seed)


def _check_fresh(config: LightningConfig, run: RunConfig) -> None:
    if config.resume_from_checkpoint is None and (run.run_dir / "checkpoints" / "latest").exists():
        raise ConfigError(
            f"{run.run_dir} has checkpoints of an earlier run: give --resume_from_checkpoint latest to go on "
            "from them, or another --output_dir or --tracker_project_name"
        )


def _unpacked(config: LightningConfig, run: RunConfig, ranks: Ranks) -> Path:
    """The folder of unpacked shards; the first rank unpacks. No more pictures than the run can see."""
    seen = config.max_train_steps * config.gradient_accumulation_steps * config.train_batch_size * ranks.size
    source = LaionSource(
        config.data_path, config.file_list_path, config.image_column, config.caption_column, seen,
        config.max_bad_share, config.bad_rows == "published", config.dataloader_num_workers,
    )  # fmt: skip
    folder = run.run_dir / f"laion-{source.key()}"
    with ranks.first_ahead():
        done = unpack_laion(source, folder)
    if ranks.is_first:
        print(done.line())
    return folder


def _say_dtype(config: LightningConfig) -> None:
    if config.mixed_precision == "bf16" and not computes_in_half():
        print("mixed_precision bf16: Paddle computes in float32 on a CPU")


def _compatible(config: LightningConfig) -> dict:
    """What a checkpoint must share with the run that resumes from it, beside the LoRA's modules and the
    weights of the base; all else may change."""
    alike = ("lora_rank", "lora_alpha", "resolution", "fp8_optimizer", "num_euler_timesteps", "multiphase",
             "head_blocks", "guidance_scale")  # fmt: skip
    turns = {"even": DISCRIMINATOR, "odd": GENERATOR} if config.adv_weight > 0 else {"all": GENERATOR}
    return {
        **{name: getattr(config, name) for name in alike},
        "turns": turns,
    }
