"""DoRA against its formulas in float64 and finite differences; what it saves; its files for diffusers and
ComfyUI."""

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors import safe_open
from safetensors.numpy import load_file

from ppcoat.cli.main import main
from ppcoat.lora import (
    DoRALinear,
    adapter_layers,
    inject_lora,
    load_lora,
    lora_disabled,
    merge_lora,
    read_lora_file,
    remove_lora,
    save_lora,
)
from ppcoat.lora.layer import adapter_summary, values_of
from ppcoat.nn import base_weight
from ppcoat.nn.base_weight import FP8Weight, column_squares
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.linear import FrozenLinear, LinearParameters, LoRALinear
from ppcoat.nn.saved_tensors import count_saved_tensors, fp8_saved_tensors

IN, OUT, RANK, ALPHA = 256, 96, 8, 4.0
NAMES = ("dA", "dB", "dm")


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def give_values(layer, seed=2):
    """B that is not zero, and lengths that are not W's."""
    layer.lora_B.set_value(random(seed, *layer.lora_B.shape) / 4)
    factor = np.random.default_rng(seed).uniform(0.5, 1.5, layer.lora_magnitude_vector.shape)
    layer.lora_magnitude_vector.set_value(layer.lora_magnitude_vector.numpy() * factor.astype("float32"))
    return layer


def make(bias=True, fp8=False, **settings):
    base = nn.Linear(IN, OUT, bias_attr=None if bias else False)
    base.weight.set_value(random(1, IN, OUT) / 16)
    if bias:
        base.bias.set_value(random(3, OUT))
    if fp8:
        base = FrozenLinear(LinearParameters(FP8Weight.of(base.weight), base.bias))
    return give_values(DoRALinear(base, RANK, ALPHA, **settings))


def run(layer, x, dy):
    layer.clear_gradients()
    x.clear_gradient()
    y = layer(x)
    y.backward(paddle.to_tensor(dy.reshape(y.shape)))
    gradients = {name: getattr(layer, of).grad for name, of in zip(NAMES, layer.factors, strict=True)}
    found = {"y": y.reshape([-1, OUT]), "dx": x.grad.reshape([-1, IN]), **gradients}
    return {name: None if value is None else value.numpy() for name, value in found.items()}


def expected(layer, x, dy, scale):
    """The paper's formulas in float64, the lengths being constants."""
    w, a, b, m, x, dy = (
        np.asarray(t, dtype=np.float64)
        for t in (values_of(layer, "weight").T, *(getattr(layer, n).numpy() for n in layer.factors), x, dy)
    )
    v = w + scale * a @ b
    n = np.linalg.norm(v, axis=0)
    g, bias = m / n, 0 if layer.bias is None else layer.bias.numpy().astype(np.float64)
    return {
        "y": g * (x @ v) + bias,
        "dx": (g * dy) @ v.T,
        "dA": scale * x.T @ (g * dy) @ b.T,
        "dB": scale * (x @ a).T @ (g * dy),
        "dm": (dy * (x @ v)).sum(0) / n,
    }


def rms(got, want):
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def input_of(seed, *shape):
    x = paddle.to_tensor(random(seed, *shape))
    x.stop_gradient = False
    return x


@pytest.mark.parametrize("shape", [[40, IN], [2, 20, IN]])
@pytest.mark.parametrize(("bias", "fp8", "multiplier"), [(True, False, 0.5), (False, True, 1.0)])
def test_everything_equals_float64(shape, bias, fp8, multiplier):
    layer, x, dy = make(bias, fp8), input_of(4, *shape), random(5, 40, OUT)
    layer.scale_multiplier = multiplier
    got = run(layer, x, dy)
    wanted = expected(layer, x.numpy().reshape([-1, IN]), dy, ALPHA / RANK * multiplier)
    for name, want in wanted.items():
        assert np.abs(got[name] - want).max() <= 2e-6 * max(1.0, np.abs(want).max()), name


def test_gradients_are_finite_differences_where_the_lengths_stay():
    """Of a loss in float64 that knows nothing of the formulas for gradients."""
    layer, x, dy = make(), input_of(4, 40, IN), random(5, 40, OUT)
    got = run(layer, x, dy)
    values = [getattr(layer, name).numpy().astype(np.float64) for name in layer.factors]
    w, rows, scale = layer.weight.numpy().astype(np.float64), x.numpy().astype(np.float64), ALPHA / RANK
    lengths = np.linalg.norm(w + scale * values[0] @ values[1], axis=0)
    rng = np.random.default_rng(6)
    for number, name in enumerate(NAMES):
        step = rng.standard_normal(values[number].shape) * 1e-4
        losses = []
        for sign in (1, -1):
            a, b, m = (v + sign * step if i == number else v for i, v in enumerate(values))
            losses.append(((m / lengths) * (rows @ w + scale * rows @ a @ b) * dy).sum())
        assert (losses[0] - losses[1]) / 2 == pytest.approx((got[name] * step).sum(), rel=1e-4), name


@pytest.mark.parametrize("group_size", [128, 100, None])
def test_policy_coat_rounds_the_gradients_of_a_and_of_the_lengths_alone(group_size):
    exact, layer, x = make(), make(policy="coat", group_size=group_size), input_of(4, 2, 20, IN)
    dy = random(5, 40, OUT)
    want, got = run(exact, x, dy), run(layer, x, dy)
    for name in ("y", "dx", "dB"):
        np.testing.assert_array_equal(got[name], want[name])
    assert 0.005 < rms(got["dA"], want["dA"]) < 0.035
    assert 0.0005 < rms(got["dm"], want["dm"]) < 0.035  # of sums of products with x as it was saved


def test_only_the_lengths_are_saved_beside_what_a_lora_saves():
    base = nn.Linear(IN, OUT)
    saved = {}
    for kind in (LoRALinear, DoRALinear):
        layers = [kind(base, RANK, ALPHA, policy="coat") for _ in range(3)]
        x = input_of(11, 64, IN)
        with fp8_saved_tensors(min_size=1) as counted:
            sum(layer(x).sum() for layer in layers)
        saved[kind] = counted.bytes_kept
    assert saved[DoRALinear] - saved[LoRALinear] == 3 * 4 * OUT


@pytest.mark.parametrize("trained", [(), ("lora_magnitude_vector",), ("lora_A",), ("lora_B",)])
@pytest.mark.parametrize("x_trains", [True, False])
def test_only_what_asks_for_a_gradient_gets_one(trained, x_trains):
    layer, x = make(policy="coat"), input_of(9, 40, IN)
    x.stop_gradient = not x_trains
    for name in layer.factors:
        getattr(layer, name).stop_gradient = name not in trained
    if not (x_trains or trained):
        assert layer(x).stop_gradient
        return
    with count_saved_tensors() as saved:
        layer(x).sum().backward()
    assert (x.grad is not None) == x_trains and layer.weight.grad is None
    assert {name for name in layer.factors if getattr(layer, name).grad is not None} == set(trained)
    assert (saved.bytes_kept < 40 * IN) == (not trained)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_new_dora_is_the_base_bit_for_bit(fp8):
    base = nn.Linear(IN, OUT)
    if fp8:
        base = FrozenLinear(LinearParameters(FP8Weight.of(base.weight), base.bias))
    layer, x = DoRALinear(base, RANK, ALPHA), input_of(4, 40, IN)
    product = FrozenLinear(LinearParameters(base.weight, None))(x)
    np.testing.assert_array_equal(layer(x).numpy(), (product + base.bias).numpy())
    lengths = np.linalg.norm(values_of(base, "weight").astype(np.float64), axis=1)
    np.testing.assert_allclose(layer.lora_magnitude_vector.numpy(), lengths, rtol=1e-6)
    assert layer.change() == 0


def test_a_column_of_zeros_is_no_division_by_zero():
    base = nn.Linear(IN, OUT)
    base.weight.set_value(np.where(np.arange(OUT) == 3, 0, base.weight.numpy()))
    layer, x = DoRALinear(base, RANK, ALPHA), input_of(4, 40, IN)
    found = run(layer, x, random(5, 40, OUT))
    assert all(np.isfinite(value).all() for value in found.values())


def test_dropout_drops_the_input_of_the_lora_in_both_directions():
    """W is 0, so that dx is zero exactly where x was dropped."""
    layer = make(dropout=0.5, bias=False)
    layer.weight.set_value(np.zeros([IN, OUT], "float32"))  # the lengths stay those of before
    paddle.seed(0)
    x = input_of(8, 64, IN)
    y = layer(x)
    y.sum().backward()
    dropped = x.grad.numpy() == 0
    assert 0.45 < dropped.mean() < 0.55
    kept = np.where(dropped, 0, 2 * x.numpy()).astype(np.float64)
    a, b, m = (getattr(layer, name).numpy().astype(np.float64) for name in layer.factors)
    n, scale = layer.lengths(paddle.float32).numpy(), ALPHA / RANK
    z, g = scale * kept @ a @ b, m / n
    np.testing.assert_allclose(y.numpy(), g * z, atol=1e-4)
    wanted = {"dA": scale * kept.T @ (np.ones([64, OUT]) * g @ b.T),
              "dB": scale * (kept @ a).T @ (np.ones([64, OUT]) * g), "dm": z.sum(0) / n}  # fmt: skip
    for name, of in zip(NAMES, layer.factors, strict=True):
        assert rms(getattr(layer, of).grad.numpy(), wanted[name]) < 1e-5, name
    layer.eval()
    np.testing.assert_array_equal(layer(x).numpy(), layer(x).numpy())


@pytest.mark.parametrize("fp8", [False, True])
def test_lengths_are_found_in_pieces(fp8, monkeypatch):
    """A weight of more rows than are squared at once, the last piece being smaller."""
    monkeypatch.setattr(base_weight, "SQUARED_AT_ONCE", 256)
    weight = paddle.to_tensor(random(1, 1200, 512))
    if fp8:
        weight = FP8Weight.of(weight)
    core = paddle.base.core
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    squares = column_squares(weight)
    grown = core.host_memory_stat_peak_value("Allocated", 0) - before
    whole = weight.dequantized("float32") if fp8 else weight
    np.testing.assert_allclose(squares.numpy(), np.square(whole.numpy().astype(np.float64)).sum(0), rtol=1e-5)
    assert grown < 5 * 4 * 256 * 512  # a few copies of a piece; the whole in float32 is 4.7 pieces


def test_norm_of_the_change_is_that_of_the_weights(model):
    for layer in inject_lora(model, 4, 2.0, layer=DoRALinear).values():
        give_values(layer)
    layers, norms = adapter_layers(model), adapter_summary(model).norms
    for path, layer in layers.items():
        weight = values_of(layer, "weight").astype(np.float64)
        assert norms[path] == pytest.approx(np.linalg.norm(layer.kind().delta(weight, 1.0)), rel=1e-5)


@pytest.fixture
def trained(model):
    """The model with DoRAs that do something, and what its Linears make of an input."""
    for number, layer in enumerate(inject_lora(model, 4, 2.0, layer=DoRALinear, seed=1).values()):
        give_values(layer, number)
    return model


def outputs(model):
    """Of every Linear that has an adapter, or would have one."""
    layers = dict(model.named_sublayers())
    paths = [path for path in layers if path.endswith(PATHS)]
    return {path: layers[path](paddle.to_tensor(random(7, 5, layers[path].weight.shape[0]))).numpy()
            for path in paths}  # fmt: skip


PATHS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_out.0",
    "ff.net.2",
    "proj_mlp",
    "single_transformer_blocks.0.proj_out",
)


def assert_same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys() and len(got) >= 8
    for path in got:
        np.testing.assert_allclose(got[path], wanted[path], err_msg=path, **tolerance)


def test_a_file_for_diffusers_draws_and_merges_as_the_model_that_wrote_it(trained, tmp_path):
    wanted, file = outputs(trained), tmp_path / "dora.safetensors"
    summary = save_lora(file, trained)
    assert summary.norm > 1 and not summary.zero and summary.error < 1e-6
    layers, tensors = adapter_layers(trained), load_file(file)
    for path, layer in layers.items():
        stem = f"transformer.{path}"
        np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], layer.lora_A.numpy().T)
        np.testing.assert_array_equal(
            tensors[f"{stem}.lora_B.weight"], layer.lora_B.numpy().T * np.float32(0.5)
        )
        np.testing.assert_array_equal(
            tensors[f"{stem}.lora_magnitude_vector"], layer.lora_magnitude_vector.numpy()
        )
    assert len(tensors) == 3 * len(layers)
    with safe_open(str(file), "np") as opened:
        header = opened.metadata()
    assert '"transformer.use_dora": true' in header["lora_adapter_metadata"]
    assert (header["rank"], header["original_alpha"]) == ("4", "2")
    remove_lora(trained)
    plain = outputs(trained)
    load_lora(trained, file)
    assert all(isinstance(layer, DoRALinear) for layer in adapter_layers(trained).values())
    assert_same(outputs(trained), wanted, rtol=1e-5, atol=1e-5)
    with lora_disabled(trained):
        assert_same(outputs(trained), plain, rtol=0, atol=0)
    merge_lora(trained)
    assert_same(outputs(trained), wanted, rtol=1e-5, atol=1e-5)


def test_on_an_fp8_base_a_file_draws_without_another_copy_of_the_weights(trained, tmp_path, caplog):
    save_lora(tmp_path / "dora.safetensors", trained)
    remove_lora(trained)
    quantize_linears(trained)
    load_lora(trained, tmp_path / "dora.safetensors", scale=0.5)
    assert not caplog.records
    for layer in adapter_layers(trained).values():
        x, weight = random(7, 5, layer.weight.shape[0]), values_of(layer, "weight").astype(np.float64)
        want = x @ (weight + layer.kind().delta(weight, 0.5)).T + layer.bias.numpy()
        np.testing.assert_allclose(layer(paddle.to_tensor(x)).numpy(), want, rtol=1e-4, atol=1e-5)


def test_a_file_for_comfyui_draws_there_as_the_model_that_wrote_it(trained, tmp_path):
    """By ComfyUI's own rule: (W + BA) dora_scale / |W|, rows of W, on the fused modules. A part without a
    DoRA, to_v of the single block, stays as it is."""
    path = "single_transformer_blocks.0.attn.to_v"
    layers = adapter_layers(trained)
    parent, base = trained.single_transformer_blocks[0].attn, layers[path].base
    parent.add_sublayer("to_v", base)
    wanted, file = outputs(trained), tmp_path / "dora.safetensors"
    save_lora(file, trained, file_format="kohya", dtype="float16")
    tensors = load_file(file)
    assert tensors["lora_unet_single_blocks_0_linear1.dora_scale"].dtype == np.float32
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    modules = [layers[f"single_transformer_blocks.0.{part}"] for part in single]
    weight = np.concatenate([values_of(layer, "weight") for layer in modules]).astype(np.float64)
    stem = "lora_unet_single_blocks_0_linear1"
    down, up, scale = (tensors[f"{stem}.{role}"].astype(np.float64)
                       for role in ("lora_down.weight", "lora_up.weight", "dora_scale"))  # fmt: skip
    assert tensors[f"{stem}.alpha"] == len(down) == 12
    drawn = (weight + up @ down) * scale / np.linalg.norm(weight, axis=1, keepdims=True)
    changes = [
        np.zeros([16, 16]) if layer.base is base else layer.kind().delta(values_of(layer, "weight"), 1.0)
        for layer in modules
    ]
    np.testing.assert_allclose(drawn, weight + np.concatenate(changes), rtol=2e-3, atol=2e-3)
    assert len(drawn) == 16 + 16 + 16 + 64
    remove_lora(trained)
    assert len([note for note in read_lora_file(file).notes if "ComfyUI" in note]) == 1  # the rule is told
    load_lora(trained, file)
    assert_same(outputs(trained), wanted, rtol=5e-3, atol=5e-3)
    remove_lora(trained)


def test_convert_writes_the_same_lengths_by_lycoris_rule_where_modules_are_whole(trained, tmp_path, capsys):
    wanted, files = outputs(trained), [tmp_path / f"{name}.safetensors" for name in ("dora", "kohya", "back")]
    save_lora(files[0], trained)
    assert main(["convert", *map(str, files[:2]), "--format", "kohya"]) == 0
    assert (
        "note: LyCORIS' loader draws this as PEFT does at strength 1; ComfyUI measures"
        in capsys.readouterr().out
    )
    tensors = load_file(files[1])
    block = [
        adapter_layers(trained)[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v")
    ]
    np.testing.assert_array_equal(
        tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"][:, 0],
        np.concatenate([layer.lora_magnitude_vector.numpy() for layer in block]),
    )
    remove_lora(trained)
    load_lora(trained, files[1])
    assert_same(outputs(trained), wanted, rtol=1e-5, atol=1e-5)
    assert main(["convert", *map(str, files[1:]), "--format", "diffusers"]) == 2
    assert "has no place for DoRA by the rule of LyCORIS" in capsys.readouterr().err
