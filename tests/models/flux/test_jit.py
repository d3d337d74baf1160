"""The way through static graphs: the same velocity as diffusers', LoRA merged, shapes changed, no CINN."""

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.infer import lightning
from ppcoat.infer.lightning import cinn_missing, compile_transformer
from ppcoat.lora import inject_lora, lora_layers, merge_lora
from ppcoat.models.loading import load_transformer

NAMES = ("tr_h", "tr_enc", "tr_pool", "tr_t", "tr_img_ids", "tr_txt_ids", "tr_g")


def inputs(refs):
    return [paddle.to_tensor(refs[name]) for name in NAMES]


def tiny_inputs(tokens, seed=0):
    paddle.seed(seed)
    ids = paddle.to_tensor([[0.0, i // 2, i % 2] for i in range(tokens)])
    return [
        paddle.randn([1, tokens, 4]), paddle.randn([1, 3, 12]), paddle.randn([1, 6]), paddle.to_tensor([0.5]),
        ids, paddle.zeros([3, 3]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(fp32_folder):
    return load_transformer(fp32_folder / "transformer", "float32")


@pytest.fixture
def compiled(build_flux, capsys):
    """A small random FLUX that draws through graphs, and its velocities without them."""
    model, eager = (build_flux(double=1, single=1).eval() for _ in range(2))
    compile_transformer(model)
    return model, eager


def test_jit_forward_gives_the_velocity_of_diffusers_with_gradients(model, torch_refs):
    hidden, *rest = inputs(torch_refs)
    hidden.stop_gradient = False
    (sample,) = model.jit_forward(hidden, *rest, return_dict=False)
    np.testing.assert_allclose(sample.numpy(), torch_refs["tr_out"], rtol=0, atol=2e-5)
    sample.square().mean().backward()
    np.testing.assert_allclose(hidden.grad.numpy(), torch_refs["tr_grad_h"], rtol=0, atol=2e-7)


@pytest.mark.parametrize("decomposed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_static_graphs_give_the_velocity_of_diffusers(fp32_folder, torch_refs, capsys, decomposed):
    """decomposed: as with FLAGS_prim_all, operators are split into primitive ones first."""
    model = load_transformer(fp32_folder / "transformer", "float32")
    before = paddle.base.core._is_all_prim_enabled()
    paddle.base.core._set_prim_all_enabled(decomposed)
    try:
        compile_transformer(model)
        with paddle.no_grad():
            sample = model(*inputs(torch_refs)).sample
    finally:
        paddle.base.core._set_prim_all_enabled(before)
    np.testing.assert_allclose(sample.numpy(), torch_refs["tr_out"], rtol=0, atol=2e-5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "CINN", "jit_transformer_blocks", "jit_single_transformer_blocks"
    ]  # fmt: skip


def test_new_shapes_compile_once_more_and_old_ones_are_kept(compiled, capsys):
    model, eager = compiled
    capsys.readouterr()
    said = []
    for tokens, seed in ((4, 0), (4, 1), (6, 2), (6, 3), (4, 4)):
        args = tiny_inputs(tokens, seed)
        with paddle.no_grad():
            np.testing.assert_allclose(model(*args).sample, eager(*args).sample, rtol=0, atol=1e-5)
        said.append(capsys.readouterr().out)
    assert "compiled for shapes 1x4x16, 1x3x16, 1x16, 7x4, 7x4 in" in said[0]
    assert "compiled again for new shapes 1x6x16" in said[2]
    assert [bool(text) for text in said] == [True, False, True, False, False]
    graphs = (model.jit_transformer_blocks, model.jit_single_transformer_blocks)
    assert [len(graph._call.program_cache) for graph in graphs] == [2, 2]


def test_a_merged_lora_is_in_the_graphs(build_flux, capsys):
    models = [build_flux(double=1, single=1).eval() for _ in range(2)]
    for model in models:
        for layer in inject_lora(model, 2, 4.0).values():
            values = np.random.default_rng(0).standard_normal(layer.lora_B.shape) * 0.2
            layer.lora_B.set_value(values.astype("float32"))
    model, eager = models
    with pytest.raises(ConfigError, match="merge it first"):
        compile_transformer(model)
    with pytest.raises(ConfigError, match="merge_lora"):
        model.jit_forward(*tiny_inputs(4), joint_attention_kwargs={"scale": 0.5})
    merge_lora(model)
    compile_transformer(model)
    with paddle.no_grad():
        got, want = model(*tiny_inputs(4)).sample.numpy(), eager(*tiny_inputs(4)).sample.numpy()
        for layer in lora_layers(eager).values():
            layer.enabled = False
        without = eager(*tiny_inputs(4)).sample.numpy()
    assert np.abs(want - without).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_weights_changed_after_compiling_count(compiled):
    """Graphs share the parameters of the model: there is no second copy."""
    model, eager = compiled
    args = tiny_inputs(4)
    with paddle.no_grad():
        before = model(*args).sample.numpy()
        for changed in (model, eager):
            weight = changed.single_transformer_blocks[0].proj_out.weight
            weight.set_value(weight * 1.5)
        after = model(*args).sample.numpy()
        np.testing.assert_allclose(after, eager(*args).sample, rtol=0, atol=1e-5)
    assert np.abs(after - before).max() > 1e-4


def test_jit_forward_names_mistakes(model, torch_refs):
    *rest, guidance = inputs(torch_refs)
    with pytest.raises(ConfigError, match="guidance is absent"):
        model.jit_forward(*rest)
    with pytest.raises(ConfigError, match="scael"):
        model.jit_forward(*rest, guidance=guidance, joint_attention_kwargs={"scael": 1})


@pytest.mark.parametrize(
    ("built", "device", "environment", "reason"),
    [
        (False, "cpu", {}, "built without it"),
        (True, "cpu", {}, "the device is cpu"),
        (True, "gpu:0", {"FLAGS_use_cinn": "0"}, "FLAGS_use_cinn=0"),
        (True, "gpu:0", {"ENABLE_CINN_IN_DY2ST": "False"}, "ENABLE_CINN_IN_DY2ST=False"),
        (True, "gpu:0", {"FLAGS_use_cinn": "1"}, None),
    ],
)
def test_why_cinn_is_missing(monkeypatch, built, device, environment, reason):
    for name in ("FLAGS_use_cinn", "ENABLE_CINN_IN_DY2ST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lightning.paddle, "is_compiled_with_cinn", lambda: built)
    monkeypatch.setattr(lightning.paddle, "get_device", lambda: device)
    found = cinn_missing()
    assert found is None if reason is None else reason in found
