"""Files of other programs against the published naming tables: every delta-W by hand, in float64.

The test model has width 16 and an MLP of 64. A file is decoded here without the code under test.
"""

from typing import get_args

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy

from ppcoat.config.training_sections import LoRAFormat
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAModule, inject_lora, load_lora, lora_layers, remove_lora, save_lora, writing
from ppcoat.lora.files import read_lora_file
from ppcoat.lora.parse import parse_lora
from ppcoat.lora.writing import write_lora_file

D, S = "transformer_blocks.0", "single_transformer_blocks.1"
# BFL's name with dots (black-forest-labs/flux), rows of the part in it, diffusers' path, columns
TABLE = [
    ("double_blocks.0.img_attn.qkv", 0, 16, f"{D}.attn.to_q", 16),
    ("double_blocks.0.img_attn.qkv", 16, 32, f"{D}.attn.to_k", 16),
    ("double_blocks.0.img_attn.qkv", 32, 48, f"{D}.attn.to_v", 16),
    ("double_blocks.0.txt_attn.qkv", 0, 16, f"{D}.attn.add_q_proj", 16),
    ("double_blocks.0.txt_attn.qkv", 16, 32, f"{D}.attn.add_k_proj", 16),
    ("double_blocks.0.txt_attn.qkv", 32, 48, f"{D}.attn.add_v_proj", 16),
    ("double_blocks.0.img_attn.proj", 0, 16, f"{D}.attn.to_out.0", 16),
    ("double_blocks.0.txt_attn.proj", 0, 16, f"{D}.attn.to_add_out", 16),
    ("double_blocks.0.img_mlp.0", 0, 64, f"{D}.ff.net.0.proj", 16),
    ("double_blocks.0.img_mlp.2", 0, 16, f"{D}.ff.net.2", 64),
    ("double_blocks.0.txt_mlp.0", 0, 64, f"{D}.ff_context.net.0.proj", 16),
    ("double_blocks.0.txt_mlp.2", 0, 16, f"{D}.ff_context.net.2", 64),
    ("double_blocks.0.img_mod.lin", 0, 96, f"{D}.norm1.linear", 16),
    ("double_blocks.0.txt_mod.lin", 0, 96, f"{D}.norm1_context.linear", 16),
    ("single_blocks.1.linear1", 0, 16, f"{S}.attn.to_q", 16),
    ("single_blocks.1.linear1", 16, 32, f"{S}.attn.to_k", 16),
    ("single_blocks.1.linear1", 32, 48, f"{S}.attn.to_v", 16),
    ("single_blocks.1.linear1", 48, 112, f"{S}.proj_mlp", 16),
    ("single_blocks.1.linear2", 0, 16, f"{S}.proj_out", 80),
    ("single_blocks.1.modulation.lin", 0, 48, f"{S}.norm.linear", 16),
    ("img_in", 0, 16, "x_embedder", 8),
    ("txt_in", 0, 16, "context_embedder", 24),
    ("time_in.in_layer", 0, 16, "time_text_embed.timestep_embedder.linear_1", 32),
    ("time_in.out_layer", 0, 16, "time_text_embed.timestep_embedder.linear_2", 16),
    ("vector_in.in_layer", 0, 16, "time_text_embed.text_embedder.linear_1", 12),
    ("vector_in.out_layer", 0, 16, "time_text_embed.text_embedder.linear_2", 16),
    ("guidance_in.in_layer", 0, 16, "time_text_embed.guidance_embedder.linear_1", 32),
    ("guidance_in.out_layer", 0, 16, "time_text_embed.guidance_embedder.linear_2", 16),
    ("final_layer.linear", 0, 8, "proj_out", 16),
]
# shift comes before scale in BFL's, after it in diffusers'
FINAL = ("final_layer.adaLN_modulation.1", "norm_out.linear", 32, 16)


def delta(a, b, scale=1.0):
    return scale * (np.float64(b) @ np.float64(a))


def half_swap(matrix):
    return np.concatenate([matrix[16:], matrix[:16]])


def modules_of_all_paths(rng):
    """Every path, ranks and alphas that differ -> LoRAModules and their delta-W in float64."""
    modules, deltas = {}, {}
    shapes = [(path, last - first, width) for _, first, last, path, width in TABLE]
    for i, (path, rows, width) in enumerate([*shapes, FINAL[1:]]):
        rank, alpha = 1 + i % 4, float(1 + i % 3)
        a, b = (rng.standard_normal(shape).astype("float32") for shape in ([rank, width], [rows, rank]))
        modules[path], deltas[path] = LoRAModule(a, b, alpha), delta(a, b, alpha / rank)
    return modules, deltas


def decoded(file, file_format, paths):
    """delta-W by path of a file, by the tables above."""
    tensors = load_file(file)
    if file_format == "diffusers":
        names = [("lora_A.weight", "lora_B.weight")]
        return {p: delta(*(tensors.pop(f"transformer.{p}.{n}") for n in names[0])) for p in paths}, tensors
    if file_format == "paddle":
        return {p: delta(tensors.pop(f"{p}.lora_A").T, tensors.pop(f"{p}.lora_B").T) for p in paths}, tensors
    whole = {}
    for name in {row[0] for row in TABLE} | {FINAL[0]}:
        stem = f"lora_unet_{name.replace('.', '_')}"
        if f"{stem}.alpha" in tensors:
            a, b = tensors.pop(f"{stem}.lora_down.weight"), tensors.pop(f"{stem}.lora_up.weight")
            alpha = tensors.pop(f"{stem}.alpha")
            assert alpha.shape == () and alpha == len(a)
            whole[name] = delta(a, b, float(alpha) / len(a))
    found = {path: whole[name][first:last] for name, first, last, path, _ in TABLE if path in paths}
    if FINAL[1] in paths:
        found[FINAL[1]] = half_swap(whole[FINAL[0]])
    return found, tensors


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "paddle"])
def test_written_files_hold_the_delta_of_every_module(rng, tmp_path, file_format):
    modules, want = modules_of_all_paths(rng)
    file = tmp_path / "lora.safetensors"
    said = write_lora_file(file, modules, {"trigger_word": "sks"}, file_format)
    got, rest = decoded(file, file_format, want)
    assert not rest
    assert max(error(got[path], want[path]) for path in want) < 1e-6
    assert said < 1e-6
    with safe_open(file, framework="np") as content:
        header = content.metadata()
    assert header["trigger_word"] == "sks"
    assert header["format"] == ("pd" if file_format == "paddle" else "pt")
    assert list(tmp_path.iterdir()) == [file]


def test_round_trip_over_all_formats_keeps_every_delta_rank_and_path(rng, tmp_path):
    modules, want = modules_of_all_paths(rng)
    lora, ranks = modules, {path: module.rank for path, module in modules.items()}
    for i, file_format in enumerate(["kohya", "paddle", "kohya", "diffusers", "paddle", "diffusers"]):
        file = tmp_path / f"{i}.safetensors"
        write_lora_file(file, lora, {}, file_format)
        read = read_lora_file(file)
        assert read.format == file_format and not read.unknown and read.dtypes == ("float32",)
        lora = read.modules
        assert {path: module.rank for path, module in lora.items()} == ranks
        assert max(error(delta(m.a, m.b, m.scale), want[path]) for path, m in lora.items()) < 1e-6


def test_fused_rank_is_the_sum_and_absent_parts_are_zero_rows(rng, tmp_path):
    modules, want = modules_of_all_paths(rng)
    kept = {f"{D}.attn.to_k": 2, f"{S}.attn.to_v": 1, f"{S}.attn.to_q": 3}
    modules = {path: modules[path] for path in kept}
    ranks = {path: module.rank for path, module in modules.items()}
    write_lora_file(tmp_path / "lora.safetensors", modules, {}, "kohya")
    tensors = load_file(tmp_path / "lora.safetensors")
    linear1 = [
        tensors[f"lora_unet_single_blocks_1_linear1.{name}.weight"] for name in ("lora_down", "lora_up")
    ]
    rank = ranks[f"{S}.attn.to_v"] + ranks[f"{S}.attn.to_q"]
    assert [part.shape for part in linear1] == [(rank, 16), (112, rank)]
    whole = delta(*linear1)
    assert not whole[16:32].any() and not whole[48:].any()
    assert error(whole[:16], want[f"{S}.attn.to_q"]) < 1e-6
    assert error(whole[32:48], want[f"{S}.attn.to_v"]) < 1e-6
    assert read_lora_file(tmp_path / "lora.safetensors").modules.keys() == modules.keys()


def native_kohya(rng, name, rows, rank, alpha, width=16):
    """A module as sd-scripts trains it: one dense pair and an alpha."""
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ([rank, width], [rows, rank]))
    stem = f"lora_unet_{name}"
    return {
        f"{stem}.lora_down.weight": a,
        f"{stem}.lora_up.weight": b,
        f"{stem}.alpha": np.array(alpha, "float32"),
    }


def test_native_kohya_file_shares_its_down_and_gets_its_rank_back(rng, tmp_path):
    qkv = native_kohya(rng, "double_blocks_0_img_attn_qkv", 48, 6, 1.0)
    linear1 = native_kohya(rng, "single_blocks_1_linear1", 112, 8, 3.0)
    final = native_kohya(rng, "final_layer_adaLN_modulation_1", 32, 2, 2.0)
    file = tmp_path / "native.safetensors"
    save_numpy(qkv | linear1 | final, file)
    read = read_lora_file(file)
    assert read.format == "kohya" and len(read.modules) == 8
    for tensors, scale in ((qkv, 1 / 6), (linear1, 3 / 8)):
        (a, b, _) = tensors.values()
        stem = next(iter(tensors)).split(".")[0].removeprefix("lora_unet_")
        rows = [row for row in TABLE if row[0].replace(".", "_") == stem]
        for _, first, last, path, _ in rows:
            module = read.modules[path]
            assert module.rank == len(a)
            assert error(delta(module.a, module.b, module.scale), delta(a, b[first:last], scale)) < 1e-6
    module = read.modules["norm_out.linear"]
    (a, b, _) = final.values()
    assert error(delta(module.a, module.b, module.scale), half_swap(delta(a, b))) < 1e-6
    write_lora_file(tmp_path / "again.safetensors", read.modules, {}, "kohya")
    again = load_file(tmp_path / "again.safetensors")
    for key, tensor in (qkv | linear1 | final).items():
        assert again[key].shape == tensor.shape
    for tensors, scale in ((qkv, 1 / 6), (linear1, 3 / 8), (final, 1.0)):
        down, up, alpha = (again[key] for key in tensors)
        a, b, _ = tensors.values()
        assert error(delta(down, up, alpha / len(down)), delta(a, b, scale)) < 1e-6


Q = f"{D}.attn.to_q"
NAMES = [
    (f"transformer.{Q}", ("lora_A.weight", "lora_B.weight"), "diffusers"),
    (f"base_model.model.{Q}", ("lora_A.default.weight", "lora_B.default.weight"), "PEFT"),
    (f"base_model.model.transformer.{Q}", ("lora_A.weight", "lora_B.weight"), "PEFT"),
    (f"diffusion_model.{Q}", ("lora_A.weight", "lora_B.weight"), "ComfyUI"),
    ("lora_transformer_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight"), "OneTrainer"),
    ("lycoris_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight"), "LyCORIS"),
    ("diffusion_model.double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight"), "ComfyUI"),
    ("base_model.model.double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight"), "PEFT"),
    ("double_blocks.0.img_attn.qkv", ("lora_A.weight", "lora_B.weight"), "BFL"),
    ("double_blocks.0.processor.qkv_lora1", ("down.weight", "up.weight"), "XLabs"),
]


@pytest.mark.parametrize(("stem", "roles", "program"), NAMES)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_names_of_every_program_come_to_the_same_path(model, rng, stem, roles, program, alpha):
    fused = "double_blocks" in stem
    a, b = rng.standard_normal([2, 16]), rng.standard_normal([48 if fused else 16, 2])
    tensors = {
        f"{stem}.{role}": paddle.to_tensor(np.float32(part)) for role, part in zip(roles, (a, b), strict=True)
    }
    if alpha is not None:
        tensors[f"{stem}.alpha"] = paddle.to_tensor(alpha)
    read = parse_lora(tensors, {"format": "pt"})
    assert read.format == program and not read.unknown
    assert set(read.modules) == ({Q, f"{D}.attn.to_k", f"{D}.attn.to_v"} if fused else {Q})
    scale = 1.0 if alpha is None else 0.5
    assert (
        error(delta(read.modules[Q].a, read.modules[Q].b, read.modules[Q].scale), delta(a, b[:16], scale))
        < 1e-6
    )
    assert set(load_lora(model, tensors).ranks) == set(read.modules)


def test_the_text_stream_of_xlabs_is_the_second(rng):
    stem = "double_blocks.0.processor.proj_lora2"
    tensors = {f"{stem}.down.weight": paddle.ones([2, 16]), f"{stem}.up.weight": paddle.ones([16, 2])}
    assert list(parse_lora(tensors, {}).modules) == [f"{D}.attn.to_add_out"]


@pytest.mark.parametrize(
    ("header", "suffix", "width_out", "rank", "transposed"),
    [
        ({"format": "pd"}, ".weight", 16, 4, True),
        ({"format": "pd"}, "", 64, 4, True),
        ({}, "", 16, 4, True),  # our names
        ({}, ".weight", 64, 4, True),  # only this order fits
        ({}, ".weight", 16, 4, True),  # both fit: the rank is the smaller
        ({}, ".weight", 16, 4, False),
        ({}, ".weight", 64, 4, False),
        ({"format": "pt"}, ".weight", 16, 20, False),
    ],
)
def test_layout_by_header_by_name_or_by_where_the_rank_stands(
    rng, header, suffix, width_out, rank, transposed
):
    path = Q if width_out == 16 else f"{D}.ff.net.0.proj"
    a, b = (np.float32(rng.standard_normal(shape)) for shape in ([rank, 16], [width_out, rank]))
    pair = (a.T, b.T) if transposed else (a, b)
    tensors = {
        f"transformer.{path}.lora_{role}{suffix}": paddle.to_tensor(np.ascontiguousarray(part))
        for role, part in zip("AB", pair, strict=True)
    }
    read = parse_lora(tensors, header)
    assert read.format == ("paddle" if transposed else "diffusers")
    np.testing.assert_array_equal(read.modules[path].a, a)
    np.testing.assert_array_equal(read.modules[path].b, b)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "paddle"])
def test_a_trained_lora_draws_the_same_from_every_format(model, rng, tmp_path, file_format):
    layers = inject_lora(model, rank=3, alpha=6.0)
    for layer in layers.values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32"))
    want = {
        path: 2.0 * (np.float64(x.lora_A.numpy()) @ np.float64(x.lora_B.numpy()))
        for path, x in layers.items()
    }
    summary = save_lora(
        tmp_path / "lora.safetensors", model, file_format=file_format, step=7, trigger_word="sks"
    )
    assert summary.norm == pytest.approx(np.sqrt(sum(np.sum(d**2) for d in want.values())), rel=1e-6)
    assert not summary.zero
    info = load_lora(model_without_lora(model), tmp_path / "lora.safetensors")
    assert (info.step, info.trigger_word) == (7, "sks") and not info.unmatched
    loaded = lora_layers(model)
    assert loaded.keys() == want.keys()
    for path, layer in loaded.items():
        got = layer.scale * (np.float64(layer.lora_A.numpy()) @ np.float64(layer.lora_B.numpy()))
        assert error(got, want[path]) < 1e-6


def model_without_lora(model):
    remove_lora(model)
    return model


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_modules_without_effect_are_counted_and_keep_their_place(model, tmp_path, file_format):
    layers = inject_lora(model, rank=3, alpha=3.0)
    trained = [f"{D}.attn.to_k", f"{D}.ff.net.2"]
    for path in trained:
        layers[path].lora_B.set_value(paddle.ones(layers[path].lora_B.shape))
    summary = save_lora(tmp_path / "lora.safetensors", model, file_format=file_format)
    assert set(summary.zero) == set(layers) - set(trained)
    assert set(read_lora_file(tmp_path / "lora.safetensors").modules) == set(layers)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("bfloat16", 1e-4, 2.0**-7), ("float16", 1e-5, 2.0**-10)]
)
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_the_returned_error_is_that_of_rounding(rng, tmp_path, dtype, least, most, file_format):
    modules, _ = modules_of_all_paths(rng)
    assert least < write_lora_file(tmp_path / "lora.safetensors", modules, {}, file_format, dtype) < most
    assert read_lora_file(tmp_path / "lora.safetensors").dtypes == (dtype,)


@pytest.mark.parametrize("fault", ["scaled", "swapped", "extra"])
def test_a_file_that_reads_back_otherwise_is_not_kept(rng, tmp_path, monkeypatch, fault):
    modules, _ = modules_of_all_paths(rng)
    modules = {path: modules[path] for path in (Q, f"{D}.attn.to_k")}
    path, real = tmp_path / "lora.safetensors", writing.save
    write_lora_file(path, modules, {})
    before = path.read_bytes()

    def faulty(tensors, metadata):
        q, k = (f"transformer.{p}.lora_B.weight" for p in modules)
        if fault == "scaled":
            tensors[k] = tensors[k] * (1 + 1e-5)
        if fault == "swapped":
            a, b = ([f"transformer.{p}.lora_{role}.weight" for p in modules] for role in "AB")
            tensors = {
                **tensors,
                **{one[0]: tensors[one[1]] for one in (a, b)},
                **{one[1]: tensors[one[0]] for one in (a, b)},
            }
        if fault == "extra":
            tensors |= {key.replace("to_q", "to_v"): tensors[key] for key in list(tensors) if "to_q" in key}
        return real(tensors, metadata)

    monkeypatch.setattr(writing, "save", faulty)
    with pytest.raises(OSError, match=r"lora\.safetensors.*(to_q|to_k|to_v)"):
        write_lora_file(path, modules, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def pair(stem, rows=16, width=16, names=("lora_A.weight", "lora_B.weight")):
    shapes = ([2, width], [rows, 2])
    return {f"{stem}.{name}": paddle.ones(shape) for name, shape in zip(names, shapes, strict=True)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (pair(f"transformer.{Q}") | pair(Q), "A of .*to_q twice"),
        (pair(f"transformer.{Q}") | pair("diffusion_model.double_blocks.0.img_attn.qkv", 48), "to_q twice"),
        (pair("double_blocks.0.img_attn.qkv", 49), "49 rows"),
        (pair("single_blocks.0.linear1", 48), "48 rows"),
        (pair("final_layer.adaLN_modulation.1", 5), "5 rows"),
        (pair(Q) | {f"{Q}.alpha": paddle.ones([2])}, r"alpha of the LoRA is \[2\]"),
    ],
)
def test_contradictory_files_are_refused(tensors, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_lora(tensors, {})
    assert "\n" not in str(caught.value)


def test_keys_of_no_module_are_unknown():
    strange = [
        "lora_te1_text_model_q.alpha",
        f"{Q}.lokr_t2",
        "transformer_blocks.01.attn.to_q.lora_A.weight",
        "double_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.0.img_attn.qkv.alpha",
    ]
    read = parse_lora(pair(Q) | {key: paddle.ones([1]) for key in strange}, {})
    assert read.unknown == strange and list(read.modules) == [Q]


def test_what_kohya_cannot_name_is_refused(rng, tmp_path):
    module = LoRAModule(np.ones([1, 4], "float32"), np.ones([4, 1], "float32"), 1.0)
    with pytest.raises(ConfigError, match="layers.0.attention"):
        write_lora_file(tmp_path / "lora.safetensors", {"layers.0.attention": module}, {}, "kohya")
    wide = LoRAModule(np.ones([1, 4], "float32"), np.ones([8, 1], "float32"), 1.0)
    with pytest.raises(ConfigError, match="wanted 4 -> 4"):
        write_lora_file(tmp_path / "lora.safetensors", {Q: wide}, {}, "kohya")
    assert not list(tmp_path.iterdir())


def test_another_models_lora_is_read_back_too(tmp_path):
    """Only kohya's format is bound to FLUX's names."""
    module = LoRAModule(np.ones([1, 4], "float32"), np.ones([8, 1], "float32"), 1.0)
    for file_format in ("diffusers", "paddle"):
        file = tmp_path / f"{file_format}.safetensors"
        assert write_lora_file(file, {"layers.0.attention.qkv": module}, {}, file_format) == 0.0
        assert read_lora_file(file, {"layers.0.attention.qkv"}).modules.keys() == {"layers.0.attention.qkv"}
        assert read_lora_file(file).modules == {}


def test_numbers_beyond_a_dtype_and_nan_are_refused(tmp_path):
    file = tmp_path / "lora.safetensors"
    large = LoRAModule(np.ones([1, 4], "float32"), np.full([4, 1], 1e5, "float32"), 1.0)
    with pytest.raises(ConfigError, match="to_q does not fit into float16"):
        write_lora_file(file, {Q: large}, {}, dtype="float16")
    assert not list(tmp_path.iterdir())
    broken = LoRAModule(large.a, np.full([4, 1], np.nan, "float32"), 1.0)
    with pytest.raises(ConfigError, match="to_q holds NaN or infinity: nothing was saved"):
        write_lora_file(file, {Q: broken}, {})
    assert not list(tmp_path.iterdir())


def test_a_config_may_ask_for_every_format_that_is_written():
    assert get_args(LoRAFormat) == writing.FORMATS
