"""Prodigy, schedule-free AdamW, Lion, Adafactor and AdamW against trajectories of their authors' packages,
and their states: in FP8, in bytes, after a skipped step, in files.

fixtures/optimizers/refs.npz: torch 2.13, prodigyopt 1.1.2, schedulefree 1.4.1, lion-pytorch 0.2.5 and
transformers 5.24 in float32 on given gradients; its README gives the tolerances.
"""

from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.fp8 import flat
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
    "adamw": (adamw, 2e-6),
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


@pytest.mark.parametrize("config", [FLOAT32, FP8], ids=["float32", "fp8"])
@pytest.mark.parametrize("name", KINDS)
def test_a_skipped_step_leaves_every_bit_and_a_resumed_run_equals_an_uninterrupted_one(name, config):
    """Nine steps, the fourth with a NaN; saved after the fifth into an optimizer that was just made."""
    make, _ = RUNS[name]
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)

    def train(optimizer, params, steps):
        for step in steps:
            set_grads(params, step)
            if step == 3:
                before = bits(optimizer, params)
                params[1].grad = paddle.full(params[1].shape, float("nan"))
            optimizer.step()
            if step == 3:
                after = bits(optimizer, params)
                changed = {key for key in before if before[key] != after[key]}
                assert changed == {"count.skipped"} and optimizer.skipped_steps == 1

    params = start()
    whole = make(params, fp8_config=config, grad_clip=clip)
    train(whole, params, range(9))
    first = start()
    stopped = make(first, fp8_config=config, grad_clip=clip)
    train(stopped, first, range(5))
    second = [paddle.zeros(param.shape) for param in first]
    for param in second:
        param.stop_gradient = False
    resumed = make(second, fp8_config=config, grad_clip=clip)
    with paddle.no_grad():
        for param, value in zip(second, first, strict=True):
            paddle.assign(value, output=param)
    resumed.set_state_dict({key: tensor.clone() for key, tensor in stopped.state_dict().items()})
    train(resumed, second, range(5, 9))
    assert bits(resumed, second) == bits(whole, params)


@pytest.mark.parametrize(
    "name", ["prodigy", "prodigy_growth", "schedulefree_warmup", "lion", "adafactor_momentum"]
)
def test_a_step_in_pieces_equals_a_step_at_once(name, monkeypatch):
    """Sums over all parameters (Prodigy's) are added in another order; all else has the same bits."""

    def trained():
        rng = np.random.default_rng(0)
        params = [
            paddle.to_tensor(rng.standard_normal(s).astype("float32")) for s in ([90, 16], [7], [40, 50])
        ]
        for param in params:
            param.stop_gradient = False
        optimizer = RUNS[name][0](params, fp8_config=FP8)
        for _ in range(4):
            for param in params:
                param.grad = paddle.to_tensor(rng.standard_normal(param.shape).astype("float32"))
            optimizer.step()
        return [param.numpy() for param in params]

    at_once = trained()
    monkeypatch.setattr(flat, "PIECE", 32 * 16)
    for piecewise, whole in zip(trained(), at_once, strict=True):
        np.testing.assert_allclose(piecewise, whole, rtol=0, atol=1e-6 if "prodigy" in name else 0)


# Error of 20 steps' movement with FP8 states against float32 states, root mean square over the parameters:
# what was measured, with room; one bad codec and it is several times as much.
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("prodigy_big_d0", 0.03),
        ("schedulefree", 0.01),
        ("lion", 0.1),
        ("adafactor_momentum", 0.03),
        ("adamw", 0.01),
    ],
)
def test_movement_with_fp8_states_is_close_to_float32_states(name, most):
    moved = []
    for config in (FLOAT32, FP8):
        params = start()
        before = np.concatenate([param.numpy().ravel() for param in params])
        optimizer = RUNS[name][0](params, fp8_config=config)
        for step in range(20):
            set_grads(params, step)
            optimizer.step()
        moved.append(np.concatenate([param.numpy().ravel() for param in params]) - before)
    error = np.sqrt(np.mean((moved[1] - moved[0]) ** 2) / np.mean(moved[0] ** 2))
    print(name, error)
    assert 0 < error < most


def test_wrong_settings_are_one_line():
    for wrong, said in (
        (lambda: ProdigySettings(growth_rate=0.5), "growth_rate above 1"),
        (lambda: ProdigySettings(slice_p=0), "slice_p must be 1 or more, got 0"),
        (lambda: ScheduleFreeSettings(beta1=0), "beta1 must be above 0"),
        (lambda: AdafactorSettings(warmup_init=True), "warmup_init needs relative_step"),
        (lambda: AdafactorSettings(decay_rate=0.8), "decay_rate must be below 0"),
        (lambda: Lion(1e-4, start(), (0.9, 1.0)), r"beta2 must be a number in \[0, 1\), got 1.0"),
        (
            lambda: prodigy(slice_p=2)(start(), grad_clip=paddle.nn.ClipGradByNorm(1.0)),
            "slice_p takes gradients clipped by their global norm",
        ),
        (lambda: lion()(start()).set_state_dict(prodigy()(start()).state_dict()), "saved Prodigy"),
    ):
        with pytest.raises(ConfigError, match=said):
            wrong()


@pytest.mark.parametrize("config", [FLOAT32, FP8], ids=["float32", "fp8"])
@pytest.mark.parametrize(
    "name", ["prodigy", "prodigy_growth", "schedulefree", "lion", "adafactor_momentum", "adafactor"]
)
def test_state_bytes_are_those_that_are_planned(name, config):
    params = start()
    optimizer = RUNS[name][0](params, fp8_config=config)
    planned = type(optimizer).planned_bytes(
        [p.shape for p in params], config, getattr(optimizer, "rule", None)
    )
    assert optimizer.state_bytes() == planned > 0


def test_states_of_low_precision_parameters_are_those_of_their_master_copy():
    """bfloat16 parameters follow a float32 copy: after 5 steps it equals float32 training on the same
    gradients, and the average that is shown is the rounded one."""
    for name in ("prodigy_big_d0", "schedulefree", "lion", "adafactor_momentum"):
        values = {}
        for dtype in ("float32", "bfloat16"):
            params = [p.detach().astype("bfloat16").astype(dtype) for p in start()]
            for param in params:
                param.stop_gradient = False
            optimizer = RUNS[name][0](params, fp8_config=FP8)
            for step in range(5):
                for path, param in zip(NAMES, params, strict=True):
                    grad = paddle.to_tensor(REFS[f"{path}/grads"][step]).astype("bfloat16")
                    param.grad = grad.astype(dtype)
                optimizer.step()
            values[dtype] = optimizer.space.values().numpy()
            if isinstance(optimizer, ScheduleFreeAdamW):
                before = [param.astype("float32").numpy() for param in params]
                with optimizer.evaluation_weights():
                    shown = [param.astype("float32").numpy() for param in params]
                assert all((a != b).any() for a, b in zip(before, shown, strict=True))
                after = [param.astype("float32").numpy() for param in params]
                assert all((a == b).all() for a, b in zip(before, after, strict=True))
        np.testing.assert_allclose(values["bfloat16"], values["float32"], rtol=1e-6)


def test_powers_of_beta_of_an_older_checkpoint_may_be_float32():
    params, others = start(), start()
    optimizer, resumed = adamw(params), adamw(others)
    set_grads(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    older = {
        name: each.astype("float32") if name.startswith("beta_powers") else each
        for name, each in state.items()
    }
    resumed.set_state_dict(older)
    for name, tensor in resumed.state_dict().items():
        assert tensor.dtype == state[name].dtype
        np.testing.assert_allclose(tensor.numpy(), state[name].numpy(), rtol=1e-7)
