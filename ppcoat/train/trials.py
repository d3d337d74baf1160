"""Adapters on one base that is loaded once: put in, trained a little, measured, saved, taken out again.

What an adapter learns is what `train` with its settings would have taught it: the same first values,
pictures, noise and noise levels, by the same steps. Who comes again goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.data.cache import TrainingCache
from ppcoat.errors import ConfigError
from ppcoat.lora.layer import linear_paths
from ppcoat.nn.convert import set_sublayer, sublayer_at
from ppcoat.progress import Progress
from ppcoat.train.checkpoint import load_latest, save_run
from ppcoat.train.divergence import check_before_saving
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.previews import Validation, encode_validation
from ppcoat.train.run import RunInputs, build_trainer, encode_for_all
from ppcoat.train.run_state import AGAIN, FinishStepOnSignal, RecentMean
from ppcoat.train.search import Candidate, Costs
from ppcoat.train.start import adapter_start
from ppcoat.train.trainer import Trainer

TIMED_UPDATES = 3

_log = logging.getLogger(__name__)


@dataclass
class Trials:
    """One base, on which one adapter after the other trains and is measured. hold_out: training pictures for
    validation."""

    spec: ModelSpec
    config: RunConfig
    inputs: RunInputs
    hold_out: int
    pipeline: Any = field(default=None, init=False)

    def open(self) -> None:
        """Encode everything once and load the base, at the first call."""
        if self.pipeline is not None:
            return
        spec, config, inputs = self.spec, self.config, self.inputs
        self.pipeline = spec.load_encoders(config, inputs.dtype)
        self.cache = encode_for_all(spec, config, inputs.examples, self.pipeline, inputs.ranks)
        if self.hold_out:
            self.cache, pictures = split(self.cache, self.hold_out)
            self.validation = Validation(pictures, spec.objective(config), config.train.validation.sigmas)
        else:
            encoders = spec.encoders(config, self.pipeline)
            objective = spec.objective(config)
            self.validation = encode_validation(config, inputs.validation, encoders, objective)
        # what a step of training has room for is not too much for a pass without gradients
        self.validation = replace(self.validation, at_once=config.train.batch_size)
        spec.load_base(self.pipeline, config, inputs.dtype, inputs.ranks)

    def config_of(self, candidate: Candidate, last: int) -> RunConfig:
        """As `train` takes it, the schedule drawn together to `last` updates."""
        config, folder = with_candidate(self.config, candidate), self.folder(candidate)
        train, share = config.train, last / config.train.steps
        shorter = {"steps": last, "lr_warmup_steps": round(train.lr_warmup_steps * share)}
        if train.lr_step_size is not None:
            shorter["lr_step_size"] = max(1, round(train.lr_step_size * share))
        train = train.model_copy(update=shorter)
        return config.model_copy(
            update={"train": train, "output_dir": str(folder.parent), "name": folder.name}
        )

    @contextmanager
    def trainer(self, candidate: Candidate, last: int) -> Iterator[Trainer]:
        """Context manager: a Trainer of a new adapter, or of the one in its checkpoint. Afterwards the
        adapter is gone, and the base as it was."""
        config, model = self.config_of(candidate, last), self.pipeline.transformer
        start = adapter_start(config, self.spec.unfilled)
        layers = {path: sublayer_at(model, path) for path in linear_paths(model)}
        try:
            trainer = build_trainer(self.spec, config, self.pipeline, self.cache, start=start)
            if takes_mean(config):
                schedule = trainer.side.schedule  # not the trainer: a circle would outlive the trial
                trainer.state.ema = RecentMean(trainer.side.parameters, lambda: schedule.last_epoch)
            yield trainer
        finally:
            for path, layer in layers.items():
                set_sublayer(model, path, layer)
            # swapped blocks stay swapped: their hooks are on the blocks, not on adapters
            swapped = self.config.model.model_copy(update={"blocks_to_swap": 0})
            self.config = self.config.model_copy(update={"model": swapped})

    def folder(self, candidate: Candidate) -> Path:
        """With its checkpoint."""
        return self.config.run_dir / "trials" / candidate.name

    def loss(self, candidate: Candidate, steps: int, last: int, validation: Validation) -> float:
        """Train it up to so many updates, save it -> its validation loss; inf where that or training is not
        finite. Ctrl+C and SIGTERM save and leave, as in Trainer.run."""
        with self.trainer(candidate, last) as trainer:
            try:
                _train(trainer, steps)
                if steps == last and takes_mean(trainer.config):
                    trainer.state.ema = None  # the schedule is at its end
                with trainer.final_weights():
                    loss = validation.losses(trainer.model)["validation_loss"]
            except FloatingPointError as error:
                _log.warning("%s: %s", candidate.name, error)
                return math.inf
        return loss if math.isfinite(loss) else math.inf

    def write(self, candidate: Candidate, last: int) -> Path:
        """The LoRA file of one that has trained all its updates."""
        with self.trainer(candidate, last) as trainer:
            _train(trainer, 0)  # from its checkpoint
            if takes_mean(trainer.config):
                trainer.state.ema = None
            with trainer.final_weights():
                return trainer.save_weights(trainer.step, True)[0][0]

    def measured(self, candidate: Candidate) -> Costs:
        """Seconds of a few updates and of one validation, both after one that does not count."""
        began = time.perf_counter()
        with self.trainer(candidate, self.config.train.steps) as trainer:
            start = time.perf_counter() - began
            steps = [_seconds_of(trainer.train_step) for _ in range(TIMED_UPDATES + 1)][1:]
            evaluation = [_seconds_of(lambda: self.validation.losses(trainer.model)) for _ in range(2)][1]
        return Costs(sorted(steps)[TIMED_UPDATES // 2], evaluation, 2 * start)  # it is saved, too


def takes_mean(config: RunConfig) -> bool:
    """Whether trials need a mean of their weights: the learning rate falls towards the end of a run, and the
    run has no mean, nor an optimizer that takes one."""
    train, constant = config.train, ("constant", "constant_with_warmup")
    own = train.ema.use_ema or train.optimizer.startswith("schedulefree")
    return train.lr_scheduler not in constant and not own


def _seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _train(trainer: Trainer, steps: int) -> None:
    """Up to so many updates from the latest checkpoint, if there is one. Raises FloatingPointError as
    train_step, SystemExit after a signal."""
    config = trainer.config
    checkpoint = load_latest(config.run_dir)
    if checkpoint is not None:
        trainer.state.load(checkpoint.step, checkpoint.tensors, checkpoint.state)
    bar = Progress(total=steps, initial=trainer.step, desc=config.name, leave=False)
    with FinishStepOnSignal() as stop, bar:
        while trainer.step < steps:
            trainer.train_step()
            bar.update()
            if stop.signal or trainer.step == steps or trainer.step % config.save.save_every == 0:
                check_before_saving(trainer.state, config.run_dir)
                save_run(trainer.state, config)
            if stop.signal:
                print(f"stopped at step {trainer.step}; {AGAIN} to go on from there", file=sys.stderr)
                raise SystemExit(128 + stop.signal)


def split(cache: TrainingCache, count: int) -> tuple[TrainingCache, list[dict[str, paddle.Tensor]]]:
    """A cache without `count` of its pictures, evenly spread, and these as Validation takes them: "latents"
    [1, C, h, w], text and what goes with them in the dtype of the encoders; without dropped captions, one
    copy each. Raises ConfigError where too few are left."""
    paths = list(dict.fromkeys(each.item.image_path for each in cache.examples if not each.is_reg))
    if count >= len(paths):
        raise ConfigError(
            f"--hold_out: came {count}, but there are {len(paths)} pictures: some must be trained on"
        )
    held = {paths[i * len(paths) // count] for i in range(count)}
    places = {path: [] for path in held}
    for place, example in enumerate(cache.examples):
        if not example.is_reg and example.item.image_path in held:
            places[example.item.image_path].append(place)
    out = {place for found in places.values() for place in found}
    kept = [place for place in range(len(cache.examples)) if place not in out]
    plain = [replace(each, caption_dropout_rate=0.0, captions=each.captions[:1]) for each in cache.examples]
    whole, rng = replace(cache, examples=plain), np.random.default_rng(0)
    pictures = [whole.batch([places[path][0]], rng) for path in paths if path in held]
    lists = {"examples": cache.examples, "latents": cache.latents, "beside": cache.beside}
    some = {name: [rows[i] for i in kept] for name, rows in lists.items() if rows}
    return replace(cache, **some), pictures


def with_candidate(config: RunConfig, candidate: Candidate) -> RunConfig:
    """The config with these settings; alpha follows the rank, so that alpha / rank stays."""
    network, activation = config.network, config.coat.activation
    alpha = network.linear_alpha * candidate.rank / network.linear
    new = {"linear": candidate.rank, "linear_alpha": alpha}
    activation = activation.model_copy(update={"policy": candidate.policy})
    return config.model_copy(
        update={
            "network": network.model_copy(update=new),
            "train": config.train.model_copy(update={"lr": candidate.lr}),
            "coat": config.coat.model_copy(update={"activation": activation}),
        }
    )
