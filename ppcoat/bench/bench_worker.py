"""Training runs that measure themselves, each in a process of its own: interleaved runs of several variants,
and the search for the largest batch that fits.

The model is a FluxTransformer2DModel with random weights, the data are random latents and text embeddings.
Both depend on the seed alone, so that losses of two variants can be compared step by step. Each variant has
its own process, because peak memory is measured per process.

Variants run interleaved: while one takes a few steps, the others sleep at their pipes. They never compete for
cores and memory, and a machine that slows down affects all of them.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import paddle

from ppcoat.bench.flags import LATENT_CHANNELS, POOLED_WIDTH, TEXT_WIDTH, BenchmarkCase
from ppcoat.coat import COATConfig, COATTrainer, factor_copies, prepare, trained_parameters
from ppcoat.config.schema import CoatActivationConfig, CoatOptimizerConfig, NetworkConfig
from ppcoat.device import (
    ChildProcess,
    GpuMeter,
    HostMeter,
    on_gpu,
    set_device,
    tune_host,
)
from ppcoat.errors import ConfigError, ignore_warnings_of_libraries
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.objective import FlowMatching
from ppcoat.train.run_state import optimizer_state_bytes

BYTES = ("bytes_kept", "bytes_kept_bf16", "bytes_unpacked")  # counters of nn.saved_tensors
LEARNING_RATE = {"lora": 1e-3, "full": 1e-4}
PROBE_STEPS = 2  # the first update makes the optimizer's states, so the second step has the peak
GROWTH = 4  # the next batch to try is at most this many times the largest that fits


@dataclass(frozen=True)
class StepRecord:
    """One optimizer update. started_at: in seconds of time.monotonic, which all processes share."""

    started_at: float
    milliseconds: float
    loss: float


class MeasuredTraining:
    """A model, its optimizer and its data; `step` trains and measures, `result` gives the memory numbers."""

    def __init__(self, case: BenchmarkCase) -> None:
        set_device(case.device)
        self.case = case
        # In full training all weights are trained, and trained weights are float32.
        self.dtype = "bfloat16" if on_gpu() and not case.full_training else "float32"
        self.coat = coat_of(case)
        self.model, self.parameters = build_model(case, self.coat, self.dtype)
        self.meter = GpuMeter() if on_gpu() else HostMeter()
        # Read before the optimizer is made: FP8AdamW makes its states then, Paddle's at its first step.
        self.loaded_bytes = self.meter.memory()
        rate = LEARNING_RATE["full" if case.full_training else "lora"]
        self.optimizer = self.coat.create_optimizer(self.parameters, lr=rate)
        self.factors = factor_copies(self.model, [self.optimizer])
        self.objective = FlowMatching()
        self.steps_done = 0
        self.bytes = dict.fromkeys(BYTES, 0)

    def step(self) -> StepRecord:
        """One update: forward, backward, optimizer. The time does not include drawing the batch."""
        rng = np.random.default_rng([self.case.seed, self.steps_done])
        batch = draw_batch(self.case, rng, self.dtype)
        # Under "none" the context only counts bytes, so the first step is enough; it costs time.
        wanted = self.coat.policy != "none" or self.steps_done == 0
        started_at = time.monotonic()
        self.meter.start()
        with self.factors.in_use():
            with self.coat.saved_tensors() if wanted else nullcontext() as saved:
                loss = self.objective.loss(self.model, batch, rng)
            loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        milliseconds = self.meter.stop()
        if saved is not None:
            self.bytes = {name: getattr(saved, name) for name in BYTES}
        self.steps_done += 1
        return StepRecord(started_at, milliseconds, float(loss))

    def facts(self) -> dict:
        """Facts of the model and of the machine."""
        double, single = self.case.blocks
        return {
            "model": {
                "parameters": sum(p.size for p in self.model.parameters()),
                "trained_parameters": sum(p.size for p in self.parameters),
                "double_blocks": double,
                "single_blocks": single,
                "heads": self.case.hidden_size // self.case.head_dim,
                "picture_pixels": list(self.case.picture_size),
                "dtype": self.dtype,
            },
            "environment": {
                "paddle": paddle.__version__,
                "python": platform.python_version(),
                "device": paddle.get_device(),
                "device_name": self.meter.name(),
                "memory_bytes": self.meter.total_memory(),
                "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            },
        }

    def result(self) -> dict:
        """Bytes after the steps so far. peak_bytes: resident in this process, or allocated on the GPU; None
        if the system does not tell.
        """
        states, peak = optimizer_state_bytes(self.optimizer), self.meter.peak_memory()
        return {
            "optimizer": type(self.optimizer).__name__,
            "policy": self.coat.policy,
            "optimizer_bytes": states,
            "optimizer_bytes_per_parameter": states / sum(p.size for p in self.parameters),
            **self.bytes,
            "loaded_bytes": self.loaded_bytes,
            "peak_bytes": peak,
            "growth_bytes": None if peak is None else peak - self.loaded_bytes,
        }


def serve(connection: Connection, case: BenchmarkCase) -> None:
    """Main function of a measuring process. It builds the training, sends `facts`, then answers each number n
    with the records of n steps, and 0 with `result`, after which it ends. Instead of an answer it may send a
    ConfigError or MemoryError.
    """
    ignore_warnings_of_libraries()
    try:
        tune_host()
        training = MeasuredTraining(case)
        connection.send(training.facts())
        while steps := connection.recv():
            connection.send([training.step() for _ in range(steps)])
        connection.send(training.result())
    except ConfigError as error:
        connection.send(error)
    except MemoryError:  # Paddle's message is a page long
        connection.send(MemoryError("a measuring process got no more"))
    except EOFError:  # the parent is gone
        return


def coat_of(case: BenchmarkCase) -> COATTrainer:
    """The COATTrainer of a variant; without FP8 states and policy it gives AdamW and ordinary activations."""
    return COATTrainer(
        COATConfig(
            enabled=case.fp8_states or case.policy != "none",
            optimizer=CoatOptimizerConfig(use_fp8=case.fp8_states),
            activation=CoatActivationConfig(policy=case.policy),
        ),
        case.gradient_checkpointing,
    )


def build_model(
    case: BenchmarkCase, coat: COATTrainer, dtype: str
) -> tuple[FluxTransformer2DModel, list[paddle.Tensor]]:
    """A random model in `dtype` with COAT put in, and its trained parameters, of any shape, float32 if a
    LoRA."""
    paddle.seed(case.seed)
    model = FluxTransformer2DModel(**case.settings)
    if dtype != "float32":
        model.to(dtype=dtype)
    lora = None
    if not case.full_training:
        lora = NetworkConfig(linear=case.rank, linear_alpha=float(case.rank))
    modules = prepare(model, coat, lora, seed=case.seed)
    return model, model.parameters() if case.full_training else list(trained_parameters(modules).values())


def draw_batch(case: BenchmarkCase, rng: np.random.Generator, dtype: str) -> dict[str, paddle.Tensor]:
    """Normal random numbers of `dtype` as a batch: latents [B, 16, 2 rows, 2 columns], prompt_embeds
    [B, text_tokens, 4096], pooled [B, 768]."""
    rows, columns = case.token_grid
    shapes = {
        "latents": (case.batch_size, LATENT_CHANNELS, 2 * rows, 2 * columns),
        "prompt_embeds": (case.batch_size, case.text_tokens, TEXT_WIDTH),
        "pooled": (case.batch_size, POOLED_WIDTH),
    }
    return {
        name: paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
        for name, shape in shapes.items()
    }


class MeasuredProcess(ChildProcess):
    """A `MeasuredTraining` in a process of its own. Context manager, as ChildProcess.

    facts: of model and machine, available in the block. Raises a ConfigError or MemoryError of the process,
    and the errors of ChildProcess.
    """

    def __init__(self, case: BenchmarkCase) -> None:
        super().__init__(serve, case, daemon=True)

    def __enter__(self) -> MeasuredProcess:
        self.facts: dict = self.answer()
        return self

    def steps(self, count: int) -> list[StepRecord]:
        """Let the process take `count` steps -> their records."""
        self.pipe.send(count)
        return self.answer()

    def result(self) -> dict:
        """The memory numbers (`MeasuredTraining.result`); ends the process."""
        self.pipe.send(0)
        return self.answer()


def run_interleaved(
    cases: dict[str, BenchmarkCase], steps: int, on_turn: Callable[[str, int], None]
) -> tuple[dict, dict[str, dict]]:
    """Run all variants, `steps` steps each, in turns -> facts, {variant: memory numbers and "steps"}.

    on_turn(variant, steps taken) is called after each turn. Raises the errors of MeasuredProcess.
    """
    turn = max(1, min(5, steps // 10))
    records: dict[str, list[StepRecord]] = {name: [] for name in cases}
    with ExitStack() as stack:
        # Entering waits for a process, so only one builds its model at a time.
        processes = {name: stack.enter_context(MeasuredProcess(case)) for name, case in cases.items()}
        while any(len(done) < steps for done in records.values()):
            for name, process in processes.items():
                taken = process.steps(min(turn, steps - len(records[name])))
                records[name] += taken
                on_turn(name, len(taken))
        facts = next(iter(processes.values())).facts
        return facts, {name: {**p.result(), "steps": records[name]} for name, p in processes.items()}


def measured_peak(case: BenchmarkCase, budget_bytes: float) -> float:
    """Peak bytes of PROBE_STEPS steps in a new process; infinite if it runs out of memory.

    Raises ConfigError if the machine has less memory than the budget, or does not tell how much.
    """
    try:
        with MeasuredProcess(case) as process:
            _check_budget(budget_bytes, process.facts["environment"]["memory_bytes"])
            process.steps(PROBE_STEPS)
            return process.result()["peak_bytes"]
    except MemoryError:
        return math.inf


def largest_batch(peak_of: Callable[[int], float], budget: float) -> tuple[int, dict[int, float]]:
    """The largest batch with peak_of(batch) <= budget (0 if there is none), and all measured peaks.

    The line through two measured peaks predicts the largest batch that fits, which is measured next. The
    search ends at a batch that was measured to fit, when the next one does not fit by measurement or
    prediction.
    """
    peaks = {batch: peak_of(batch) for batch in (1, 2)}
    while True:
        fitting = [batch for batch, peak in peaks.items() if peak <= budget]
        if not fitting:
            return 0, peaks
        best = max(fitting)
        too_large = min((batch for batch in peaks if batch > best), default=math.inf)
        # A batch that ran out of memory has no peak for the line: halve the distance to it.
        limit = (best + too_large) // 2 if peaks.get(too_large) == math.inf else too_large - 1
        guess = int(min(_meets(peaks, budget), GROWTH * best, limit))
        if guess <= best:
            return best, peaks
        peaks[guess] = peak_of(guess)


def _meets(peaks: dict[int, float], budget: float) -> float:
    """Largest batch within the budget by the line through the two largest measured batches; infinite if the
    line does not rise.
    """
    points = sorted((batch, peak) for batch, peak in peaks.items() if math.isfinite(peak))[-2:]
    if len(points) < 2 or points[1][1] <= points[0][1]:
        return math.inf
    (x0, y0), (x1, y1) = points
    return math.floor(x1 + (budget - y1) * (x1 - x0) / (y1 - y0))


def _check_budget(budget: float, total: int | None) -> None:
    if total is None:
        raise ConfigError("memory_budget_gb: this system does not tell the memory of a process; leave it out")
    if budget > total:
        raise ConfigError(
            f"memory_budget_gb: came {budget / 1e9:g}, but this device has {total / 1e9:.1f} GB; give less"
        )
