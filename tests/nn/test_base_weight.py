"""Frozen weights in all formats under Linears and LoRAs, against float64 with the dequantised weight."""

from contextlib import nullcontext

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.lora import inject_lora, merge_lora, remove_lora
from ppcoat.nn import saved_forms
from ppcoat.nn.base_weight import BASES, BaseWeight, FP4Weight, FP8Weight, NF4Weight, times, times_transposed
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears, replace_linear_with_fp8
from ppcoat.nn.linear import FrozenLinear, LoRALinear
from ppcoat.nn.saved_tensors import count_saved_tensors, saved_as_they_are

IN, OUT = 200, 136


def model(bias: bool = True) -> nn.Layer:
    paddle.seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias_attr=None if bias else False))


def values(weight: FP8Weight) -> np.ndarray:
    """codes * scale by ml_dtypes, float64."""
    codes = weight.codes.numpy().view(ml_dtypes.float8_e4m3fn).astype("float64")
    scale = weight.scale.numpy().astype("float64")
    return codes * np.kron(scale, np.ones([128, 128]))[: codes.shape[0], : codes.shape[1]]


def rows(count: int = 6) -> paddle.Tensor:
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal([2, count, IN]).astype("float32"))
    x.stop_gradient = False
    return x


def test_it_has_the_shape_of_the_weight_and_a_byte_for_each_number():
    weight = FP8Weight.of(model()[0].weight)
    assert weight.shape == [IN, OUT] and weight.stop_gradient
    assert weight.nbytes == IN * OUT + 4 * 2 * 2
    np.testing.assert_array_equal(weight.dequantized("float32").numpy(), values(weight))
    assert weight.dequantized("bfloat16").dtype == paddle.bfloat16


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(ConfigError, match="NaN or infinities"):
        FP8Weight.of(paddle.to_tensor([[1.0, bad]]))


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match=r"\[2, 2\].*wanted \[1, 1\]"):
        FP8Weight([3, 3], codes=paddle.zeros([3, 3], "uint8"), scale=paddle.ones([2, 2]))


@pytest.mark.parametrize("shape", [(130, 70), (64, 3), (1, 1)])
@pytest.mark.parametrize("base", BASES)
def test_bytes_of_a_format_are_those_that_its_tensors_take(base, shape):
    weight = BASES[base].of(paddle.randn(shape))
    held = sum(buffer.size * buffer.element_size() for buffer in weight.buffers())
    assert BASES[base].bytes_of(shape) == weight.nbytes == held


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_computes_and_differentiates_with_the_codes(bias):
    layers, x = model(bias), rows()
    assert quantize_linears(layers) == ["0"]
    weight = layers[0].weight
    assert isinstance(layers[0], FrozenLinear) and isinstance(weight, FP8Weight)
    with count_saved_tensors() as saved:
        y = layers(x)
    assert saved.bytes_kept == 0
    y.sum().backward()
    w, offset = values(weight), layers[0].bias.numpy() if bias else 0
    np.testing.assert_allclose(y.numpy(), x.numpy() @ w + offset, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), np.broadcast_to(w.sum(1), x.shape), atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "coat"])
def test_a_lora_stands_on_it_and_comes_off_again(policy):
    layers, x = model(), rows()
    quantize_linears(layers)
    frozen = layers[0]
    layer = inject_lora(layers, 4, 8.0, targets=["0"], policy=policy)["0"]
    layer.lora_B.set_value(np.random.default_rng(2).standard_normal([4, OUT]).astype("float32"))
    if policy == "coat":
        replace_linear_with_fp8(layers)
    y = layers(x)
    y.sum().backward()
    w, a, b = (np.asarray(each, "float64") for each in (values(frozen.weight), layer.lora_A, layer.lora_B))
    np.testing.assert_allclose(y.numpy(), x.numpy() @ (w + 2 * a @ b) + frozen.bias.numpy(), atol=2e-5)
    np.testing.assert_allclose(x.grad.numpy(), np.broadcast_to((w + 2 * a @ b).sum(1), x.shape), atol=2e-5)
    wanted = 2 * np.einsum("bti,r->ir", x.numpy(), b.sum(1))
    got = layer.lora_A.grad.numpy()
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < (1e-6 if policy == "none" else 0.04)
    layer.enabled = False
    np.testing.assert_allclose(layers(x).numpy(), x.numpy() @ w + frozen.bias.numpy(), atol=1e-5)
    remove_lora(layers)
    assert layers[0] is frozen


FORMATS = pytest.mark.parametrize("base", ["fp8", "int8", "nf4", "fp4"])
# Errors of normal weights, in percent, and bits a weight at this size: of the shared fixture and formats.
PROMISED = {"fp8": (2.8, 8.01), "int8": (0.75, 8.33), "nf4": (9.5, 4.15), "fp4": (7.1, 4.5)}


@FORMATS
def test_each_format_has_its_error_and_its_bits(base):
    w = np.random.default_rng(3).standard_normal([IN, OUT]).astype("float32") * 0.02
    weight = BASES[base].of(paddle.to_tensor(w))
    assert weight.shape == [IN, OUT] and weight.stop_gradient
    got = weight.dequantized("float32").numpy()
    error, bits = PROMISED[base]
    assert 0.8 * error < 100 * np.sqrt(((got - w) ** 2).sum() / (w**2).sum()) < error
    assert 8 * weight.nbytes <= bits * w.size
    assert weight.dequantized("bfloat16").dtype == paddle.bfloat16


@FORMATS
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_dequantised_weight(base, bias):
    layers, rng = model(bias), np.random.default_rng(4)
    assert quantize_linears(layers, base) == ["0"]
    weight = layers[0].weight
    if bias:
        layers[0].bias.set_value(rng.standard_normal(OUT).astype("float32"))
    assert isinstance(weight, BaseWeight) and list(layers.parameters()) == ([layers[0].bias] if bias else [])
    x, dy, down = (rng.standard_normal([2, 3, width]).astype("float32") for width in (IN, OUT, 4))
    up_a, up_b = (rng.standard_normal(shape).astype("float32") for shape in ([IN, 4], [4, OUT]))
    given = [paddle.to_tensor(each) for each in (x, dy, down, up_a, up_b)]
    w = weight.dequantized("float32").numpy().astype("float64")
    offset = layers[0].bias.numpy() if bias else 0
    y = times(given[0], weight, layers[0].bias, (given[2], given[4]))
    dx = times_transposed(given[1], weight, (given[2], given[3]))
    np.testing.assert_allclose(y.numpy(), x @ w + offset + down @ up_b, atol=2e-5)
    np.testing.assert_allclose(dx.numpy(), dy @ w.T + down @ up_a.T, atol=2e-5)


@FORMATS
def test_a_lora_on_it_has_the_gradients_of_the_dequantised_weight(base):
    """Those of Paddle's autograd on a Linear that holds the dequantised weight."""
    quantised, plain = model(), model()
    quantize_linears(quantised, base)
    plain[0].weight.set_value(quantised[0].weight.dequantized("float32"))
    dense = plain[0]
    grads = []
    for each in (quantised, plain):
        layer = inject_lora(each, 4, 8.0, targets=["0"])["0"]
        layer.lora_A.set_value(np.random.default_rng(1).standard_normal([IN, 4]).astype("float32"))
        layer.lora_B.set_value(np.random.default_rng(2).standard_normal([4, OUT]).astype("float32"))
        x = rows()
        with count_saved_tensors() as saved:
            y = each(x)
        (y * y).sum().backward()
        grads.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad, saved.bytes_kept))
        assert not any(isinstance(p, BaseWeight) for p in each.parameters())
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * float(np.abs(np.asarray(want)).max()))
    remove_lora(quantised)
    assert isinstance(quantised[0].weight, BASES[base]) and dense.weight.stop_gradient


@FORMATS
def test_no_format_takes_what_is_not_finite(base):
    for bad in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="NaN"):
            BASES[base].of(paddle.to_tensor([[1.0, bad]]))


def test_wrong_formats_sizes_and_second_quantising_are_one_line():
    with pytest.raises(ConfigError, match="'int4'; use one of fp8, int8, nf4, fp4"):
        quantize_linears(model(), "int4")
    layers = model()
    quantize_linears(layers, "nf4")
    with pytest.raises(ConfigError, match="0.weight is stored in NF4 already"):
        quantize_linears(layers, "fp4")
    inject_lora(layers, 2, 2.0, targets=["0"])
    with pytest.raises(ConfigError, match="0.weight is stored in NF4: load the model unquantised to merge"):
        merge_lora(layers)
    with pytest.raises(ConfigError, match=r"scale of an FP4 weight \[4, 8\] is \[1\], wanted \[2\]"):
        FP4Weight([4, 8], codes=paddle.zeros([16], "uint8"), scale=paddle.zeros([1], "uint8"))
    with pytest.raises(ConfigError, match="above 22.9 cannot be stored in FP4.*int8"):
        FP4Weight.of(paddle.full([4, 8], 30.0))
    assert NF4Weight.of(paddle.full([4, 8], 30.0)).dequantized("float32").numpy().max() == 30.0


@FORMATS
def test_a_small_flux_on_it_has_the_gradients_of_autograd(flux, build_flux, base):
    sizes = {"channels": 16, "text": 24, "pooled": 12, "guidance": True}
    quantised, plain = (build_flux(1, 1, 2, 32, **sizes) for _ in range(2))
    for layer in plain.sublayers():
        if isinstance(layer, nn.Linear):
            layer.weight.set_value(BASES[base].of(layer.weight).dequantized("float32"))
    quantize_linears(quantised, base)
    for each in (quantised, plain):
        flux.with_loras(each)
    batch = flux.arguments(plain)
    loss, wanted = flux.plain_gradients(plain, batch)
    got_loss, got = flux.gradients(quantised, batch, "none", 0)
    assert abs(got_loss - loss) < 1e-5 * loss and flux.errors(got, wanted)[1] < 1e-5


def test_only_the_bias_is_a_parameter_and_only_the_lora_trains():
    layers = model()
    quantize_linears(layers)
    assert [name for name, _ in layers.named_parameters()] == ["0.bias"]
    assert set(layers.state_dict()) == {"0.bias", "0.weight.codes", "0.weight.scale"}
    inject_lora(layers, 2, 2.0, targets=["0"])
    trained = [name for name, p in layers.named_parameters() if not p.stop_gradient]
    assert trained == ["0.lora_A", "0.lora_B"]


def test_a_linear_with_a_lora_is_not_quantised():
    layers = model()
    layers.add_sublayer("0", LoRALinear(layers[0], 2, 2.0))
    with pytest.raises(ConfigError, match="0 carries a LoRA"):
        quantize_linears(layers)


@pytest.mark.parametrize("checkpointed", [0, 4])
@pytest.mark.parametrize("policy", ["none", "coat", "coat+recompute", "coat+recompute+attention"])
def test_flux_blocks_on_it_have_the_gradients_of_autograd(flux, build_flux, policy, checkpointed):
    """Autograd runs on the same weights as floats."""
    sizes = {"channels": 16, "text": 24, "pooled": 12, "guidance": True}
    quantised, plain = (build_flux(2, 2, 2, 32, **sizes) for _ in range(2))
    for layer in plain.sublayers():
        if isinstance(layer, nn.Linear):
            layer.weight.set_value(FP8Weight.of(layer.weight).dequantized("float32"))
    quantize_linears(quantised)
    for each in (quantised, plain):
        flux.with_loras(each)
    batch = flux.arguments(plain)
    loss, wanted = flux.plain_gradients(plain, batch)
    got_loss, got = flux.gradients(quantised, batch, policy, checkpointed)
    assert abs(got_loss - loss) < 1e-5 * loss
    # where all blocks are checkpointed only the norm behind them is saved in FP8
    limit = 1e-5 if policy == "none" else 0.03 if checkpointed == 4 else 0.08
    assert flux.errors(got, wanted)[1] < limit


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """x [N, D] rounded to E4M3 in groups of 128 by ml_dtypes, float64."""
    pieces = []
    for start in range(0, x.shape[1], 128):
        piece = x[:, start : start + 128]
        scale = (np.abs(piece).max(1, keepdims=True) / np.float32(448)).astype("float32")
        pieces.append((piece / scale).astype(ml_dtypes.float8_e4m3fn).astype("float64") * scale)
    return np.concatenate(pieces, axis=1)


def test_products_in_fp8_round_both_factors():
    layers, rng = model(), np.random.default_rng(2)
    weight, bias = FP8Weight.of(layers[0].weight), layers[0].bias
    weight.in_fp8 = True
    x, dy, down = (rng.standard_normal([5, width]).astype("float32") for width in (IN, OUT, 3))
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ([IN, 3], [3, OUT]))
    given = [paddle.to_tensor(each) for each in (x, dy, down, a, b)]
    y = times(given[0].reshape([1, 5, IN]), weight, bias, (given[2].reshape([1, 5, 3]), given[4]))
    dx = times_transposed(given[1], weight, (given[2], given[3]))
    wanted = rounded_rows(x) @ values(weight) + bias.numpy() + down @ b
    np.testing.assert_allclose(y.numpy()[0], wanted, atol=1e-4)
    np.testing.assert_allclose(dx.numpy(), rounded_rows(dy) @ values(weight).T + down @ a.T, atol=1e-4)


def test_only_the_blocks_of_flux_multiply_in_fp8(build_flux):
    transformer = build_flux(1, 1, 2, 32, channels=16, text=24, pooled=12, guidance=True)
    assert multiply_in_fp8(transformer) == []  # nothing is in FP8 yet
    quantize_linears(transformer)
    chosen = multiply_in_fp8(transformer)
    assert len(chosen) == 12 + 5  # the Linears that a LoRA goes on by default
    assert "single_transformer_blocks.0.proj_out" in chosen
    assert not any("norm" in path or "embed" in path for path in chosen)


def test_lora_gradients_with_products_in_fp8(flux, build_flux):
    """Beside products with the same FP8 weights in the compute dtype."""
    transformer = build_flux(2, 2, 2, 64, channels=16, text=24, pooled=12, guidance=True)
    quantize_linears(transformer)
    flux.with_loras(transformer)
    batch = flux.arguments(transformer)
    loss, wanted = flux.gradients(transformer, batch)
    multiply_in_fp8(transformer)
    fp8_loss, got = flux.gradients(transformer, batch)
    print(loss, fp8_loss, flux.errors(got, wanted)[1])
    assert 0 < abs(fp8_loss - loss) < 0.01 * loss
    assert flux.errors(got, wanted)[1] < 0.08


@pytest.fixture
def quantised(monkeypatch):
    """Shapes of what was quantised."""
    shapes = []
    real = saved_forms.quantize
    monkeypatch.setattr(
        saved_forms, "quantize", lambda x, *settings: shapes.append(list(x.shape)) or real(x, *settings)
    )
    return shapes


def three_linears() -> tuple[list[nn.Layer], int]:
    """Three LoRAs on FP8 weights that multiply in FP8, and how many bytes the FP8 form of their x takes."""
    layers = [model(), model(), model()]
    for layer in layers:
        quantize_linears(layer)
        inject_lora(layer, 4, 8.0, targets=["0"], policy="coat", group_size=128)
        layer[0].weight.in_fp8 = True
    return layers, 2 * 6 * IN + 4 * 2 * 6 * 2


def test_x_is_quantised_once_for_all_that_read_it_and_save_it(quantised):
    layers, size = three_linears()
    x = rows()
    with count_saved_tensors() as saved:
        outputs = [layer(x) for layer in layers]
    assert quantised == [[2, 6, IN]]
    assert saved.bytes_kept == size + 3 * 2 * 6 * 4 * 4  # x once, and x A of each
    sum(y.sum() for y in outputs).backward()
    assert len(quantised) == 1 + 3  # and each output's gradient
    for layer in layers:
        layer[0].group_size = None  # another form is saved: one scale for all
    quantised.clear()
    with count_saved_tensors():
        for layer in layers:
            layer(x)
    assert quantised == [[2, 6, IN], [2, 6, IN]]


def test_what_is_only_multiplied_is_not_counted_as_saved(quantised):
    layers, _ = three_linears()
    x = rows()
    with count_saved_tensors() as saved:
        for layer in layers:
            layer[0].enabled = False
            layer(x)
    assert quantised == [[2, 6, IN]] and saved.bytes_kept == 0


def test_x_that_was_changed_is_quantised_anew(quantised):
    (layer, *_), _ = three_linears()
    x = rows().detach()
    with count_saved_tensors(), paddle.no_grad():
        before = layer(x)
        x.add_(paddle.ones_like(x))
        after = layer(x)
    assert len(quantised) == 2
    w = values(layer[0].weight)
    moved = after.numpy() - before.numpy()
    np.testing.assert_allclose(moved, np.broadcast_to(w.sum(0), moved.shape), atol=0.3)


@pytest.mark.parametrize("grad", [True, False])
def test_blocks_quantise_each_input_of_their_linears_once(build_flux, quantised, flux, grad):
    """A double block has 8 inputs and a single one 2: results of norms have three and four readers."""
    transformer = build_flux(1, 1, 2, 64, channels=16, text=24, pooled=12, guidance=True)
    quantize_linears(transformer)
    multiply_in_fp8(transformer)
    batch = flux.arguments(transformer)
    with paddle.set_grad_enabled(grad), saved_as_they_are() if grad else nullcontext():
        transformer(**batch)
    assert len(quantised) == 10
