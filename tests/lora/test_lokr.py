"""LoKr against LyCORIS' own files, outputs and gradients, and against numpy's kron."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file

from ppcoat.errors import ConfigError
from ppcoat.lora import (
    LoKrSettings,
    adapter_layers,
    inject_lokr,
    load_lora,
    merge_lora,
    remove_lora,
    save_lora,
)
from ppcoat.lora.lokr import LoKrLinear, kronecker_sides, new_factors
from ppcoat.models.newbie.files import load_nextdit

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5
TARGETS = [
    "attention.qkv",
    "attention.out",
    "feed_forward.w2",
    "time_text_embed.1",
    "clip_text_pooled_proj.1",
]
KINDS = {"lokr_full": LoKrSettings(100000, 1.0, 8), "lokr_lowrank": LoKrSettings(4, 2.0, 4)}


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs, np.load(FOLDER / "adapter_refs.npz") as adapters:
        return dict(refs) | dict(adapters)


@pytest.fixture(scope="module")
def nextdit():
    return load_nextdit(FOLDER / "transformer", "float32")


def inputs(refs):
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    return [paddle.to_tensor(refs[name][:2]) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_merge_are_those_of_lycoris(nextdit, refs, kind):
    """The full file says alpha 1 of rank 100000, and still has scale 1."""
    load_lora(nextdit, FOLDER / kind)
    layers = adapter_layers(nextdit)
    for layer in layers.values():
        for name in layer.factors:
            getattr(layer, name).stop_gradient = False
    out = nextdit(*inputs(refs))
    np.testing.assert_allclose(out.numpy(), refs[f"{kind}_b2_out"], rtol=0, atol=TOLERANCE)
    out.square().mean().backward()
    checked = 0
    for key in (key for key in refs if key.startswith(f"{kind}_grad/")):
        name, factor = key.removeprefix(f"{kind}_grad/lycoris_").split(".")
        path = next(path for path in layers if path.replace(".", "_") == name)
        got, want = getattr(layers[path], factor).grad.numpy(), refs[key]
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
        checked += 1
    assert checked >= 6
    merged = load_nextdit(FOLDER / "transformer", "float32")
    load_lora(merged, FOLDER / kind)
    merge_lora(merged)
    assert not adapter_layers(merged)
    np.testing.assert_allclose(merged(*inputs(refs)).numpy(), refs[f"{kind}_b2_out"], rtol=0, atol=TOLERANCE)
    remove_lora(nextdit)


@pytest.mark.parametrize("kind", KINDS)
def test_new_lokrs_have_the_names_and_shapes_of_lycoris(kind):
    model = load_nextdit(FOLDER / "transformer", "float32")
    layers = inject_lokr(model, KINDS[kind], TARGETS)
    file = load_file(FOLDER / kind / "adapter_model.safetensors")
    ours = {
        f"lycoris_{path.replace('.', '_')}.{name}": tuple(getattr(layer, name).shape)
        for path, layer in layers.items()
        for name in layer.factors
    }
    assert ours == {name: value.shape for name, value in file.items() if not name.endswith(".alpha")}
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert len(trained) == len(ours)


def test_a_new_lokr_changes_nothing_and_then_adds_a_kron():
    rng = np.random.default_rng(0)
    base, settings = nn.Linear(12, 20), LoKrSettings(2, 3.0)
    layer = LoKrLinear(base, new_factors(12, 20, settings, 0), settings)
    x = paddle.to_tensor(rng.standard_normal([2, 3, 12], dtype=np.float32))
    np.testing.assert_array_equal(layer(x).numpy(), base(x).numpy())
    for name in layer.factors:
        value = getattr(layer, name)
        value.set_value(rng.standard_normal(value.shape).astype("float32"))
    w1 = layer.lokr_w1.numpy().astype(np.float64)
    assert w1.shape == (4, 3)
    w2 = (
        layer.lokr_w2.numpy()
        if hasattr(layer, "lokr_w2")
        else layer.lokr_w2_a.numpy() @ layer.lokr_w2_b.numpy()
    )
    delta = np.kron(w1, w2) * layer.scale
    assert layer.scale == (1.0 if layer.is_full else 1.5)
    want = x.numpy() @ (base.weight.numpy() + delta.T) + base.bias.numpy()
    np.testing.assert_allclose(layer(x).numpy(), want, atol=1e-5)
    np.testing.assert_allclose(layer.delta().numpy(), delta.T, atol=1e-5)


def test_dropout_leaves_out_rows_or_the_whole_while_training():
    settings = LoKrSettings(8, 1.0)
    factors = {"lokr_w1": np.ones([2, 2], "float32"), "lokr_w2": np.ones([50, 4], "float32")}
    base = nn.Linear(8, 100)
    rows = LoKrLinear(base, factors, settings, (0.4, 0.0))
    x = paddle.ones([1, 8])
    paddle.seed(0)
    added = (rows(x) - base(x)).numpy()[0]
    left_out = np.isclose(added, 0)
    assert 20 < left_out.sum() < 60 and np.allclose(added[~left_out], 8, atol=1e-4)
    rows.eval()
    np.testing.assert_allclose((rows(x) - base(x)).numpy(), 8, atol=1e-4)
    whole = LoKrLinear(base, factors, settings, (0.0, 0.5))
    found = {round(float((whole(x) - base(x)).mean())) for _ in range(40)}
    assert found == {0, 8}


@pytest.mark.parametrize("settings", [LoKrSettings(2, 6.0, 4), LoKrSettings(2, 6.0, -1, full=True)])
def test_a_file_of_flux_is_what_comfyui_and_ai_toolkit_read_and_draws_as_the_model(model, tmp_path, settings):
    """Their names, and W + alpha / rank kron(w1, w2), alpha / rank being 1 where both are whole."""
    rng, file = np.random.default_rng(0), tmp_path / "lokr.safetensors"
    layers = inject_lokr(model, settings)
    for layer in layers.values():
        for name in layer.factors:
            factor = getattr(layer, name)
            factor.set_value(rng.standard_normal(factor.shape).astype("float32"))
    deltas = {path: layer.delta().numpy() for path, layer in layers.items()}
    summary = save_lora(file, model, file_format="kohya", dtype="bfloat16")
    for path, delta in deltas.items():
        assert summary.norms[path] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert 1e-4 < summary.error < 0.02  # rounded to bfloat16
    summary = save_lora(file, model)
    assert summary.error < 1e-6
    tensors = load_file(file)
    for path, delta in deltas.items():
        stem = f"transformer.{path}"
        w2 = tensors.get(f"{stem}.lokr_w2")
        if w2 is None:
            w2 = tensors[f"{stem}.lokr_w2_a"] @ tensors[f"{stem}.lokr_w2_b"]
            assert tensors[f"{stem}.alpha"] == len(tensors[f"{stem}.lokr_w2_b"])
        np.testing.assert_allclose(np.kron(tensors[f"{stem}.lokr_w1"], w2).T, delta, rtol=1e-5, atol=1e-5)
    assert all(key.rsplit(".", 1)[1] in ("alpha", *layers[path].factors) for key in tensors
               for path in [key.removeprefix("transformer.").rsplit(".", 1)[0]])  # fmt: skip
    remove_lora(model)
    load_lora(model, file)
    drawn = adapter_layers(model)
    assert all(isinstance(layer, LoKrLinear) for layer in drawn.values()) and drawn.keys() == deltas.keys()
    for path, delta in deltas.items():
        np.testing.assert_allclose(drawn[path].delta().numpy(), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "factor", "sides"),
    [(64, 8, (8, 8)), (32, 8, (4, 8)), (64, -1, (8, 8)), (128, -1, (8, 16)), (2304, 8, (8, 288)),
     (2304, -1, (48, 48)), (12, 5, (3, 4)), (7, -1, (1, 7)), (9216, 16, (16, 576)), (64, 32, (2, 32))],
)  # fmt: skip
def test_widths_are_split_as_lycoris_splits_them(width, factor, sides):
    assert kronecker_sides(width, factor) == sides


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: LoKrSettings(0, 1.0), "rank 0"),
        (lambda: LoKrSettings(4, 1.0, 0), "factor 0"),
        (lambda: LoKrLinear(nn.Linear(4, 4), {"lokr_w1": np.ones([2, 2])}, LoKrSettings(1, 1)), "lokr_w2"),
        (lambda: LoKrLinear(nn.Linear(4, 4), {"lokr_w1": np.ones([2, 2]), "lokr_w2": np.ones([3, 2])},
                            LoKrSettings(1, 1)), "does not fit a Linear 4 -> 4"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, part):
    with pytest.raises(ConfigError, match=part):
        make()
