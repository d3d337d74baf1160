"""Learning rate, rank and saving policy by the validation loss, within a time: successive halving.

    python -m ppcoat tune run.yaml --budget 60m
    <output_dir>/<name>_tune/best.yaml, journal.json, cache/, trials/<settings>/

The base is loaded once, in this process. An adapter is put in, trains, is measured and saved, and leaves; who
is promoted goes on from its checkpoint. Every adapter sees the same pictures, noise and noise levels in the
same order as `train` with the same seed, and is measured on the same pictures, noise and levels: what differs
comes from the settings. What is tried and in which rounds: search.py.

Learning rate schedules keep their course: over train.steps, which the last round reaches where the time
suffices, so that the winner has then trained exactly as `train` would; else drawn together to the updates of
the last round. In earlier rounds a schedule that falls has not fallen yet, and the weights of a high rate are
noisy: there the mean of the last third of the updates is measured, which stands for the end of the schedule.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ppcoat.atomic import write_text
from ppcoat.config.load import dump_config
from ppcoat.config.schema import MOST_NAME_BYTES, RunConfig
from ppcoat.device import GpuMeter, HostMeter, on_gpu
from ppcoat.errors import ConfigError, printable
from ppcoat.nn.policy import check_policy
from ppcoat.plan.settings import GB, plan, planned_for_gpu
from ppcoat.train.base_model import base_identity
from ppcoat.train.checkpoint import check_run_folder, only_run_in
from ppcoat.train.model_spec import ModelSpec
from ppcoat.train.run import (
    MODEL_SPECS,
    check_inputs,
    with_fitting_settings,
    with_steps_of_epochs,
)
from ppcoat.train.search import (
    EXTENSIONS,
    Candidate,
    Costs,
    Journal,
    Result,
    Rounds,
    Space,
    TooShort,
    TuneFlags,
    draws_of,
    plan_rounds,
    ranked,
    seconds_of,
    table,
    told_seconds,
)
from ppcoat.train.trials import Trials, takes_mean, with_candidate


class _OutOfTime(Exception):
    """What comes next would not be ready within the budget."""


def tune(config: RunConfig, flags: TuneFlags) -> None:
    """Search, print a table, write <output_dir>/<name>_tune/best.yaml, a whole config; goes on where an
    earlier call was stopped. Raises ConfigError for wrong inputs and a budget without room for a search.
    """
    began, budget = time.perf_counter(), seconds_of(flags.budget)
    check_flags(config, flags)
    spec, folder = MODEL_SPECS[config.model.family], config.run_dir.with_name(f"{config.name}_tune")
    apart = _apart(config, folder)
    inputs = check_inputs(spec, apart)
    if inputs.ranks.size > 1:
        raise ConfigError(f"tune runs in one process, came {inputs.ranks.size}: leave out the launcher")
    check_run_folder(folder)
    with only_run_in(folder, inputs.ranks):
        apart = with_steps_of_epochs(with_fitting_settings(spec, apart, inputs.ranks), inputs)
        journal = Journal.of(folder / "journal.json", _settings(config, flags, apart))
        space = search_space(spec, apart, flags)
        trials = Trials(spec, apart, inputs, flags.hold_out)
        search = Search(trials, space, journal, budget, began - journal.seconds)
        winner, told = search.run()
        lines = [told, *table(space.own, winner, journal)]
        best = folder / "best.yaml"
        write_text(best, _best_yaml(config, flags, winner, lines))
        script = {"flux": "train", "newbie": "train-newbie --config_file"}[config.model.family]
        if any(trials.folder(winner).glob("*.safetensors")):
            lines.append(f"its adapter, as the last round left it: {trials.folder(winner)}")
        print(*lines, f"train with the best: python -m ppcoat {script} {best}", sep="\n")


def check_flags(config: RunConfig, flags: TuneFlags) -> None:
    """Raises ConfigError for flags without sense, alone or beside this config."""
    for name, values, least in (("ranks", flags.ranks, 1), ("hold_out", [flags.hold_out], 0),
                                ("lr_span", [flags.lr_span], 1)):  # fmt: skip
        if not all(math.isfinite(value) and value >= least for value in values):
            raise ConfigError(f"--{name}: came {' '.join(map(str, values))}, wanted {least} or more")
    coat, validation = config.coat, config.train.validation
    for policy in flags.policies:
        check_policy(policy)
    if flags.policies and not (coat.enabled and coat.activation.use_fp8):
        raise ConfigError(
            "--policies has no effect without coat.enabled and coat.activation.use_fp8: set them"
        )
    if flags.policies and config.memory == "auto":
        raise ConfigError("--policies: memory: auto chooses the policy itself; leave out one of the two")
    if validation.wanted and flags.hold_out:
        raise ConfigError("--hold_out is for a config without train.validation: leave out one of the two")
    if not validation.wanted and not flags.hold_out:
        raise ConfigError(
            "tune compares by the validation loss, and the config names no pictures for it: add "
            "train.validation.folder_path (pictures with captions that are not trained on), or --hold_out 8, "
            "which keeps 8 of the training pictures for it"
        )


def _settings(config: RunConfig, flags: TuneFlags, planned: RunConfig) -> dict:
    """Which search it is: all that decides what is tried, and its losses. planned: with what memory: auto
    chose now."""
    model, train = planned.model, planned.train
    memory = [model.quantize, model.blocks_to_swap, train.batch_size, train.gradient_accumulation,
              train.gradient_checkpointing, planned.coat.model_dump(mode="json")]  # fmt: skip
    decisive = {name: getattr(flags, name) for name in ("lr_span", "ranks", "policies", "hold_out")}
    base = base_identity(config.model.name_or_path)
    return {"config": dump_config(config), "base model": base, "choice of memory: auto": memory} | decisive


def _apart(config: RunConfig, folder: Path) -> RunConfig:
    """The config with a folder of its own, encodings on disk, and no previews."""
    to_disk = any(data.cache_to_disk for data in config.datasets)
    datasets = tuple(data.model_copy(update={"cache_to_disk": True}) for data in config.datasets)
    return config.model_copy(
        update={
            "output_dir": str(folder.parent),
            "name": folder.name,
            "cache_dir": str(config.cache_folder if to_disk else folder / "cache"),
            "datasets": datasets,
            "sample": config.sample.model_copy(update={"sample_every": 0}),
            "save": config.save.model_copy(update={"max_step_saves_to_keep": 1}),
        }
    )


def search_space(spec: ModelSpec, config: RunConfig, flags: TuneFlags) -> Space:
    """What may be tried: of the ranks those that are no wider than the narrowest layer, differ in their
    parameters, and fit into memory by the plan; what is left out is told. Raises ConfigError for no choice.
    """
    train, policy = config.train, config.coat.activation.policy
    own = Candidate(train.lr, config.network.linear, policy)
    model = spec.memory_model(config, planned_for_gpu(config, config.vram_gb)).model
    narrowest = min(min(model.linears[path]) for path in model.lora_paths)
    by_shape: dict[tuple, int] = {}
    for rank in [own.rank, *sorted(set(flags.ranks))]:
        rank = rank if config.network.type == "lokr" or rank == own.rank else min(rank, narrowest)
        network = config.network.model_copy(update={"linear": rank})
        by_shape.setdefault(tuple(model.adapter_shapes(network)), rank)
    ranks = _that_fit(spec, config, sorted(by_shape.values()))
    of_itself = train.optimizer == "adafactor" and train.adafactor.relative_step
    own_rate = train.optimizer == "prodigy" or of_itself
    span = 1.0 if own_rate else flags.lr_span  # those find their rate themselves
    space = Space(own, tuple(ranks), tuple(dict.fromkeys(flags.policies)) or (policy,), span)
    if len(space.candidates(space.counts()[0])) < 2:
        raise ConfigError(
            "there is nothing to choose: one rank, one policy, one learning rate; give more --ranks"
        )
    return space


def _that_fit(spec: ModelSpec, config: RunConfig, ranks: list[int]) -> list[int]:
    """Ascending ranks, without the largest that the plan says do not fit vram_gb or the free memory."""
    free = (GpuMeter() if on_gpu() else HostMeter()).free_memory() if config.vram_gb is None else None
    room = free if config.vram_gb is None else config.vram_gb * GB
    fitting = list(ranks)
    if takes_mean(config):
        with_mean = {"ema": config.train.ema.model_copy(update={"use_ema": True})}
        config = config.model_copy(update={"train": config.train.model_copy(update=with_mean)})
    while room is not None and fitting:
        candidate = Candidate(config.train.lr, fitting[-1], config.coat.activation.policy)
        needed = plan(with_candidate(config, candidate), spec.memory_model).total
        if needed <= room:
            break
        print(f"rank {fitting.pop()} is left out: planned {needed / GB:.1f} GB, there are {room / GB:.1f}")
    if not fitting:
        raise ConfigError(
            f"no rank fits: rank {ranks[0]} wants {needed / GB:.1f} GB planned of {room / GB:.1f}: "
            "see python -m ppcoat plan, or set memory: auto"
        )
    return fitting


@dataclass
class Search:
    """The rounds of a search. began: the time of perf_counter at which its budget, in seconds, began."""

    trials: Trials
    space: Space
    journal: Journal
    budget: float
    began: float

    def run(self) -> tuple[Candidate, str]:
        """-> the best, and a line on how it was found. Raises ConfigError where there is no time for a first
        round."""
        journal = self.journal
        if journal.rounds is None:
            self._plan()
        if journal.winner is None:
            ranking, is_over = self._rounds()
            if not is_over:
                return ranking[0], "the budget is used up: give more and the rounds go on from here"
            journal.winner = ranking[0]
            self.trials.open()
            self.trials.write(journal.winner, journal.rounds.steps[-1])
            self._note()
        total = self.trials.config.train.steps
        last = journal.rounds.steps[-1]
        what = "those of the config" if last == total else f"the config has {total}"
        used = told_seconds(journal.seconds)
        return journal.winner, f"found in {used}; {last} updates in the last round, {what}"

    def _plan(self) -> None:
        """Measure what an update takes, and fix the rounds."""
        trials, journal, space = self.trials, self.journal, self.space
        trials.open()
        costs = trials.measured(replace(space.own, rank=max(space.ranks)))
        total = trials.config.train.steps
        rounds = self._rounds_after(self._seconds(), costs)
        self._note()
        entering, steps = (", ".join(map(str, each)) for each in (rounds.keep, rounds.steps))
        print(
            f"an update takes {costs.step:.2g} s, a validation loss {journal.costs.evaluation:.2g} s "
            f"(measured with rank {max(space.ranks)}); rounds of {entering} settings to {steps} updates, "
            f"planned for {told_seconds(rounds.seconds(journal.costs))}",
            flush=True,
        )
        if rounds.steps[-1] < total:
            print(f"the learning rate's schedule is drawn together: {total} updates to {rounds.steps[-1]}")

    def _rounds_after(self, used: float, costs: Costs) -> Rounds:
        """The rounds that fit where `used` seconds of the budget are over, noted with the draws of a
        validation. Raises ConfigError with the budget that would do; a larger one also has more draws."""
        journal, validation, budget = self.journal, self.trials.validation, self.budget
        while True:
            draws = draws_of(len(validation.pictures) * len(validation.sigmas), costs, budget)
            with_draws = replace(costs, evaluation=costs.evaluation * draws)
            try:
                rounds = plan_rounds(self.space, with_draws, budget - used, self.trials.config.train.steps)
            except TooShort as short:
                budget = math.ceil(used + short.wanted)
                continue
            if budget > self.budget:
                enough = told_seconds(1.1 * budget)  # not to be just as much too late again
                raise ConfigError(
                    f"--budget is too short: {used:.0f} s are used, an update takes {costs.step:.2g} s and a "
                    f"validation {with_draws.evaluation:.2g} s (measured); give {enough}, or fewer --ranks"
                )
            journal.draws, journal.costs, journal.rounds = draws, with_draws, rounds
            return rounds

    def _rounds(self) -> tuple[list[Candidate], bool]:
        """-> the ranking of the last round that is complete, or of what there is of the first; whether all
        rounds are."""
        rounds, ranking = self.journal.rounds, self.space.candidates(self.journal.rounds.keep[0])
        for number, (count, steps) in enumerate(zip(rounds.keep, rounds.steps, strict=True)):
            losses: dict[Candidate, float] = {}
            try:
                for each in ranking[:count]:
                    losses[each] = self._loss(each, number)
                for _ in range(EXTENSIONS if number == 0 else 0):
                    for each in self.space.beyond(losses):
                        losses[each] = self._loss(each, number)
            except _OutOfTime:
                return (ranking if number else ranked(losses)), False
            ranking = ranked(losses)
            if losses[ranking[0]] == math.inf:
                raise FloatingPointError(
                    f"none of {len(losses)} settings trains: no loss is finite after {steps} updates; lower "
                    "train.lr"
                )
            following = rounds.keep[number + 1] if number + 1 < len(rounds.keep) else 1
            for each in ranking[following:]:
                shutil.rmtree(self.trials.folder(each), ignore_errors=True)
        return ranking, True

    def _loss(self, candidate: Candidate, number: int) -> float:
        """After this round; from the journal where it is known. Raises _OutOfTime."""
        journal, began = self.journal, time.perf_counter()
        steps, before = journal.rounds.steps[number], journal.steps(candidate)
        known = journal.loss(candidate, steps)
        if known is not None:
            return known
        if self._seconds() + journal.costs.of(steps - before) > self.budget and journal.results:
            raise _OutOfTime
        self.trials.open()
        validation = replace(self.trials.validation, draws=journal.draws)
        try:
            loss = self.trials.loss(candidate, steps, journal.rounds.steps[-1], validation)
            result = Result(steps, loss, time.perf_counter() - began)
            journal.results.setdefault(candidate, []).append(result)
        finally:
            self._note()  # the time, also where a signal ends it
        policy = f", {candidate.policy}" if len(self.space.policies) > 1 else ""
        print(
            f"round {number + 1}: lr {candidate.lr:.4g}, rank {candidate.rank}{policy}: validation loss "
            f"{loss:.5f} after {steps} updates, {result.seconds:.0f} s",
            flush=True,
        )
        return loss

    def _seconds(self) -> float:
        """Of the budget, used."""
        return time.perf_counter() - self.began

    def _note(self) -> None:
        self.journal.seconds = self._seconds()
        self.journal.save()


def _best_yaml(config: RunConfig, flags: TuneFlags, winner: Candidate, lines: list[str]) -> str:
    """A whole config with the best settings, and above it where they come from."""
    name = f"{config.name}_tuned"
    new = {"name": name if len(name.encode()) <= MOST_NAME_BYTES else config.name}
    if any(data.cache_to_disk for data in config.datasets):
        new["cache_dir"] = str(config.cache_folder)  # the encodings are there already
    said = [f"found by {flags.command()}: train.lr, network.linear and linear_alpha"
            + (", coat.activation.policy" if flags.policies else ""), *lines]  # fmt: skip
    comment = "".join(f"# {printable(line)}\n" for line in said)
    return comment + dump_config(with_candidate(config, winner).model_copy(update=new))
