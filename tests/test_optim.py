"""FP8AdamW against paddle.optimizer.AdamW, its memory, its faults and its files."""

import gc
import math

import numpy as np
import paddle
import pytest
from safetensors.paddle import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.fp8 import flat
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig, ScheduleShape, adamw, lr_scheduler

FLOAT32 = FP8QuantizationConfig(use_fp8_m1=False, use_fp8_m2=False)
SHAPES = [[40, 16], [16, 33], [1], [130], [128]]


def parameters(seed: int, shapes: list[list[int]] = SHAPES, dtype: str = "float32") -> list[paddle.Tensor]:
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    tensors = [paddle.to_tensor(value).astype(dtype) for value in values]
    for tensor in tensors:
        tensor.stop_gradient = False
    return tensors


def set_grads(params: list[paddle.Tensor], rng: np.random.Generator, scale: float = 1.0) -> None:
    for param in params:
        grad = paddle.to_tensor((scale * rng.standard_normal(param.shape)).astype("float32"))
        param.grad = grad.astype(param.dtype)


def run(
    optimizer: paddle.optimizer.Optimizer, params: list[paddle.Tensor], steps: int, seed: int = 7
) -> None:
    rng = np.random.default_rng(seed)
    for step in range(steps):
        set_grads(params, rng, scale=10.0 ** (step % 3 - 1))
        optimizer.step()
        optimizer.clear_grad()
        if isinstance(optimizer._learning_rate, paddle.optimizer.lr.LRScheduler):
            optimizer._learning_rate.step()


def bits(state: dict[str, paddle.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize(
    "clip",
    [
        None,
        paddle.nn.ClipGradByGlobalNorm(1.0),
        paddle.nn.ClipGradByNorm(0.5),
        paddle.nn.ClipGradByValue(0.1),
    ],
)
def test_equals_paddle_adamw_with_float32_moments(clip):
    ours, theirs = parameters(0), parameters(0)
    settings = {"weight_decay": 0.1, "grad_clip": clip, "epsilon": 1e-6}
    run(FP8AdamW(lr_scheduler("cosine", 1e-2, 20, 4), ours, fp8_config=FLOAT32, **settings), ours, 20)
    run(
        paddle.optimizer.AdamW(lr_scheduler("cosine", 1e-2, 20, 4), parameters=theirs, **settings), theirs, 20
    )
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.numpy(), reference.numpy(), rtol=0, atol=1e-6)


def test_beta1_zero_stores_no_first_moment_and_equals_paddle():
    ours, theirs = parameters(1), parameters(1)
    optimizer = FP8AdamW(1e-2, ours, beta1=0.0, fp8_config=FLOAT32)
    run(optimizer, ours, 5)
    run(paddle.optimizer.AdamW(1e-2, beta1=0.0, parameters=theirs), theirs, 5)
    np.testing.assert_allclose(ours[0].numpy(), theirs[0].numpy(), rtol=0, atol=1e-6)
    assert not any(name.startswith("m1.") for name in optimizer.state_dict())


def test_parameter_groups_scale_rate_and_decay():
    ours, theirs = parameters(2), parameters(2)

    def groups(params):
        return [
            {"params": params[:2], "learning_rate": 0.1, "weight_decay": 0.0},
            {"params": params[2:], "weight_decay": 0.3},
        ]

    run(FP8AdamW(1e-2, groups(ours), fp8_config=FLOAT32), ours, 5)
    slow, fast = theirs[:2], theirs[2:]
    run(paddle.optimizer.AdamW(1e-3, parameters=slow, weight_decay=0.0), [*slow, *fast], 5)
    run(paddle.optimizer.AdamW(1e-2, parameters=fast, weight_decay=0.3), [*slow, *fast], 5)
    # Paddle keeps powers of beta in float32
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.numpy(), reference.numpy(), rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def regression():
    """(make of an optimizer -> the loss after 150 steps, AdamW's loss)"""
    rng = np.random.default_rng(3)
    x = paddle.to_tensor(rng.standard_normal([64, 20]).astype("float32"))
    y = x @ paddle.to_tensor(rng.standard_normal([20, 8]).astype("float32"))

    def final_loss(make) -> float:
        weight = paddle.zeros([20, 8])
        weight.stop_gradient = False
        optimizer = make([weight])
        for _ in range(150):
            loss = paddle.square(x @ weight - y).mean()
            loss.backward()
            optimizer.minimize(loss)
            optimizer.clear_grad()
        return float(loss)

    return final_loss, final_loss(lambda params: paddle.optimizer.AdamW(3e-2, parameters=params))


@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e5m2"), ("e4m3", "e5m2")])
@pytest.mark.parametrize("expand", [True, False])
def test_fp8_moments_reach_the_same_regression_loss(regression, formats, expand):
    final_loss, exact = regression
    config = FP8QuantizationConfig(
        m1_format=formats[0], m2_format=formats[1], use_dynamic_range_expansion=expand
    )
    assert final_loss(lambda params: FP8AdamW(3e-2, params, fp8_config=config)) < 1.5 * exact


def test_state_bytes_are_2_08_per_parameter_and_8_in_float32():
    params = parameters(4, [[512, 16], [16, 512]])
    count = sum(param.size for param in params)
    assert FP8AdamW(parameters=params).state_bytes() / count == pytest.approx(2 + 2 * 5 / 128)
    assert FP8AdamW(parameters=params, fp8_config=FLOAT32).state_bytes() / count == 8


# A FLUX-Lightning discriminator: 57 heads of 2 x (1x1 convolution 3072 -> 3072, GroupNorm), convolution to 1.
HEAD = [[3072, 3072, 1, 1], [3072], [3072], [3072]] * 2 + [[1, 3072, 1, 1], [1]]


@pytest.mark.parametrize("formats", [("e4m3", "e4m3"), ("e5m2", "e5m2")])
def test_state_bytes_of_1_08_billion_parameters_by_their_shapes(formats):
    config = FP8QuantizationConfig(m1_format=formats[0], m2_format=formats[1])
    count = 57 * sum(math.prod(shape) for shape in HEAD)
    assert count == 1_077_064_761
    assert config.state_bytes(57 * HEAD) / count < 2.08
    assert config.state_bytes(57 * HEAD, beta1=0.0) / count < 1.04
    assert FLOAT32.state_bytes(57 * HEAD) / count == pytest.approx(8, abs=1e-4)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize(
    "config",
    [
        FP8QuantizationConfig(),
        FP8QuantizationConfig(block_size=32, m2_format="e5m2"),
        FP8QuantizationConfig(use_dynamic_range_expansion=False),
        FP8QuantizationConfig(use_fp8_m1=False),
        FLOAT32,
    ],
)
def test_state_bytes_by_shapes_are_those_of_the_buffers(config, beta1):
    optimizer = FP8AdamW(parameters=parameters(4), fp8_config=config, beta1=beta1)
    assert config.state_bytes(SHAPES, beta1) == optimizer.state_bytes()


def paddle_calls(params: list[paddle.Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """Operators that reach Paddle's C++ side through `paddle._C_ops` in one step."""
    optimizer = FP8AdamW(parameters=params, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))
    set_grads(params, np.random.default_rng(0))
    optimizer.step()
    calls = []
    with monkeypatch.context() as patch:
        for name in dir(paddle._C_ops):
            operator = getattr(paddle._C_ops, name)
            if name.startswith("_") or not callable(operator):
                continue

            def counted(*args, _operator=operator, _name=name, **kwargs):
                calls.append(_name)
                return _operator(*args, **kwargs)

            patch.setattr(paddle._C_ops, name, counted)
        optimizer.step()
    return len(calls)


def test_number_of_paddle_calls_does_not_grow_with_the_parameters(monkeypatch):
    few = paddle_calls(parameters(5, [[128, 1]] * 4), monkeypatch)
    many = paddle_calls(parameters(5, [[128, 1]] * 988), monkeypatch)
    assert few == many and few > 10


@pytest.mark.parametrize("clip", [paddle.nn.ClipGradByGlobalNorm(1.0), paddle.nn.ClipGradByNorm(0.5), None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [FP8QuantizationConfig(), FLOAT32])
def test_a_step_in_pieces_has_the_bits_of_a_step_at_once(clip, dtype, config, monkeypatch):
    """Parameters that cross pieces, several in a piece, rates that differ, and a step that is skipped."""
    shapes = [[30, 128], [77], [64, 64], [1], [133, 100]]
    shared = {"learning_rate": 1e-2, "grad_clip": clip, "fp8_config": config}
    shared["stochastic_rounding"] = dtype == "bfloat16"

    def trained() -> dict[str, bytes]:
        paddle.seed(5)
        params = parameters(0, shapes, dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "learning_rate": 0.5, "weight_decay": 0.1}]
        optimizer, rng = FP8AdamW(parameters=groups, **shared), np.random.default_rng(1)
        for step in range(4):
            set_grads(params, rng)
            if step == 2:
                params[1].grad = paddle.full([77], math.nan, dtype)
            optimizer.step()
        assert optimizer.skipped_steps == 1
        return bits(optimizer.state_dict() | {str(i): p.astype("float32") for i, p in enumerate(params)})

    at_once = trained()
    monkeypatch.setattr(flat, "PIECE", 32 * 128)
    assert trained() == at_once


def test_memory_of_a_step_is_bounded_as_planned(monkeypatch):
    core = paddle.base.core
    for count in (40_000, 400_000):
        monkeypatch.setattr(flat, "PIECE", 1 << 16)
        monkeypatch.setattr(adamw, "PIECE", 1 << 16)
        params = parameters(0, [[count // 128, 128]])
        optimizer = FP8AdamW(parameters=params, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))
        set_grads(params, np.random.default_rng(0))
        gc.collect()
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        optimizer.step()
        grown = core.host_memory_stat_peak_value("Allocated", 0) - before
        assert grown == pytest.approx(adamw.update_bytes(count, on_gpu=False), rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("config", [FP8QuantizationConfig(), FLOAT32])
def test_bad_gradient_skips_the_step_and_keeps_every_bit(bad, config):
    params = parameters(6)
    optimizer = FP8AdamW(1e-2, params, fp8_config=config, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))
    run(optimizer, params, 3)
    before = bits({**optimizer.state_dict(), **{str(i): p for i, p in enumerate(params)}})
    set_grads(params, np.random.default_rng(0))
    params[1].grad[3, 2] = bad
    optimizer.step()
    after = bits({**optimizer.state_dict(), **{str(i): p for i, p in enumerate(params)}})
    assert optimizer.skipped_steps == 1
    assert {name for name in after if after[name] != before[name]} == {"count.skipped"}


def faulty_gradients() -> dict[str, np.ndarray]:
    """The groups that break the published kernel, by what is wrong with them."""
    rng = np.random.default_rng(8)
    grads = {
        name: rng.standard_normal(128) for name in ("one zero", "element 0 zero", "64 of 128 zero", "outlier")
    }
    grads["one zero"][77] = grads["element 0 zero"][0] = grads["64 of 128 zero"][::2] = 0.0
    grads["outlier"][7] = 1e-12
    return {
        **grads,
        "all zero": np.zeros(128),
        "one element": np.array([-0.3]),
        "constant": np.full(128, -0.7),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", list(faulty_gradients()))
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_faulty_groups_stay_finite_and_close_to_float32_moments(fault, fmt, dtype):
    grad = faulty_gradients()[fault].astype("float32")

    def movement(config) -> np.ndarray:
        params = parameters(9, [[grad.size]], dtype)
        optimizer = FP8AdamW(1e-3, params, weight_decay=0.0, fp8_config=config)
        before = optimizer.space.values().numpy().reshape(-1)
        for _ in range(10):
            params[0].grad = paddle.to_tensor(grad).astype(dtype)
            optimizer.step()
        assert optimizer.skipped_steps == 0
        # float32 values: what low-precision parameters are rounded from
        return (optimizer.space.values().numpy().reshape(-1) - before)[: grad.size]

    want, got = movement(FLOAT32), movement(FP8QuantizationConfig(m1_format=fmt, m2_format=fmt))
    assert np.isfinite(got).all()
    assert (got * grad <= 0).all()  # against the gradient: the sign of m is kept
    assert not got[grad == 0].any()
    assert np.abs(got).max() <= 10 * 1e-3 * 1.1  # no spike anywhere: a step moves by about the rate
    # a lone value far below all others may move slower, never faster
    ordinary = np.abs(grad) > 1e-3
    np.testing.assert_allclose(got[ordinary], want[ordinary], rtol=0.06)


def test_stochastic_rounding_keeps_no_master_and_is_right_on_average():
    """Steps of 1e-4 on weights of 1 are lost to nearest rounding in bfloat16, whose step there is 1 / 128."""

    def train(steps: int, **settings) -> tuple[FP8AdamW, paddle.Tensor]:
        paddle.seed(1)
        weight = paddle.ones([64, 128]).astype("bfloat16")
        weight.stop_gradient = False
        optimizer = FP8AdamW(1e-4, [weight], weight_decay=0.0, **settings)
        for _ in range(steps):
            weight.grad = paddle.full(weight.shape, -2.0).astype("bfloat16")
            optimizer.step()
        return optimizer, weight

    optimizer, weight = train(40, stochastic_rounding=True)
    values = weight.astype("float32").numpy()
    # the mean of 8192 draws, each a multiple of 1 / 128: standard error 0.00005
    assert values.mean() == pytest.approx(1 + 40e-4, abs=0.0003)
    assert len(np.unique(values)) > 1
    assert "master" not in optimizer.state_dict() and optimizer.space.master is None
    with_master, _ = train(1)
    assert with_master.state_dict()["master"].dtype == paddle.float32
    with pytest.raises(ConfigError, match="stochastic_rounding"):
        optimizer.set_state_dict(with_master.state_dict())


def test_a_skipped_step_leaves_stochastically_rounded_parameters_as_they_are():
    params = parameters(6, dtype="bfloat16")
    optimizer = FP8AdamW(1e-2, params, stochastic_rounding=True)
    run(optimizer, params, 3)
    before = bits({str(i): p for i, p in enumerate(params)})
    set_grads(params, np.random.default_rng(0))
    params[1].grad = paddle.full(params[1].shape, float("nan")).astype("bfloat16")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert bits({str(i): p for i, p in enumerate(params)}) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_parameters_are_their_rounded_master(dtype):
    ours, exact = parameters(12, dtype=dtype), parameters(12, dtype=dtype)
    exact = [param.astype("float32").detach() for param in exact]
    for param in exact:
        param.stop_gradient = False
    rng = np.random.default_rng(4)
    first = FP8AdamW(1e-3, ours, fp8_config=FLOAT32)
    second = paddle.optimizer.AdamW(1e-3, parameters=exact)
    for _ in range(20):
        set_grads(ours, rng)
        for param, reference in zip(ours, exact, strict=True):
            reference.grad = param.grad.astype("float32")
        first.step()
        second.step()
    for param, reference in zip(ours, exact, strict=True):
        got, want = param.astype("float32").numpy(), reference.astype(dtype).astype("float32").numpy()
        assert (got == want).mean() > 0.99 and param.dtype == getattr(paddle, dtype)


def test_state_survives_safetensors_and_continues_bit_for_bit(tmp_path):
    through, broken = parameters(10), parameters(10)
    schedule = [lr_scheduler("linear", 1e-2, 20) for _ in range(3)]
    run(one := FP8AdamW(schedule[0], through), through, 5)
    run(first := FP8AdamW(schedule[1], broken), broken, 5)
    save_file(first.state_dict(), tmp_path / "optimizer.safetensors")
    second = FP8AdamW(schedule[2], broken)
    second.set_state_dict(load_file(tmp_path / "optimizer.safetensors"))
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert second.get_lr() == one.get_lr()
    run(one, through, 3, seed=1)
    run(second, broken, 3, seed=1)
    for a, b in zip(through, broken, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize(
    ("config", "shapes", "field"),
    [
        (FP8QuantizationConfig(block_size=64), SHAPES, "block_size"),
        (FP8QuantizationConfig(m1_format="e5m2"), SHAPES, "m1_format"),
        (FP8QuantizationConfig(use_dynamic_range_expansion=False), SHAPES, "m1_format"),
        (FP8QuantizationConfig(use_fp8_m2=False), SHAPES, "m2_format"),
        (FP8QuantizationConfig(), [*SHAPES[:-1], [64, 2]], "shape of parameter 4"),
        (FP8QuantizationConfig(), SHAPES[:-1], "shapes"),
    ],
)
def test_state_of_another_layout_is_refused_by_field(config, shapes, field):
    optimizer = FP8AdamW(parameters=parameters(0, shapes), fp8_config=config)
    with pytest.raises(ConfigError, match=field):
        optimizer.set_state_dict(FP8AdamW(parameters=parameters(0)).state_dict())


def test_parameter_given_new_memory_after_construction_is_still_trained():
    params, theirs = parameters(11), parameters(11)
    optimizer = FP8AdamW(1e-2, params, fp8_config=FLOAT32)
    paddle.ones(SHAPES[0])._share_buffer_to(params[0])
    paddle.assign(paddle.ones(SHAPES[0]), output=theirs[0])
    run(optimizer, params, 3)
    run(paddle.optimizer.AdamW(1e-2, parameters=theirs), theirs, 3)
    np.testing.assert_allclose(params[0].numpy(), theirs[0].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parameters": []}, "parameters"),
        ({"parameters": [paddle.ones([2], dtype="float64")]}, "float64"),
        ({"parameters": [paddle.ones([2], dtype="int32")]}, "int32"),
        ({"parameters": [paddle.ones([2])]}, "frozen"),
        ({"beta1": 1.0}, "beta1"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"parameters": None}, "parameters"),
        ({"parameters": [{"params": None, "lr": 1}]}, "lr"),
        ({"grad_clip": 1.0}, "grad_clip.*float"),
        ({"fp8_config": {"use_fp8_m1": True}}, "fp8_config: came a dict, wanted FP8QuantizationConfig"),
        ({"stochastic_rounding": True}, "bfloat16"),
        ({"stochastic_rounding": "yes"}, "'yes'"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        FP8AdamW(**{"parameters": parameters(0), **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"m1_format": "e3m4"}, "e3m4"),
        ({"block_size": 100}, "100"),
        ({"block_size": True}, "block_size"),
        ({"block_size": 0}, "16.*0"),
        ({"block_size": 128.0}, "128.0"),
        ({"m2_format": None}, "None"),
        ({"use_dynamic_range_expansion": 1}, "use_dynamic_range_expansion"),
        ({"use_fp8_m1": "false"}, "use_fp8_m1"),
    ],
)
def test_wrong_quantization_config_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        FP8QuantizationConfig(**settings)


def test_step_without_any_gradient_does_nothing_and_with_some_names_the_one_missing():
    params = parameters(0)
    optimizer = FP8AdamW(parameters=params)
    optimizer.step()
    assert int(optimizer.state_dict()["count.steps"]) == 0
    set_grads(params[1:], np.random.default_rng(0))
    with pytest.raises(ConfigError, match=params[0].name):
        optimizer.step()


def test_schedules_follow_their_published_formulas():
    def rates(name, warmup):
        schedule = lr_scheduler(name, 2.0, 10, warmup)
        values = []
        for _ in range(11):
            values.append(schedule())
            schedule.step()
        return values

    assert rates("constant", 0) == [2.0] * 11
    assert rates("constant_with_warmup", 4)[:6] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("linear", 2)[2::4] == [2.0, 1.0, 0.0]
    assert rates("cosine", 0)[5] == pytest.approx(1.0) and rates("cosine", 0)[10] == pytest.approx(0.0)
    assert rates("cosine", 0)[2] == pytest.approx(1 + math.cos(0.2 * math.pi))
    with pytest.raises(ConfigError, match="cosin"):
        lr_scheduler("cosin", 1.0, 10, 0)
    with pytest.raises(ConfigError, match="constant_with_warmup"):
        lr_scheduler("constant", 1.0, 10, 2)


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_with_a_shape_against_their_formulas(warmup):
    """Hard restarts and polynomial as Hugging Face defines them, drops as torch's StepLR."""
    shape, total = ScheduleShape(cycles=3, power=2.0, step_size=5, gamma=0.5), 28
    names = ("cosine_with_restarts", "polynomial", "step")
    schedules = {name: lr_scheduler(name, 2.0, total, warmup, shape) for name in names}
    for step in range(total + 4):
        progress = min(1.0, (step - warmup) / (total - warmup))
        wave = 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((3 * progress) % 1.0)))
        wanted = dict(zip(names, (wave, (1 - progress) ** 2, 0.5 ** ((step - warmup) // 5)), strict=True))
        for name, schedule in schedules.items():
            factor = step / warmup if step < warmup else wanted[name]
            assert schedule.get_lr() == pytest.approx(2.0 * factor, abs=1e-12), (name, step)
            schedule.step()


def test_parameters_may_come_first_and_lr_is_the_learning_rate():
    def model():
        paddle.seed(0)
        return paddle.nn.Linear(16, 16)

    config, after = FP8QuantizationConfig(block_size=16), []
    for make in (
        lambda params: FP8AdamW(learning_rate=3e-3, parameters=params, fp8_config=config),
        lambda params: FP8AdamW(params, lr=3e-3, fp8_config=config),
        lambda params: FP8AdamW(iter(params), 3e-3, fp8_config=config),
        lambda params: FP8AdamW([{"params": params}], lr=3e-3, fp8_config=config),
    ):
        layer = model()
        optimizer = make(layer.parameters())
        layer(paddle.ones([2, 16])).sum().backward()
        optimizer.step()
        after.append((optimizer.get_lr(), layer.weight.numpy().tobytes()))
    assert after[0][0] == 3e-3 and set(after) == {after[0]}
    assert FP8AdamW(model().parameters()).get_lr() == 1e-4


def test_what_is_no_rate_and_no_list_is_one_short_line():
    model = paddle.nn.Linear(64, 64)
    params = model.parameters()
    for arguments, said in (((params, params), "one list of parameters"), ((params, None, "x"), "beta1"),
                            ((params[0], params), "learning_rate must be a number"),
                            ((params, "fast"), "learning_rate must be a number 0 or more, got 'fast'"),
                            ((model,), "list of tensors, got one Linear: give model.parameters()"),
                            ((1e-4, params[0]), "list of tensors, got one EagerParamBase"),
                            ((params[0],), "list of tensors, got one EagerParamBase")):  # fmt: skip
        with pytest.raises(ConfigError, match=said) as caught:
            FP8AdamW(*arguments)
        assert len(str(caught.value)) < 120
