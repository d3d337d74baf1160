"""LoRA files: W + (alpha / r) B A by hand in numpy, for every place where alpha can stand."""

import json

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy

from ppcoat.errors import ConfigError
from ppcoat.lora import (
    inject_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    put_adapters,
    read_fitting,
    remove_lora,
    save_lora,
)
from ppcoat.lora.layer import ChangedLayer
from ppcoat.lora.loading import shapes_of
from ppcoat.nn.convert import quantize_linears

Q, PROJ = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"


def linear(model, path):
    return dict(model.named_sublayers())[path]


def pair(
    rng, path, width_in, width_out, rank, names=("lora_A.weight", "lora_B.weight"), prefix="transformer."
):
    a, b = rng.standard_normal([rank, width_in]), rng.standard_normal([width_out, rank])
    return {
        f"{prefix}{path}.{names[0]}": a.astype("float32"),
        f"{prefix}{path}.{names[1]}": b.astype("float32"),
    }


def check(model, path, tensors, scale, before):
    """The layer's output is x (W + scale * B A)^T + bias, in float64."""
    a, b = (np.float64(tensor) for key, tensor in tensors.items() if path in key and tensor.ndim == 2)
    x = np.random.default_rng(1).standard_normal([3, a.shape[1]]).astype("float32")
    weight, bias = before[path]
    want = x.astype(np.float64) @ (weight + scale * (b @ a).T) + bias
    with paddle.no_grad():
        got = linear(model, path)(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def weights(model):
    return {
        path: (np.float64(linear(model, path).weight), np.float64(linear(model, path).bias))
        for path in (Q, PROJ)
    }


@pytest.mark.parametrize(
    ("header", "alpha_key", "scale"),
    [
        ({"format": "pt"}, None, 1.0),
        ({}, 2.0, 0.5),
        ({"alpha": "32", "rank": "8"}, 2.0, 0.5),  # the tensor wins
        ({"alpha": "12", "rank": "8"}, None, 1.5),
        ({"alpha": "8"}, None, 2.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}, None, 2.0),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {
                        "transformer.r": 16,
                        "transformer.lora_alpha": 16,
                        "transformer.alpha_pattern": {"attn.to_q": 1},
                    }
                ),
                "alpha": "9",
            },
            None,
            0.25,
        ),
        (  # as diffusers anchors and escapes them
            {
                "lora_adapter_metadata": json.dumps(
                    {
                        "transformer.lora_alpha": 16,
                        "transformer.alpha_pattern": {
                            "^attn.to_q": 9,
                            f"^{Q}".replace(".", r"\."): 1,
                        },
                    }
                )
            },
            None,
            0.25,
        ),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {"transformer.lora_alpha": 4, "transformer.use_rslora": True}
                )
            },
            None,
            2.0,
        ),
    ],
)
def test_alpha_wherever_it_stands(model, rng, tmp_path, header, alpha_key, scale):
    before = weights(model)
    tensors = pair(rng, Q, 16, 16, 4)
    if alpha_key is not None:
        tensors[f"transformer.{Q}.alpha"] = np.array(alpha_key, dtype="float32")
    save_numpy(tensors, tmp_path / "lora.safetensors", metadata=header or None)
    info = load_lora(model, tmp_path / "lora.safetensors")
    assert info.ranks == {Q: 4} and info.scales[Q] == pytest.approx(scale)
    check(model, Q, tensors, scale, before)


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        (".*to_q", 0.5),
        (r"transformer_blocks\.[0-9]+\.attn\.to_[qk]", 0.5),
        (r"^(single_)?transformer_blocks\.\d+\.(attn|ff)\.to_q$", 0.5),
        ("o_q", 2.0),  # not after a dot: no match
        ("to_k|to_q", 0.5),
    ],
)
def test_patterns_are_regular_expressions_as_pefts(model, rng, pattern, scale):
    header = {"lora_adapter_metadata": json.dumps(
        {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 2}})}  # fmt: skip
    tensors = {key: paddle.to_tensor(value) for key, value in pair(rng, Q, 16, 16, 4).items()}
    assert load_lora(model, tensors, metadata=header).scales[Q] == pytest.approx(scale)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "((x*)y)+", ".*.*.*.*q", r"(to)_\1", "(", "x" * 400]
)
def test_patterns_that_could_run_for_long_are_refused(model, rng, pattern):
    header = {"lora_adapter_metadata": json.dumps(
        {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 1}})}  # fmt: skip
    tensors = {key: paddle.to_tensor(value) for key, value in pair(rng, Q, 16, 16, 4).items()}
    with pytest.raises(ConfigError, match="the pattern .* cannot be used"):
        load_lora(model, tensors, metadata=header)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize(
    "names", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]
)
def test_prefixes_suffixes_and_ranks_per_module(model, rng, prefix, names):
    before = weights(model)
    tensors = pair(rng, Q, 16, 16, 3, names, prefix) | pair(rng, PROJ, 16, 64, 7, names, prefix)
    info = load_lora(model, {key: paddle.to_tensor(value) for key, value in tensors.items()}, scale=0.5)
    assert info.ranks == {Q: 3, PROJ: 7} and not info.unmatched
    check(model, Q, tensors, 0.5, before)
    check(model, PROJ, tensors, 0.5, before)
    assert all(param.stop_gradient for param in lora_parameters(model))
    remove_lora(model)
    assert not lora_layers(model)
    np.testing.assert_array_equal(linear(model, Q).weight.numpy(), before[Q][0].astype("float32"))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)]
)
def test_saved_file_has_diffusers_keys_and_folded_alpha(model, rng, tmp_path, dtype, tolerance):
    layer = inject_lora(model, rank=4, alpha=2.0, targets=["attn.to_q"])[Q]
    layer.lora_B.set_value(rng.standard_normal([4, 16]).astype("float32"))
    path = tmp_path / "new folder" / "lora.safetensors"
    save_lora(path, model, trigger_word="sks", step=50, base_model="tiny", dtype=dtype, extra={"note": "x"})
    with safe_open(path, framework="np") as file:
        header = file.metadata()
        assert f"transformer.{Q}.lora_A.weight" in file.keys()  # noqa: SIM118
        a_slice = file.get_slice(f"transformer.{Q}.lora_A.weight")
        assert a_slice.get_shape() == [4, 16]
    if dtype == "float32":
        b = load_file(path)[f"transformer.{Q}.lora_B.weight"]
        np.testing.assert_allclose(b, 0.5 * layer.lora_B.numpy().T, rtol=1e-6)
    assert (header["format"], header["rank"], header["alpha"], header["original_alpha"]) == (
        "pt",
        "4",
        "4",
        "2",
    )
    assert (header["trigger_word"], header["step"], header["base_model"], header["note"]) == (
        "sks",
        "50",
        "tiny",
        "x",
    )
    adapter = json.loads(header["lora_adapter_metadata"])
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == 4
    assert json.loads(header["training_info"]) == {"step": 50}
    assert [item.name for item in path.parent.iterdir()] == ["lora.safetensors"]

    x = paddle.to_tensor(rng.standard_normal([3, 16]).astype("float32"))
    with paddle.no_grad():
        want = layer(x).numpy()
        remove_lora(model)
        info = load_lora(model, path)
        got = linear(model, Q)(x).numpy()
    assert info.step == 50 and info.trigger_word == "sks"
    assert all(scale == 1.0 for scale in info.scales.values())
    np.testing.assert_allclose(got, want, atol=8 * tolerance * np.abs(want).max())


def test_a_file_that_fits_nothing_shows_its_keys(model, rng):
    tensors = {f"strange_{i}.lora_down.weight": paddle.ones([2, 2]) for i in range(7)}
    with pytest.raises(
        ConfigError, match="fits no layer of the model: its keys are like strange_0.* and 2 more"
    ) as error:
        load_lora(model, tensors)
    assert "\n" not in str(error.value)


def test_keys_without_a_layer_are_refused_or_listed(model, rng):
    clip = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    extra = pair(rng, clip, 2, 2, 2, prefix="") | {"what.is.this": np.ones([2], "float32")}
    tensors = {key: paddle.to_tensor(value) for key, value in (pair(rng, Q, 16, 16, 2) | extra).items()}
    with pytest.raises(ConfigError, match="1 keys of this LoRA name nothing .*ignore_unknown.* what.is.this"):
        load_lora(model, tensors)
    with pytest.raises(ConfigError, match="CLIP: LoRA on 1 layer, e.g. text_model.*fc1.weight of CLIP"):
        load_lora(model, {key: value for key, value in tensors.items() if "what" not in key})
    assert not lora_layers(model)
    info = load_lora(model, tensors, ignore_unknown=True)
    assert info.unmatched == ["what.is.this", "text_model.encoder.layers.0.mlp.fc1.weight"]
    assert info.ranks == {Q: 2}
    assert info.line() == "LoRA on 1 layer at scale 1, 2 keys left out, e.g. what.is.this"


def bad_files(rng):
    good = pair(rng, Q, 16, 16, 2)
    a, b = good
    yield {a: good[a]}, {}, "incomplete"
    yield {a: good[a].T.copy(), b: good[b].T.copy()}, {"format": "pt"}, r"\[16, 2\].*16 -> 16"
    yield {a: good[a], b: good[b][:, :1].copy()}, {}, "do not fit"
    yield good, {"alpha": "many"}, "alpha"
    yield good, {"alpha": "4", "rank": "0"}, "rank"
    yield good, {"lora_adapter_metadata": "{"}, "JSON"
    yield good | {f"transformer.{Q}.alpha": np.array(np.nan, "float32")}, {}, "alpha"


def test_bad_files_are_refused_and_change_nothing(model, rng):
    for tensors, header, said in bad_files(rng):
        with pytest.raises(ConfigError, match=said):
            load_lora(
                model, {key: paddle.to_tensor(value) for key, value in tensors.items()}, metadata=header
            )
        assert not lora_layers(model)


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.pdparams", "lora.ckpt"])
def test_pickles_are_refused_unread(model, tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ConfigError, match="pickle.*safetensors"):
        load_lora(model, tmp_path / name)


def test_missing_and_damaged_files_are_named(model, tmp_path):
    with pytest.raises(ConfigError, match="no LoRA file"):
        load_lora(model, tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(ConfigError, match=r"half\.safetensors"):
        load_lora(model, tmp_path / "half.safetensors")


def test_loading_again_replaces_what_was_loaded(model, rng):
    before = weights(model)
    for rank, path, width, scale in ((2, Q, 16, 0.0), (3, Q, 16, 1.0), (2, PROJ, 64, 1.0)):
        tensors = pair(rng, path, 16, width, rank)
        load_lora(model, {key: paddle.to_tensor(value) for key, value in tensors.items()}, scale=scale)
        assert set(lora_layers(model)) == {path}
        check(model, path, tensors, scale, before)


def test_a_lora_in_training_is_not_replaced(model, rng):
    layers = inject_lora(model, 2, 2.0, targets=["transformer_blocks.0.attn.to_q"])
    tensors = {key: paddle.to_tensor(value) for key, value in pair(rng, Q, 16, 16, 2).items()}
    with pytest.raises(ConfigError, match="a LoRA in training: save it, then call remove_lora"):
        load_lora(model, tensors)
    assert lora_layers(model) == layers
    remove_lora(model)
    assert load_lora(model, tensors).ranks == {Q: 2}


def test_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    inject_lora(model, 2, 2.0, targets=["attn.to_q"])
    path = tmp_path / "lora.safetensors"
    save_lora(path, model)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("ppcoat.lora.writing.save", full)
    with pytest.raises(OSError, match="space"):
        save_lora(path, model, step=2)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [("lora.bin", {}, "safetensors"), ("lora.safetensors", {"dtype": "int8"}, "int8")],
)
def test_wrong_save_settings_are_named(model, tmp_path, name, settings, said):
    inject_lora(model, 2, 2.0)
    with pytest.raises(ConfigError, match=said):
        save_lora(tmp_path / name, model, **settings)


BIASES = {  # a file -> kinds of what stands at to_q
    "diff_b": {"diff_b": np.ones(16, "float32")},
    "a difference of zeros beside it": {
        "diff": np.zeros([16, 16], "float32"),
        "diff_b": np.ones(16, "float32"),
    },
    "PEFT's bias of all": {"bias": np.ones(16, "float32")},
}


@pytest.mark.parametrize("name", BIASES)
def test_a_layer_may_change_by_its_bias_alone(model, rng, name):
    before = weights(model)
    tensors = {f"transformer.{Q}.{role}": value for role, value in BIASES[name].items()}
    tensors |= pair(rng, PROJ, 16, 64, 2)
    info = load_lora(model, {key: paddle.to_tensor(value) for key, value in tensors.items()})
    assert "bias on 1" in info.what
    bias = np.ones(16) + (0 if "bias" in BIASES[name] else before[Q][1])
    got = linear(model, Q)(paddle.eye(16)).numpy()
    np.testing.assert_allclose(got, before[Q][0] + bias, atol=1e-5)


def test_nothing_is_taken_out_before_all_that_comes_is_made(model, rng, monkeypatch):
    """A strength that is no number, and a layer of the second model that cannot be made."""
    first, second = (
        {key: paddle.to_tensor(value) for key, value in pair(rng, path, 16, width, 2).items()}
        for path, width in ((Q, 16), (PROJ, 64))
    )
    load_lora(model, first, 0.5)
    layer = linear(model, Q)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="the strength of LoRA on 1 layer must be a finite number, got"):
            load_lora(model, second, strength)
    monkeypatch.setattr("ppcoat.lora.adapters._lora_linear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_lora(model, second)
    assert lora_layers(model) == {Q: layer} and layer.scale == 0.5


def lokr(path, rows=(4, 4)):
    w1, w2 = (np.ones([height, 4], "float32") for height in rows)
    return {f"{path}.lokr_w1": w1, f"{path}.lokr_w2": w2}


def lora(path):
    return {f"{path}.lora_A.weight": np.ones([2, 16]), f"{path}.lora_B.weight": np.ones([16, 2])}


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
ON_FP8 = {  # files, and whether an unquantised weight is held
    "LoRA": ([lora(Q)], False),
    "LoRAs": ([lora(Q), lora(Q)], False),
    "LoKr": ([lokr(Q)], False),
    "bias": ([{f"{Q}.diff_b": np.ones([16])}], False),
    "LoRA and its bias": ([lora(Q) | {f"{Q}.diff_b": np.ones([16])}], True),
    "LoKr of a fused module": ([lokr(QKV, (12, 4))], True),
    "LoRA and LoKr": ([lora(Q), lokr(Q)], True),
    "difference": ([{f"{Q}.diff": np.ones([16, 16])}], True),
}


@pytest.mark.parametrize("name", ON_FP8)
def test_fp8_weights_are_held_twice_where_the_page_says_so(model, caplog, name):
    """docs/files.md, Strength."""
    quantize_linears(model)
    files, held = ON_FP8[name]
    shapes = {"transformer": shapes_of(model)}
    tensors = [
        {key: paddle.to_tensor(value.astype("float32")) for key, value in each.items()} for each in files
    ]
    put_adapters({"transformer": model}, [(read_fitting(each, shapes), 1.0) for each in tensors])
    layer = linear(model, Q)
    layer(paddle.ones([1, 16]))
    assert ("are held unquantised" in caplog.text) == held
    own = layer.changed().weight if isinstance(layer, ChangedLayer) else layer.weight
    assert isinstance(own, paddle.Tensor) == held
