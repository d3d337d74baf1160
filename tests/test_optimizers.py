"""Prodigy, schedule-free AdamW, Lion, Adafactor and AdamW against the trajectories of their authors' packages;
states in FP8, their memory, skipped steps, files.

fixtures/optimizers/refs.npz: torch 2.13, prodigyopt 1.1.2, schedulefree 1.4.1, lion-pytorch 0.2.5 and
transformers 5.24 in float32 on given gradients; its README gives the tolerances.
"""

from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.optim import (
    Adafactor,
    AdafactorSettings,
    FlatSettings,
    FP8AdamW,
    FP8QuantizationConfig,
    Lion,
    Prodigy,
    ProdigySettings,
    ScheduleFreeAdamW,
    ScheduleFreeSettings,
)

REFS = dict(np.load(Path(__file__).parent / "fixtures" / "optimizers" / "refs.npz"))
FLOAT32 = FP8QuantizationConfig(use_fp8_m1=False, use_fp8_m2=False, block_size=16)
FP8 = FP8QuantizationConfig(block_size=16)
NAMES = ("p0", "p1", "p2")


def settings(decay: float = 0.0, **changes) -> FlatSettings:
    return FlatSettings(**({"weight_decay": decay, "fp8_config": FLOAT32} | changes))


def prodigy(decay=0.0, **rule):
    return lambda params, **more: Prodigy(1.0, params, ProdigySettings(**rule), settings(decay, **more))


def schedule_free(lr, decay=0.0, **rule):
    return lambda params, **more: ScheduleFreeAdamW(
        lr, params, ScheduleFreeSettings(**rule), settings(decay, **more)
    )


def lion(betas=(0.9, 0.99), decay=0.0):
    return lambda params, **more: Lion(1e-3, params, betas, settings(decay, **more))


def adafactor(decay=0.0, **rule):
    return lambda params, **more: Adafactor(1e-3, params, AdafactorSettings(**rule), settings(decay, **more))


def adamw(params, fp8_config=FLOAT32, grad_clip=None):
    return FP8AdamW(1e-3, params, epsilon=1e-6, fp8_config=fp8_config, grad_clip=grad_clip)


# name of the trajectory -> how it is made, tolerance relative to the largest entry of a tensor's trajectory
RUNS = {
    "prodigy": (prodigy(), 5e-4),
    "prodigy_growth": (prodigy(growth_rate=1.2, slice_p=3), 5e-4),
    "prodigy_big_d0": (prodigy(0.01, d0=1e-3, epsilon=1e-6), 2e-5),
    "prodigy_bias_safeguard": (
        prodigy(0.01, d0=1e-4, beta2=0.99, use_bias_correction=True, safeguard_warmup=True, d_coef=2.0,
                growth_rate=1.5),
        2e-5,
    ),
    "schedulefree": (schedule_free(2.5e-3), 2e-6),
    "schedulefree_warmup": (schedule_free(1e-2, 0.05, warmup_steps=6, beta1=0.95, beta2=0.99, r=0.5), 2e-6),
    "lion": (lion(), 2e-6),
    "lion_decay": (lion((0.95, 0.98), 0.1), 2e-6),
    "adafactor": (adafactor(), 1e-5),
    "adafactor_relative": (adafactor(relative_step=True, scale_parameter=True, warmup_init=True), 1e-5),
    "adafactor_momentum": (adafactor(0.05, scale_parameter=True, beta1=0.9, clip_threshold=0.8), 1e-5),
    "adamw": (adamw, 3e-6),  # its powers of beta are float32, as Paddle's
}  # fmt: skip
KINDS = (
    "prodigy",
    "prodigy_growth",
    "schedulefree_warmup",
    "lion",
    "adafactor_momentum",
    "adafactor",
    "adamw",
)


def start() -> list[paddle.Tensor]:
    params = [paddle.to_tensor(REFS[f"{name}/start"]) for name in NAMES]
    for param in params:
        param.stop_gradient = False
    return params


def set_grads(params: list[paddle.Tensor], step: int) -> None:
    for name, param in zip(NAMES, params, strict=True):
        param.grad = paddle.to_tensor(REFS[f"{name}/grads"][step])


def bits(optimizer, params) -> dict[str, bytes]:
    state = {name: tensor.numpy().tobytes() for name, tensor in optimizer.state_dict().items()}
    return state | {str(i): param.numpy().tobytes() for i, param in enumerate(params)}


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_that_of_the_authors_package(name):
    make, tolerance = RUNS[name]
    params = start()
    optimizer = make(params)
    after = {path: [] for path in NAMES}
    for step in range(20):
        if f"{name}/lr" in REFS:
            optimizer.set_lr(float(REFS[f"{name}/lr"][step]))
        set_grads(params, step)
        optimizer.step()
        for path, param in zip(NAMES, params, strict=True):
            after[path].append(param.numpy().copy())
        numbers = optimizer.state_dict()
        for own, theirs in (("d", "d"), ("d_max", "d_max"), ("weight_sum", "weight_sum")):
            if f"{name}/{theirs}" in REFS:
                got, want = float(numbers[f"numbers.{own}"]), float(REFS[f"{name}/{theirs}"][step])
                assert got == pytest.approx(want, rel=tolerance)
        if isinstance(optimizer, ScheduleFreeAdamW):
            before = [param.numpy().copy() for param in params]
            with optimizer.evaluation_weights():
                for path, param in zip(NAMES, params, strict=True):
                    want = REFS[f"{name}/{path}/after_eval"]
                    np.testing.assert_allclose(
                        param.numpy(), want[step], rtol=0, atol=5e-6 * np.abs(want).max()
                    )
            assert all((a == b.numpy()).all() for a, b in zip(before, params, strict=True))
    for path in NAMES:
        want = REFS[f"{name}/{path}/after"]
        np.testing.assert_allclose(np.stack(after[path]), want, rtol=0, atol=tolerance * np.abs(want).max())
