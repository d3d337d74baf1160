"""Errors that FP8 causes: in stored Adam moments (our codec, the published COAT rule and three others), and
in what each optimizer does with its states in FP8. Beside it `accuracy weights` and `accuracy bases`, which
are in base_quality.py.

    sets of gradients (random, and recorded from a LoRA training)  ->  AdamW's moments in float64  ->
    the same moments stored by each codec: once at the end, and after every step  ->  relative RMS errors

The update is m / (sqrt(v) + 1e-8). The second table lets every optimizer take the same gradients
twice, once with states in FP8 and once in float32, and compares the last step and the whole way. Errors are
relative RMS errors, see `relative_rms`. All seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ppcoat.atomic import write_text
from ppcoat.bench.base_quality import run_bases, run_weights
from ppcoat.bench.flags import AccuracyFlags, BaseFlags, WeightFlags
from ppcoat.bench.published import PUBLISHED
from ppcoat.config.flags import from_flags
from ppcoat.data import garments
from ppcoat.device import tune_host
from ppcoat.fp8.adamw import decode_moments, dither, encode_moments
from ppcoat.optim import (
    Adafactor,
    AdafactorSettings,
    FlatSettings,
    FP8AdamW,
    FP8QuantizationConfig,
    Lion,
    Prodigy,
    ScheduleFreeAdamW,
)

GROUPS, BLOCK, STEPS = 96, 128, 200
RECORDED_STEPS, RECORDED_BATCH, PICTURES = 20, 4, 12
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
SIZE = 1e-3  # of a typical random gradient
OURS = "ours"

WAY = 40  # steps of the table of optimizers
OPTIMIZERS = {  # of parameters and FlatSettings
    "adamw": lambda params, settings: FP8AdamW(
        1e-3, params, fp8_config=settings.fp8_config, weight_decay=0.0
    ),
    "prodigy": lambda params, settings: Prodigy(1.0, params, settings=settings),
    "schedulefree": lambda params, settings: ScheduleFreeAdamW(1e-3, params, settings=settings),
    "lion": lambda params, settings: Lion(1e-3, params, settings=settings),
    "adafactor": lambda params, settings: Adafactor(
        1e-3, params, AdafactorSettings(beta1=0.9), settings=settings
    ),
}

Pair = tuple[np.ndarray, np.ndarray]
Store = Callable[[np.ndarray, np.ndarray, int | None], Pair]  # (m, v, step or None) -> decoded m and v
OTHERS: dict[str, tuple[type, Callable[..., None]]] = {
    "weights": (WeightFlags, run_weights),
    "bases": (BaseFlags, run_bases),
}


@dataclass(frozen=True)
class MomentErrors:
    """Relative RMS errors of the first moment, the second and the update."""

    m: float
    v: float
    update: float


def run_command(arguments: argparse.Namespace) -> None:
    if arguments.other:
        settings, command = OTHERS[arguments.other]
        command(from_flags(settings, arguments))
        return
    flags = from_flags(AccuracyFlags, arguments)
    tune_host()
    sets = {**drawn_sets(), "recorded": recorded_gradients()}
    results = {name: compare(gradients) for name, gradients in sets.items()}
    print(moment_table(results))
    ways = {name: optimizer_errors(gradients[:WAY]) for name, gradients in sets.items()}
    print(f"\n{optimizer_table(ways)}")
    if flags.output:
        content = _as_json(results) | {"optimizers": ways}
        write_text(flags.output, json.dumps(content, indent=2) + "\n")
        print(f"\nwritten: {flags.output}")


def drawn_sets(groups: int = GROUPS, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Name -> gradients float32 [steps, groups, BLOCK].

    log-normal: each element has a scale exp(sigma z) that is the same in all steps. heavy tails: Student's t
    with 3 degrees of freedom. block-sparse: in each step one of ten blocks of 16 elements has gradients, the
    others are zero.
    """
    shape, sets = (steps, groups, BLOCK), {}
    for sigma in (0.25, 1.0, 2.0):
        rng = np.random.default_rng([1, int(100 * sigma)])
        scale = np.exp(sigma * rng.standard_normal(shape[1:]))
        sets[f"log-normal {sigma:g}"] = scale * rng.standard_normal(shape)
    rng = np.random.default_rng(2)
    sets["heavy tails"] = rng.standard_t(3, shape)
    active = np.repeat(rng.random((steps, groups, BLOCK // 16)) < 0.1, 16, axis=-1)
    sets["block-sparse"] = active * rng.standard_normal(shape)
    return {name: (SIZE * gradients).astype(np.float32) for name, gradients in sets.items()}


def recorded_gradients(
    steps: int = RECORDED_STEPS, batch_size: int = RECORDED_BATCH, groups: int = 4 * GROUPS
) -> np.ndarray:
    """Gradients of a LoRA training of the built-in tiny FLUX on drawn garments: float32 [steps, groups,
    BLOCK].

    Each parameter starts a new group, as in the optimizer. `groups` evenly spaced ones of all groups are
    used.
    """
    from ppcoat.config.load import load_config
    from ppcoat.data.examples import all_examples, scan_datasets
    from ppcoat.models.flux.pipeline import FluxPipeline
    from ppcoat.train.flux import FluxSpec
    from ppcoat.train.run import build_trainer, encode_dataset

    from .flags import CONFIG
    from .quickstart import DATA_SEED, MOTIF

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        changes = [f"output_dir={folder}", f"datasets.0.folder_path={data}"]
        changes += [f"train.steps={steps}", "train.lr_warmup_steps=0", f"train.batch_size={batch_size}"]
        changes += ["coat.enabled=false", "sample.prompts=[]"]
        config = load_config(str(CONFIG), changes)
        garments.write_folder(data, PICTURES, DATA_SEED, config.data.resolution, MOTIF, "[trigger] ")
        pipeline = FluxPipeline.from_pretrained(config.model.name_or_path, **config.model.beside)
        examples = all_examples(scan_datasets(config))
        spec = FluxSpec()
        cache = encode_dataset(spec, config, examples, pipeline)
        trainer = build_trainer(spec, config, pipeline, cache)
        return np.stack([_gradients_of_a_step(trainer, groups) for _ in range(steps)])


def compare(gradients: np.ndarray) -> dict[str, tuple[MomentErrors, MomentErrors]]:
    """Gradients float32 [steps, groups, BLOCK] -> {codec: (errors if only the last moments are stored, errors
    if they are stored at every step)}."""
    exact = moments(gradients.astype(np.float64), lambda m, v, step: (m, v))
    results = {}
    for name, store in codecs().items():
        with np.errstate(over="ignore", invalid="ignore"):
            once = store(exact[0].astype(np.float32), exact[1].astype(np.float32), None)
            results[name] = (moment_errors(once, exact), moment_errors(moments(gradients, store), exact))
    return results


def optimizer_errors(gradients: np.ndarray) -> dict[str, tuple[float, float]]:
    """Gradients float32 [steps, groups, BLOCK] -> {optimizer: relative RMS errors that FP8 states cause, of
    the last step and of the whole way}, over the groups."""
    ways = {}
    for name in OPTIMIZERS:
        exact, stored = (_way(name, gradients, fp8) for fp8 in (False, True))
        ways[name] = tuple(relative_rms(b, a) for a, b in zip(exact, stored, strict=True))
    return ways


def _way(name: str, gradients: np.ndarray, fp8: bool) -> tuple[np.ndarray, np.ndarray]:
    """What an optimizer does in its last step, and in all [groups, BLOCK]."""
    start = np.random.default_rng(3).standard_normal(gradients.shape[1:]).astype(np.float32)
    param = paddle.to_tensor(0.02 * start)
    param.stop_gradient = False
    states = FP8QuantizationConfig(use_fp8_m1=fp8, use_fp8_m2=fp8, block_size=BLOCK)
    optimizer, values = OPTIMIZERS[name]([param], FlatSettings(0.0, fp8_config=states)), []
    for gradient in gradients:
        values = [*values[-1:], param.numpy().astype(np.float64)]
        param.grad = paddle.to_tensor(gradient)
        optimizer.step()
    last = param.numpy().astype(np.float64)
    return last - values[-1], last - 0.02 * start


def optimizer_table(ways: dict[str, dict[str, tuple[float, float]]]) -> str:
    """One row for each set of gradients: errors of the last step and of the whole way of each optimizer."""
    names = list(OPTIMIZERS)
    lines = [
        f"relative RMS errors that FP8 states cause, against float32 states; at most {WAY} steps",
        f"{'':17s}{'last step':^{14 * len(names)}s} |{'whole way':^{14 * len(names)}s}",
        f"{'gradients':17s}" + " |".join("".join(f"{name:>14s}" for name in names) for _ in range(2)),
    ]
    for set_name, errors in ways.items():
        halves = ("".join(f"{errors[name][half]:14.4f}" for name in names) for half in range(2))
        lines.append(f"{set_name:17s}" + " |".join(halves))
    return "\n".join(lines)


def moments(gradients: np.ndarray, store: Store) -> Pair:
    """AdamW's moments [groups, BLOCK] after all steps, in the dtype of the gradients [steps, groups, BLOCK];
    `store` is applied after each step."""
    m = v = np.zeros(gradients.shape[1:], dtype=gradients.dtype)
    beta1, beta2 = gradients.dtype.type(BETA1), gradients.dtype.type(BETA2)
    for step, g in enumerate(gradients):
        m, v = store(beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g, step)
    return m, v


def codecs() -> dict[str, Store]:
    """All codecs by name; ours is the last."""

    def published(first: Callable, second: Callable) -> Store:
        return lambda m, v, step: (first(m), second(v))

    stores = {name: published(*pair) for name, pair in PUBLISHED.items()}
    return {**stores, OURS: store_as_ours}


def store_as_ours(
    m: np.ndarray, v: np.ndarray, step: int | None, config: FP8QuantizationConfig | None = None
) -> Pair:
    """m and v, both [groups, BLOCK], as FP8AdamW stores and decodes them. step: seeds the dither; None: round
    to nearest."""
    pair = (config or FP8QuantizationConfig()).codecs()
    offset = 0.5 if step is None else dither(paddle.to_tensor([step]), m.shape[-1])
    states = encode_moments(paddle.to_tensor(m), paddle.to_tensor(v), pair, offset)
    first, second = decode_moments(states, pair)
    return first.numpy(), second.numpy()


def moment_errors(stored: Pair, exact: Pair) -> MomentErrors:
    """Relative RMS errors of stored (m, v) against exact ones, all [groups, BLOCK]."""
    stored = tuple(part.astype(np.float64) for part in stored)
    updates = [m / (np.sqrt(v) + EPSILON) for m, v in (stored, exact)]
    pairs = ((stored[0], exact[0]), (stored[1], exact[1]), updates)
    return MomentErrors(*(relative_rms(a, b) for a, b in pairs))


def relative_rms(stored: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square over the groups of (RMS error of a group / RMS of its values); groups of zeros are
    left out. Both arrays [groups, BLOCK].

    It is relative to each group, because otherwise the groups of the largest scale would decide alone.
    """
    power = np.mean(exact**2, axis=-1)
    ratio = np.mean((stored - exact) ** 2, axis=-1)[power > 0] / power[power > 0]
    return float(np.sqrt(np.mean(ratio)))


def moment_table(results: dict[str, dict[str, tuple[MomentErrors, MomentErrors]]]) -> str:
    """One row for each set and quantity; left the codecs if stored once, right if stored at every step."""
    names = list(next(iter(results.values())))
    heads = [*names, "/COAT"]
    lines = [
        "relative RMS errors of Adam's moments in 8 bits, groups of 128",
        f"{'':25s}{'stored once':^{9 * len(heads)}s} |{'stored at every step':^{9 * len(heads)}s}",
        f"{'gradients':17s}{'of':8s}" + " |".join("".join(f"{h:>9s}" for h in heads) for _ in range(2)),
    ]
    for set_name, by_codec in results.items():
        for quantity in ("m", "v", "update"):
            halves = []
            for half in range(2):
                values = [getattr(by_codec[name][half], quantity) for name in names]
                values.append(values[names.index(OURS)] / values[names.index("COAT")])
                halves.append("".join(f"{value:9.2g}" if value > 10 else f"{value:9.4f}" for value in values))
            lines.append(f"{set_name if quantity == 'm' else '':17s}{quantity:8s}" + " |".join(halves))
    return "\n".join(lines)


def _as_json(results: dict[str, dict[str, tuple[MomentErrors, MomentErrors]]]) -> dict:
    """The numbers of the table as JSON values."""
    return {
        "group_size": BLOCK,
        "betas": [BETA1, BETA2],
        "epsilon": EPSILON,
        "sets": {
            set_name: {
                codec: {"stored_once": vars(once), "stored_at_every_step": vars(often)}
                for codec, (once, often) in by_codec.items()
            }
            for set_name, by_codec in results.items()
        },
    }


def _gradients_of_a_step(trainer: object, groups: int) -> np.ndarray:
    """One training step -> its gradients [groups, BLOCK] float32."""
    rows: dict[str, np.ndarray] = {}

    def note(name: str) -> Callable[[paddle.Tensor], None]:
        def hook(gradient: paddle.Tensor) -> None:
            flat = gradient.numpy().astype(np.float32).reshape(-1)
            rows[name] = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)

        return hook

    hooks = [parameter.register_hook(note(name)) for name, parameter in trainer.side.parameters.items()]
    trainer.train_step()
    for hook in hooks:
        hook.remove()
    everything = np.concatenate([rows[name] for name in trainer.side.parameters])
    chosen = np.linspace(0, len(everything) - 1, min(groups, len(everything))).astype(int)
    return everything[chosen]
