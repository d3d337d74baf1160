"""Files that other programs wrote, against what those programs make of them: every W' - W at strengths 1 and
0.5, put into models, merged, several at once, and the pictures that diffusers draws with them."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.lora import (
    adapter_layers,
    load_lora,
    merge_lora,
    put_adapters,
    read_fitting,
    read_lora_file,
    remove_lora,
    write_lora_file,
)
from ppcoat.lora.keys import CLIP, T5, TRANSFORMER
from ppcoat.lora.layer import values_of
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_clip, load_t5, load_transformer, parameter_shapes
from ppcoat.nn.convert import quantize_linears

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE, FOLDER = FIXTURES / "tiny_flux_fp32", FIXTURES / "adapters"
TOLERANCE, PICTURES = 1e-6, 2e-5
# The group of truths of each file that is one of several spellings.
GROUPS = {
    **{f"split_{name}": "split" for name in ("diffusers", "bare", "diffusers_header", "peft", "default_infix",
                                             "alpha_keys", "onetrainer", "kohya")},
    "parts_diffusers": "parts", "outer_kohya": "outer", "outer_diffusers": "outer",
    **{f"dense_{name}": "dense" for name in ("kohya", "comfy", "comfy_down_up", "fal_kontext", "xlabs")},
    "clip_diffusers": "dense", "t5_onetrainer": "dense",
    **{f"stored_{dtype}": f"stored_{dtype}" for dtype in ("fp8_e4m3", "fp8_e5m2", "fp16", "bf16")},
}  # fmt: skip
PEFT = ("dora", "dora_no_header", "lora_bias", "rslora", "patterns", "patterns_no_header", "bias_lora_only")
LYCORIS = ("lokr_full", "lokr_w2_factored", "lokr_both_factored", "lokr_unbalanced", "lokr_tucker_asked",
           "lokr_aitoolkit_names", "loha", "locon", "dora_out", "dora_in", "dora_lokr", "dora_loha", "oft",
           "oft_constraint_rescale", "boft", "full", "glora", "ia3")  # fmt: skip
ROTATIONS = ("oft_peft", "oft_peft_exact", "oft_peft_shared", "boft_peft", "boft_peft_one")  # folders of PEFT
NAMES = (*GROUPS, *PEFT, *LYCORIS, *ROTATIONS)


def file_of(name):
    return FOLDER / name if (FOLDER / name).is_dir() else FOLDER / f"{name}.safetensors"


@pytest.fixture(scope="module")
def truths():
    with np.load(FOLDER / "truth.npz") as found, np.load(FOLDER / "peft_rotations.npz") as of_peft:
        return dict(found) | dict(of_peft)


@pytest.fixture(scope="module")
def weights():
    """{part: {parameter: float32, torch's order}} of the base."""
    return {
        TRANSFORMER: load_file(BASE / "transformer/diffusion_pytorch_model.safetensors"),
        CLIP: load_file(BASE / "text_encoder/model.safetensors"),
        T5: load_file(BASE / "text_encoder_2/model.safetensors"),
    }


@pytest.fixture(scope="module")
def transformer():
    return load_transformer(BASE / "transformer", "float32")


@pytest.fixture
def model(transformer):
    yield transformer
    remove_lora(transformer)


def wanted(truths, name, strength):
    """{parameter: what the program adds}, every second row of a weight."""
    if name in GROUPS:
        found = {key.partition("/")[2]: strength * value for key, value in truths.items()
                 if key.startswith(f"{GROUPS[name]}/")}  # fmt: skip
        of = {"clip_diffusers": "text_encoder.", "t5_onetrainer": "text_encoder_2."}.get(name)
        if of:
            return {key: value for key, value in found.items() if key.startswith(of)}
        if name in ("dense_comfy_down_up", "dense_fal_kontext", "dense_xlabs"):
            found = {key: value for key, value in found.items() if not key.startswith("text_encoder")}
        if name == "dense_xlabs":  # it has attention alone, and of single blocks linear2
            found = {key: value for key, value in found.items()
                     if ".attn." in key or (key.startswith("single") and "proj_out" in key)}  # fmt: skip
        return found
    name = "lokr_w2_factored" if name == "lokr_aitoolkit_names" else name
    for start, by in ((f"{name}/{strength}/", 1.0), (f"{name}/1.0/", strength)):
        found = {key.removeprefix(start): value * (1.0 if is_whole(name, key) else by)
                 for key, value in truths.items() if key.startswith(start)}  # fmt: skip
        if found:
            return found
    raise AssertionError(f"no truth of {name}")


def is_whole(name, key):
    """PEFT's bias="lora_only" (or "oft_only") saves biases themselves, which no strength weakens."""
    return name in ("bias_lora_only", "oft_peft_shared") and key.endswith("bias")


def added(file, weights, strength):
    """{parameter: what the file adds}, whole."""
    found = {}
    for change in file.changes:
        whole = [weights[change.part][f"{path}.{change.parameter}"] for path in change.paths]
        for path, delta in zip(change.paths, change.deltas(whole, strength), strict=True):
            part = "" if change.part == TRANSFORMER else f"{change.part}."
            found[f"{part}{path}.{change.parameter}"] = delta
    return found


def check(got, want, tolerance=TOLERANCE):
    """The same parameters and numbers."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        rows = got[key][::2] if got[key].ndim == 2 else got[key]
        np.testing.assert_allclose(rows, value, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_each_file_adds_what_its_program_adds(truths, weights, name):
    file = read_lora_file(file_of(name))
    assert not file.unknown
    for strength in (1.0, 0.5):
        check(added(file, weights, strength), wanted(truths, name, strength))


def test_a_file_beside_its_config_is_as_strong_as_its_folder(truths, weights):
    file = read_lora_file(FOLDER / "split_peft" / "adapter_model.safetensors")
    check(added(file, weights, 1.0), wanted(truths, "split_peft", 1.0))


@pytest.mark.parametrize("name", ["dora_out", "dora_in"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_dora_in_comfyuis_names_follows_comfyui(truths, weights, tmp_path, name, strength):
    tensors = {
        key.replace("lycoris_", "diffusion_model.").replace("_attn_", ".attn.")
        .replace("transformer_blocks_", "transformer_blocks."): value
        for key, value in load_file(file_of(name)).items()
    }  # fmt: skip
    save_file(tensors, tmp_path / "comfy.safetensors")
    file = read_lora_file(tmp_path / "comfy.safetensors")
    assert "ComfyUI" in file.what and "by the rule of ComfyUI" in file.notes[0]
    found = {
        key.split("/")[-1]: value for key, value in truths.items() if key.startswith(f"{name}/comfy/1.0/")
    }
    if found and strength == 1.0:
        check(added(file, weights, 1.0), found)
    whole, part = (added(file, weights, by) for by in (1.0, strength))
    check(part, {key: strength * value[::2] for key, value in whole.items()})


@pytest.mark.parametrize("name", ["control_diffusers", "control_bfl"])
def test_control_loras_are_read_whole(truths, weights, name):
    file = read_lora_file(file_of(name))
    base = {
        part: {key: value.astype("float64") for key, value in each.items()} for part, each in weights.items()
    }
    base[TRANSFORMER]["x_embedder.weight"] = np.pad(base[TRANSFORMER]["x_embedder.weight"], [(0, 0), (0, 64)])
    got = added(file, base, 1.0)
    probes = zip(truths[f"{name}/names"], truths[f"{name}/probe"], strict=True)
    names = {str(key).removeprefix("norm/"): float(value) for key, value in probes}
    assert got.keys() == names.keys()
    for key, value in names.items():
        norm = truths.get(f"{name}/truth/norm/{key}")
        if norm is not None:
            np.testing.assert_allclose(got[key] + base[TRANSFORMER][key], norm, atol=1e-12)
            continue
        left = np.cos(0.7 * np.arange(len(got[key])) + 0.2) @ got[key]
        probe = left @ np.cos(1.3 * np.arange(left.size) + 0.5) if left.ndim else left
        assert probe == pytest.approx(value, abs=1e-9), key
    half = added(file, base, 0.5)
    for key, value in got.items():
        is_whole = truths.get(f"{name}/truth/norm/{key}") is not None
        np.testing.assert_allclose(half[key], value if is_whole else 0.5 * value, rtol=0, atol=1e-12)
    assert "control_image" in read_fitting(file_of(name), parameter_shapes(BASE, TRANSFORMER)).notes[-1]


# One file of each kind that a model can hold.
KINDS = ("split_diffusers", "lora_bias", "bias_lora_only", "dora", "lokr_full", "lokr_both_factored", "loha",
         "dora_lokr", "dora_in", "oft_constraint_rescale", "boft", "full", "glora", "ia3",
         *ROTATIONS)  # fmt: skip


def parameters(model, keys):
    layers = dict(model.named_sublayers())
    return {key: values_of(layers[key.rpartition(".")[0]], key.rpartition(".")[2]) for key in keys}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_computes_with_what_the_file_adds_and_merging_adds_it(truths, weights, model, name):
    """Each layer on the identity, at strength 0.5 by way of scale_multiplier; then merged; then as it was."""
    want = wanted(truths, name, 0.5)
    before = {key: weights[TRANSFORMER][key] for key in want}
    load_lora(model, file_of(name))
    layers = adapter_layers(model)
    assert {key.rpartition(".")[0] for key in want} == set(layers)
    for layer in layers.values():
        with paddle.no_grad():  # what was made for another strength is not kept
            layer(paddle.zeros([1, layer.weight.shape[0]]))
        layer.scale_multiplier = 0.5
    with paddle.no_grad():
        for path, layer in layers.items():
            bias = before.get(f"{path}.bias", weights[TRANSFORMER][f"{path}.bias"])
            bias = bias + want.get(f"{path}.bias", 0.0)
            out = layer(paddle.eye(layer.weight.shape[0])).numpy() - bias
            # numbers near 1 in float32
            np.testing.assert_allclose(
                out.T[::2], before[f"{path}.weight"][::2] + want[f"{path}.weight"], atol=3e-6
            )
    model_before = {key: value.copy() for key, value in before.items()}
    merge_lora(model)
    got = parameters(model, want)
    try:
        check({key: got[key] - before[key] for key in want}, want, 3e-6)
    finally:
        for key, value in model_before.items():
            layer = dict(model.named_sublayers())[key.rpartition(".")[0]]
            parameter = getattr(layer, key.rpartition(".")[2])
            parameter.set_value(np.ascontiguousarray(value.T if value.ndim == 2 else value))


def test_norm_weights_are_put_in_and_taken_out(weights, model):
    path = "transformer_blocks.0.attn.norm_q"
    new = np.linspace(0.5, 1.5, 32, dtype="float32")
    file = {f"transformer.{path}.weight": paddle.to_tensor(new)}
    pair = {f"transformer.proj_out.lora_{each}.weight": paddle.ones(shape)
            for each, shape in (("A", [2, 64]), ("B", [64, 2]))}  # fmt: skip
    x, angles = paddle.randn([1, 3, 64]), (paddle.ones([3, 16]), paddle.zeros([3, 16]))
    layer = dict(model.named_sublayers())[path]
    before = layer(x, *angles).numpy()
    info = load_lora(model, file | pair)
    assert info.what == "norm on 1 layer, LoRA on 1"
    changed = dict(model.named_sublayers())[path]
    after = changed(x, *angles).numpy()
    ratio = new / weights[TRANSFORMER][f"{path}.weight"]
    np.testing.assert_allclose(after, before * ratio, rtol=1e-5, atol=1e-6)
    assert dict(model.named_parameters())[f"{path}.weight"] is layer.weight
    remove_lora(model)
    np.testing.assert_array_equal(dict(model.named_sublayers())[path](x, *angles).numpy(), before)


def test_several_at_once_add_up_each_from_the_base(truths, weights, model):
    """Two LoRAs become one LoRALinear; a LoRA and a DoRA on one Linear a changed layer."""
    shapes = parameter_shapes(BASE, TRANSFORMER)
    both = "transformer_blocks.0.attn.to_q.weight"
    for names, kind in (
        (("split_kohya", "parts_diffusers"), "LoRALinear"),
        (("split_kohya", "dora"), "ChangedLayer"),
    ):
        files = [read_fitting(file_of(name), shapes) for name in names]
        put_adapters({TRANSFORMER: model}, list(zip(files, (0.5, 1.0), strict=True)))
        want = [wanted(truths, name, by)[both] for name, by in zip(names, (0.5, 1.0), strict=True)]
        layer = adapter_layers(model)[both.removesuffix(".weight")]
        assert type(layer).__name__ == kind
        with paddle.no_grad():
            out = layer(paddle.eye(64)).numpy() - weights[TRANSFORMER][both.replace("weight", "bias")]
        np.testing.assert_allclose(out.T[::2] - weights[TRANSFORMER][both][::2], sum(want), atol=3e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("split_kohya", "LoRALinear"),
        ("lokr_full", "LoKrLinear"),
        ("dora", "DoRALinear"),
        ("dora_out", "ChangedLayer"),
    ],
)
def test_an_fp8_base_takes_every_kind(truths, weights, caplog, name, kind):
    model = load_transformer(BASE / "transformer", "float32")
    quantize_linears(model)
    load_lora(model, file_of(name))
    want, layers = wanted(truths, name, 1.0), adapter_layers(model)
    assert {type(layer).__name__ for layer in layers.values()} == {kind}
    assert ("are held unquantised" in caplog.text) == (kind == "ChangedLayer")
    path, layer = next(iter(layers.items()))
    exact = values_of(layer.base, "weight")
    with paddle.no_grad():
        out = layer(paddle.eye(exact.shape[1])).numpy() - layer.bias.numpy()
    rough = np.abs(
        exact - weights[TRANSFORMER][f"{path}.weight"]
    ).max()  # of the FP8 base; DoRA is made from it
    tolerance = 4 * rough if name.startswith("dora") else 3e-6
    np.testing.assert_allclose(out.T[::2] - exact[::2], want[f"{path}.weight"], atol=tolerance)
    with pytest.raises(ConfigError, match="stored in FP8"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        *[(name, file_format) for name in ("dense_kohya", "split_peft") for file_format in
          ("diffusers", "kohya", "paddle")],
        *[(name, "diffusers") for name in ("dora", "lora_bias", "bias_lora_only", "control_bfl")],
    ],
)  # fmt: skip
def test_what_a_format_holds_comes_back_the_same(weights, tmp_path, name, file_format):
    file = read_lora_file(file_of(name))
    out = tmp_path / "out.safetensors"
    assert write_lora_file(out, file.modules, {}, file_format, others=file.others) < 1e-6
    again = read_lora_file(out)
    said = again.header.get("lora_adapter_metadata", "")
    assert ("use_dora" in said, "lora_bias" in said) == (name == "dora", name in ("lora_bias", "control_bfl"))
    base = {part: dict(each) for part, each in weights.items()}
    if name == "control_bfl":
        base[TRANSFORMER]["x_embedder.weight"] = np.pad(
            base[TRANSFORMER]["x_embedder.weight"], [(0, 0), (0, 64)]
        )
    want, got = added(file, base, 0.5), added(again, base, 0.5)
    assert got.keys() >= want.keys() and not again.unknown
    for key in got:
        np.testing.assert_allclose(got[key], want.get(key, 0.0 * got[key]), rtol=0, atol=1e-6, err_msg=key)


def renamed_to_bfl(tensors):
    """LyCORIS' file on diffusers' modules that BFL has under names of their own."""
    new = {"lycoris_transformer_blocks_1_attn_to_q": "lora_unet_double_blocks_1_img_attn_proj",
           "lycoris_single_transformer_blocks_0_attn_to_k": "lora_unet_double_blocks_0_txt_attn_proj",
           }  # fmt: skip
    return {new[key.partition(".")[0]] + "." + key.partition(".")[2]: value for key, value in tensors.items()}


@pytest.mark.parametrize("name", ["lokr_unbalanced", "lokr_tucker_asked", "dora_out", "dora_lokr", "oft",
                                  "oft_constraint_rescale", "boft", "glora", "ia3"])  # fmt: skip
def test_kohyas_format_holds_what_lycoris_knows(weights, tmp_path, name):
    save_file(renamed_to_bfl(load_file(file_of(name))), tmp_path / "in.safetensors")
    file, out = read_lora_file(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    write_lora_file(out, file.modules, {}, "kohya", others=file.others)
    want, got = added(file, weights, 0.5), added(read_lora_file(out), weights, 0.5)
    assert got.keys() == want.keys() and any(value.any() for value in want.values())
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-6)
    for file_format in ("diffusers", "paddle"):
        with pytest.raises(
            ConfigError, match=f"the format of {file_format} has no place for .* on 2 layers, e.g."
        ):
            write_lora_file(tmp_path / "no.safetensors", file.modules, {}, file_format, others=file.others)


@pytest.mark.parametrize("name", ["loha", "full", "dora_loha"])
def test_a_fused_module_of_any_kind_is_cut_to_the_parts(weights, tmp_path, name):
    """A kohya file with the same factors on img_attn.proj and, three times side by side, on img_attn.qkv."""
    tensors = {key: value for key, value in load_file(file_of(name)).items()
               if "add_v_proj" in key or "add_q_proj" in key or "attn_to_k" in key}  # fmt: skip
    stem = next(iter(tensors)).partition(".")[0]
    own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(stem + ".")}
    of_rows = ("hada_w1_a", "hada_w2_a", "diff", "diff_b")
    rows = {role: np.concatenate([value] * 3) if role in of_rows else value for role, value in own.items()}
    save_file({f"lora_unet_double_blocks_1_img_attn_qkv.{role}": value for role, value in rows.items()},
              tmp_path / "qkv.safetensors")  # fmt: skip
    fused = added(read_lora_file(tmp_path / "qkv.safetensors"), weights, 1.0)
    paths = [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]
    assert {key.rpartition(".")[0] for key in fused} == set(paths)
    whole = np.concatenate([weights[TRANSFORMER][f"{path}.weight"] for path in paths])
    if name == "dora_loha":
        update = np.concatenate([rows_of_loha(own)] * 3)
        turned = whole + update
        want = turned * own["dora_scale"] / np.linalg.norm(turned, axis=0, keepdims=True) - whole
    else:
        want = np.concatenate([rows_of_loha(own) if name == "loha" else own["diff"]] * 3)
    got = np.concatenate([fused[f"{path}.weight"] for path in paths])
    np.testing.assert_allclose(got, want, atol=1e-6)


def fused_tensors(name, rng):
    """{role: tensor} of a kind on img_attn.qkv, 64 -> 192, whose change of each row depends on the others."""
    if name == "dora":
        a, b = (rng.standard_normal(shape).astype("float32") * 0.1 for shape in ([4, 64], [192, 4]))
        return {"lora_down.weight": a, "lora_up.weight": b,
                "dora_scale": np.linspace(0.5, 2, 64, dtype="float32")[None]}  # fmt: skip
    blocks = rng.standard_normal([2, 96, 96]).astype("float32") * 0.05  # the second begins in to_k
    return {"oft_blocks": blocks, "alpha": np.zeros([], "float32")}


@pytest.mark.parametrize("name", ["dora", "oft"])
def test_a_fused_module_is_merged_as_one_though_nothing_was_computed_before(weights, tmp_path, name):
    """Each part is made from the weights before the merge, and the whole change once."""
    model = load_transformer(BASE / "transformer", "float32")
    tensors = fused_tensors(name, np.random.default_rng(0))
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    save_file({f"{stem}.{role}": value for role, value in tensors.items()}, tmp_path / "qkv.safetensors")
    file = read_fitting(tmp_path / "qkv.safetensors", parameter_shapes(BASE, TRANSFORMER))
    want, (change,) = added(file, weights, 0.5), file.changes
    real, calls = type(change.kind).delta, []
    counted = lambda *of: calls.append(1) or real(*of)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(change.kind), "delta", counted)
        put_adapters({TRANSFORMER: model}, [(file, 0.5)])
        merge_lora(model)
    assert len(calls) == 1 and len(want) == 3
    for key, value in parameters(model, want).items():
        np.testing.assert_allclose(value - weights[TRANSFORMER][key], want[key], atol=1e-6)


def test_parts_of_a_fused_module_are_merged_each_at_its_own_strength(weights, tmp_path):
    """to_q is made already when the merge begins, the others are not."""
    model = load_transformer(BASE / "transformer", "float32")
    tensors = fused_tensors("oft", np.random.default_rng(0))
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    save_file({f"{stem}.{role}": value for role, value in tensors.items()}, tmp_path / "qkv.safetensors")
    file = read_fitting(tmp_path / "qkv.safetensors", parameter_shapes(BASE, TRANSFORMER))
    put_adapters({TRANSFORMER: model}, [(file, 1.0)])
    for path, layer in adapter_layers(model).items():
        layer.changed()
        layer.scale_multiplier = 1.0 if path.endswith("to_q") else 0.5
    merge_lora(model)
    whole, half = added(file, weights, 1.0), added(file, weights, 0.5)
    for key, value in parameters(model, whole).items():
        want = whole[key] if "to_q" in key else half[key]
        np.testing.assert_allclose(value - weights[TRANSFORMER][key], want, atol=1e-6)


def test_bfls_last_modulation_has_shift_before_scale_for_every_kind(weights, tmp_path):
    """IA3 there multiplies rows of the base weight: rows and factors must be of one order."""
    weight = weights[TRANSFORMER]["norm_out.linear.weight"]
    factors = np.linspace(-1, 1, len(weight), dtype="float32")
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    save_file(
        {f"{stem}.weight": factors, f"{stem}.on_input": np.zeros([], "float32")},
        tmp_path / "last.safetensors",
    )
    got = added(read_lora_file(tmp_path / "last.safetensors"), weights, 0.5)["norm_out.linear.weight"]
    shift, scale = np.split(factors, 2)
    np.testing.assert_allclose(got, 0.5 * np.concatenate([scale, shift])[:, None] * weight, atol=1e-7)


def rows_of_loha(own):
    scale = float(own["alpha"]) / len(own["hada_w1_b"])
    return scale * (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])


PROMPTS = {"peft": "the quick brown fox jumps over lazy dog, cinematic!"}
CAT = "a photo of cat holding a sign that says hello world"
OFTEN = ("dense_without_t5", "dora", "oft")
SELDOM = (
    "split",
    "bias_lora_only",
    "lora_bias",
    "rslora",
    "patterns",
    "lokr_w2_factored",
    "loha",
    "dora_out",
    "full",
)


@pytest.fixture(scope="module")
def pipeline():
    found = FluxPipeline.from_pretrained(BASE, "float32")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def clean_pipeline(pipeline):
    yield pipeline
    pipeline.unload_lora_weights()


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in SELDOM)])
def test_pictures_are_those_of_diffusers(clean_pipeline, name):
    with np.load(FOLDER / "pictures.npz") as pictures:
        want, room = pictures[name], "lycoris" if name in LYCORIS else "peft" if name in PEFT else "names"
        noise = pictures[f"noise_{room}"]
    of = {"split": "split_kohya", "dense_without_t5": "dense_kohya"}.get(name, name)
    tensors = None
    if name == "dense_without_t5":  # diffusers has no LoRA of T5
        tensors = {
            key: paddle.to_tensor(value) for key, value in load_file(file_of(of)).items() if "te3" not in key
        }
    clean_pipeline.load_lora_weights(tensors or file_of(of))
    height, width, _ = want.shape
    found = clean_pipeline(
        PROMPTS.get(room, CAT), height=height, width=width, num_inference_steps=4, guidance_scale=3.5,
        max_sequence_length=16, latents=paddle.to_tensor(noise), output_type="np",
    ).images[0]  # fmt: skip
    np.testing.assert_allclose(found, want, rtol=0, atol=PICTURES)


def test_lora_of_the_text_encoders_is_applied_scaled_and_taken_off(clean_pipeline, weights, truths):
    """As the encoders whose weights hold it."""
    pipeline = clean_pipeline
    plain = [each.numpy() for each in pipeline.encode_prompt(CAT, max_sequence_length=16)[:2]]
    want = {
        part: wanted(truths, name, 0.5) for part, name in ((CLIP, "clip_diffusers"), (T5, "t5_onetrainer"))
    }
    merged = {CLIP: load_clip(BASE / "text_encoder"), T5: load_t5(BASE / "text_encoder_2")}
    file = read_fitting(file_of("dense_comfy"), parameter_shapes(BASE, TRANSFORMER, CLIP, T5))
    put_adapters(merged, [(file, 0.5)])
    for part, model in merged.items():
        assert set(want[part]) == {f"{part}.{path}.weight" for path in adapter_layers(model)}
        merge_lora(model)
        key = next(iter(want[part])).removeprefix(f"{part}.")
        got = values_of(dict(model.named_sublayers())[key.removesuffix(".weight")], "weight")
        np.testing.assert_allclose((got - weights[part][key])[::2], want[part][f"{part}.{key}"], atol=1e-6)
    info = pipeline.load_lora_weights(file_of("dense_comfy"))
    assert info.what == "LoRA on 20 layers, CLIP: LoRA on 18, T5: LoRA on 21"
    assert pipeline.get_list_adapters() == {part: ["default_0"] for part in (TRANSFORMER, CLIP, T5)}
    with pipeline._lora_scaled({"scale": 0.5}):
        found = [each.numpy() for each in pipeline.encode_prompt(CAT, max_sequence_length=16)[:2]]
    own, own_2 = pipeline.text_encoder, pipeline.text_encoder_2
    pipeline.unload_lora_weights()
    off = [each.numpy() for each in pipeline.encode_prompt(CAT, max_sequence_length=16)[:2]]
    try:
        pipeline.text_encoder, pipeline.text_encoder_2 = merged[CLIP], merged[T5]
        both = [each.numpy() for each in pipeline.encode_prompt(CAT, max_sequence_length=16)[:2]]
    finally:
        pipeline.text_encoder, pipeline.text_encoder_2 = own, own_2
    for before, scaled, whole, after in zip(plain, found, both, off, strict=True):
        np.testing.assert_allclose(scaled, whole, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(after, before)
        assert np.abs(scaled - before).max() > 1e-3


def test_the_calls_of_diffusers_users(clean_pipeline, weights):
    pipeline, path = clean_pipeline, "transformer_blocks.0.attn.to_q"
    layer = lambda: dict(pipeline.transformer.named_sublayers())[path]  # noqa: E731
    base = weights[TRANSFORMER][f"{path}.weight"]
    pipeline.load_lora_weights(
        FOLDER, weight_name="split_kohya.safetensors", adapter_name="a", from_diffusers=True
    )
    pipeline.load_lora_weights(file_of("parts_diffusers"), "b")
    assert pipeline.get_active_adapters() == ["b"]
    pipeline.set_adapters(["a", "b"], [0.5, 2.0])
    assert pipeline.get_active_adapters() == ["a", "b"] and layer().rank == 8
    deltas = {name: added(read_lora_file(file_of(name)), weights, 1.0)[f"{path}.weight"]
              for name in ("split_kohya", "parts_diffusers")}  # fmt: skip
    pipeline.fuse_lora(lora_scale=0.5)
    want = base + 0.25 * deltas["split_kohya"] + deltas["parts_diffusers"]
    np.testing.assert_allclose(values_of(layer(), "weight"), want, atol=1e-6)
    for call in (
        pipeline.fuse_lora,
        lambda: pipeline.set_adapters("a"),
        lambda: pipeline.load_lora_weights({}, "c"),
    ):
        with pytest.raises(ConfigError, match="call unfuse_lora first"):
            call()
    pipeline.unfuse_lora()
    np.testing.assert_array_equal(values_of(layer().base, "weight"), base)
    assert pipeline.get_active_adapters() == ["a", "b"] and layer().rank == 8
    for _ in range(2):
        pipeline.disable_lora()
        assert pipeline.get_active_adapters() == [] and not hasattr(layer(), "rank")
    pipeline.delete_adapters("b")
    pipeline.enable_lora()
    assert pipeline.get_active_adapters() == ["a"] and layer().rank == 4
    pipeline.disable_lora()
    pipeline.set_adapters("a", 2.0)
    pipeline.enable_lora()
    assert pipeline._lora_adapters().strengths == {"a": 2.0}
    pipeline.load_lora_weights(file_of("parts_diffusers"), 0.25)  # a number there is the scale, as it was
    assert pipeline.get_active_adapters() == ["default_0"] and layer().scale == 0.25
    for call, said in (
        (lambda: pipeline.set_adapters("a"), "no adapter 'a' is loaded; there are default_0"),
        (lambda: pipeline.set_adapters("default_0", [1.0, 2.0]), "as many strengths"),
        (lambda: pipeline.set_adapters("default_0", np.nan), "must be a finite number, got nan"),
        (lambda: pipeline.load_lora_weights(file_of("dora"), scale=np.nan), "must be a finite number"),
        (lambda: pipeline.set_adapters("default_0", {"unet": 1}), "give numbers"),
        (lambda: pipeline.load_lora_weights(file_of("dora"), "default_0"), "is loaded already"),
        (lambda: pipeline.delete_adapters("x"), "no adapter 'x'"),
        (pipeline.unfuse_lora, "nothing is fused"),
        (lambda: pipeline.fuse_lora(components=["unet"]), "components are of transformer"),
        (
            lambda: pipeline.load_lora_weights(FOLDER),
            "is a folder, wanted one LoRA file: it has .*; name the file",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    assert pipeline.get_active_adapters() == ["default_0"] and layer().scale == 0.25
    pipeline.unload_lora_weights()
    assert pipeline.get_active_adapters() == [] and layer().weight.shape == [64, 64]
    assert not adapter_layers(pipeline.transformer)


def test_a_part_of_the_pipeline_is_fused_alone(clean_pipeline, weights):
    """The others keep their adapters, also where these are unloaded while the part is fused."""
    pipeline, path = clean_pipeline, "text_model.encoder.layers.0.mlp.fc1"
    state = lambda: [len(adapter_layers(each)) for each in (pipeline.transformer, pipeline.text_encoder)]  # noqa: E731
    value = lambda: values_of(dict(pipeline.text_encoder.named_sublayers())[path], "weight")  # noqa: E731
    pipeline.load_lora_weights(file_of("dense_comfy"), scale=0.5)
    both, scale = state(), pipeline.transformer.transformer_blocks[0].attn.to_q.scale
    pipeline.fuse_lora(components=["text_encoder"], lora_scale=2.0)
    assert state() == [both[0], 0] and (value() != weights[CLIP][f"{path}.weight"]).any()
    assert pipeline.transformer.transformer_blocks[0].attn.to_q.scale == scale
    pipeline.unfuse_lora()
    assert state() == both
    np.testing.assert_array_equal(value(), weights[CLIP][f"{path}.weight"])
    pipeline.fuse_lora(components=["transformer"])
    assert state() == [0, both[1]]
    pipeline.unload_lora_weights()
    assert state() == [0, 0]
    pipeline.unfuse_lora()
    pipeline.load_lora_weights(file_of("split_kohya"))
    for components, said in (
        (["text_encoder"], "change transformer only: nothing to fuse in text_encoder"),
        ([], "no part"),
    ):
        with pytest.raises(ConfigError, match=said):
            pipeline.fuse_lora(components=components)
    assert state() == [14, 0]


def test_a_refused_fuse_changes_nothing(weights):
    """The transformer is merged already when an encoder with FP8 weights refuses; and other refusals."""
    pipeline = FluxPipeline.from_pretrained(BASE, "float32")
    quantize_linears(pipeline.text_encoder_2)
    pipeline.load_lora_weights(file_of("dense_comfy"), "all", scale=0.5)
    pipeline.load_lora_weights(file_of("split_kohya"), "a")
    pipeline.set_adapters("all", 0.5)
    models = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    before = [adapter_layers(model) for model in models]
    layer = before[0]["transformer_blocks.0.attn.to_q"]
    layer.scale_multiplier = 0.75
    for arguments, said in (
        ({"lora_scale": 0.25}, "stored in FP8"),
        ({"adapter_names": ["a", "all"]}, "stored in FP8"),
        ({"adapter_names": ["a"], "lora_scale": np.nan}, "must be a finite number, got nan"),
        ({"adapter_names": []}, "no adapter is active"),
        ({"adapter_names": ["x"]}, "no adapter 'x'"),
    ):
        with pytest.raises(ConfigError, match=said):
            pipeline.fuse_lora(**arguments)
        assert [adapter_layers(model) for model in models] == before and layer.scale_multiplier == 0.75
        assert pipeline.get_active_adapters() == ["all"] and pipeline._lora_adapters().strengths["all"] == 0.5
        for model, part in zip(models[:2], (TRANSFORMER, CLIP), strict=True):
            for name, parameter in model.named_parameters():
                if name in weights[part]:
                    values = parameter.numpy()
                    want = weights[part][name]
                    linear = values.ndim == 2 and "embedding" not in name
                    np.testing.assert_array_equal(values.T if linear else values, want)
    pipeline.fuse_lora(components=["transformer", "text_encoder"])
    assert [len(adapter_layers(model)) > 0 for model in models] == [False, False, True]
