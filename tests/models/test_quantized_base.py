"""The FP8 transformer: what is quantised, how exactly, its peak memory, and that a LoRA learns on it."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.lora import inject_lora, merge_lora
from ppcoat.lora.layer import linear_paths, lora_parameters
from ppcoat.models import quantized_base
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import load_transformer
from ppcoat.models.quantized_base import (
    QuantizedCopy,
    load_quantized_transformer,
    output_errors,
    weight_errors,
)
from ppcoat.models.writing import save_weights
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def tiny_flux():
    import ppcoat

    return f"{ppcoat.__path__[0]}/assets/tiny_flux/transformer"


def test_flux_dev_has_504_linears_494_of_them_in_blocks():
    with paddle.LazyGuard():
        model = FluxTransformer2DModel(guidance_embeds=True)
    paths = linear_paths(model)
    assert len(paths) == 504
    for kind, count in (("transformer_blocks.", 19 * 14), ("single_transformer_blocks.", 38 * 6)):
        assert sum(path.startswith(kind) for path in paths) == count
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    codes = sum(int(np.prod(shapes[f"{path}.weight"])) for path in paths)
    assert codes == 11_898_322_944
    assert sum(int(np.prod(shape)) for shape in shapes.values()) - codes < 3.1e6


@pytest.mark.parametrize("folder", ["fp32_folder", "bf16_folder"])
def test_every_linear_is_rounded_once_and_all_else_is_as_it_was(request, folder, assert_rounded_once):
    folder = request.getfixturevalue(folder) / "transformer"
    exact, model = load_transformer(folder), load_quantized_transformer(folder)
    fp8 = assert_rounded_once(model, exact)
    assert [path.removesuffix(".weight") for path in fp8] == linear_paths(exact)


@pytest.mark.parametrize(
    ("base", "layout"), [("int8", "pd"), ("nf4", "pt"), pytest.param("fp4", "pd", marks=pytest.mark.slow)]
)
def test_other_formats_read_in_bands_are_what_they_make_of_whole_weights(
    small_flux, tmp_path, monkeypatch, assert_same, base, layout
):
    """Bands of 128 rows, with Paddle's order of a Linear's weight too, and from the copy on disk."""
    monkeypatch.setattr(quantized_base, "BAND", 128)
    exact = load_transformer(small_flux / "transformer")
    save_weights(exact, tmp_path, "diffusion_pytorch_model")
    if layout == "pd":
        linears = {f"{path}.weight" for path in linear_paths(exact)}
        tensors = load_file(tmp_path / WEIGHTS)
        turned = {n: np.ascontiguousarray(t.T) if n in linears else t for n, t in tensors.items()}
        save_file(turned, tmp_path / WEIGHTS, {"format": "pd"})
    (tmp_path / "config.json").write_bytes((small_flux / "transformer/config.json").read_bytes())
    model, copy = load_quantized_transformer(tmp_path, base=base), QuantizedCopy(tmp_path / "c", "w", base)
    assert len(quantize_linears(exact, base)) == len(linear_paths(model))
    assert_same(model, exact)
    load_quantized_transformer(tmp_path, copy=copy, base=base)
    monkeypatch.setattr(quantized_base, "quantised_tensors", None)
    assert_same(load_quantized_transformer(tmp_path, copy=copy, base=base), exact)
    assert not QuantizedCopy(copy.folder, "w", "fp8").is_usable()  # of another format


def test_float16_sources_are_read(fp32_folder, tmp_path, rounded):
    tensors = load_file(fp32_folder / "transformer" / WEIGHTS)
    save_file({n: t.astype("float16") for n, t in tensors.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((fp32_folder / "transformer/config.json").read_bytes())
    weight = load_quantized_transformer(tmp_path).proj_out.weight.dequantized("float32").numpy()
    np.testing.assert_array_equal(
        weight, rounded(tensors["proj_out.weight"].astype("float16").astype("float32").T)
    )


def test_a_tensor_that_is_not_finite_is_named(fp32_folder, tmp_path):
    tensors = load_file(fp32_folder / "transformer" / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] * np.nan
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((fp32_folder / "transformer/config.json").read_bytes())
    with pytest.raises(ConfigError, match="proj_out.weight in .*NaN or infinities"):
        load_quantized_transformer(tmp_path)


def test_more_swapped_blocks_than_blocks_are_refused(fp32_folder):
    with pytest.raises(ConfigError, match="came 99, but this model has"):
        load_quantized_transformer(fp32_folder / "transformer", blocks_to_swap=99)


def test_errors_of_weights_are_those_of_e4m3(tiny_flux, rounded):
    rows, exact = list(weight_errors(tiny_flux)), load_transformer(tiny_flux)
    weights = {name: p.numpy() for name, p in exact.named_parameters()}
    assert sorted(row.path for row in rows) == sorted(linear_paths(exact))
    for row in rows:
        weight = weights[f"{row.path}.weight"]
        wanted = np.sqrt(np.mean((rounded(weight) - weight) ** 2.0) / np.mean(weight**2.0))
        assert row.shape == list(weight.shape)
        assert row.in_block == ("transformer_blocks." in row.path)
        assert row.relative_rms == pytest.approx(wanted, rel=1e-4)
        assert 0.02 < row.relative_rms < 0.03


def test_the_output_of_the_tiny_flux_stays_near(tiny_flux):
    # white noise of 2.65 % on all weights does the same (0.13) to this small model
    output = output_errors(tiny_flux, seeds=(0, 1))
    assert 0.02 < output.in_blocks < output.all_linears < 0.25


def test_an_fp8_base_is_neither_merged_nor_saved(fp32_folder, tmp_path):
    model = load_quantized_transformer(fp32_folder / "transformer")
    with pytest.raises(ConfigError, match="weight is stored in FP8"):
        save_weights(model, tmp_path, "model")
    inject_lora(model, 2, 2.0)
    with pytest.raises(ConfigError, match=r"attn.to_q.weight is stored in FP8: load the model unquantised"):
        merge_lora(model)


def trained_loss(model, steps: int) -> float:
    """Mean loss of the last 20 steps of a LoRA that learns one fixed target velocity for each of 4 inputs."""
    inject_lora(model, 8, 8.0)
    model.train()
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=lora_parameters(model), weight_decay=0.0)
    sizes, losses = model.config, []
    for step in range(steps):
        rng = np.random.default_rng(step % 4)

        def normal(*shape, rng=rng):
            return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))

        rows, columns = np.divmod(np.arange(16), 4)
        velocity = model(
            hidden_states=normal(2, 16, sizes.in_channels),
            encoder_hidden_states=normal(2, 8, sizes.joint_attention_dim),
            pooled_projections=normal(2, sizes.pooled_projection_dim),
            timestep=paddle.to_tensor([0.3, 0.7]),
            guidance=paddle.full([2], 3.5) if sizes.guidance_embeds else None,
            img_ids=paddle.to_tensor(np.stack([0 * rows, rows, columns], -1).astype("float32")),
            txt_ids=paddle.zeros([8, 3]),
            return_dict=False,
        )[0]
        loss = (velocity - normal(*velocity.shape)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:4])  # it has learnt
    return float(np.mean(losses[-20:]))


@pytest.mark.slow
def test_a_lora_learns_as_well_on_an_fp8_base(build_flux):
    plain, quantised = (build_flux(1, 1, 2, 32, 8, 16, 16) for _ in range(2))
    quantize_linears(quantised)
    assert abs(trained_loss(quantised, 30) / trained_loss(plain, 30) - 1) < 0.02


@pytest.mark.slow
def test_a_lora_learns_as_well_on_the_fp8_base_of_the_tiny_flux(tiny_flux):
    plain = trained_loss(load_transformer(tiny_flux), 60)
    quantised = trained_loss(load_quantized_transformer(tiny_flux), 60)
    multiplying = load_quantized_transformer(tiny_flux)
    multiply_in_fp8(multiplying)
    in_fp8 = trained_loss(multiplying, 60)
    print(f"loss {plain:.4f}, on the FP8 base {quantised:.4f}, multiplying in FP8 too {in_fp8:.4f}")
    assert quantised < 1.02 * plain and in_fp8 < 1.02 * plain


CHILD = """
import json, sys
import numpy as np, paddle
from ppcoat.device import keep_freed_memory
from ppcoat.models.quantized_base import load_quantized_transformer
from ppcoat.nn.base_weight import FP8Weight

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

(paddle.ones([4, 4]) @ paddle.ones([4, 4])).numpy()
before = status("VmRSS")
model = load_quantized_transformer(sys.argv[1])
fp8 = sum(layer.nbytes for layer in model.sublayers() if isinstance(layer, FP8Weight))
fp8 += sum(p.size * p.element_size() for p in model.parameters())
print(json.dumps([before, status("VmHWM"), fp8]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_fp8_model_and_a_tensor(tmp_path):
    """A folder of 800 MB in bfloat16: the whole process stays below 1.15 FP8 models, one tensor and 0.5 GB,
    beside what the imports take."""
    config = {"attention_head_dim": 128, "num_attention_heads": 10, "num_layers": 4, "num_single_layers": 6,
              "guidance_embeds": True, "in_channels": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}))
    with paddle.LazyGuard():
        model = FluxTransformer2DModel(**config)
    linears, bits = set(linear_paths(model)), np.arange(0x3C00, 0x3D00, dtype="uint16")
    tensors, biggest = {}, 0
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        shape = shape[::-1] if name.removesuffix(".weight") in linears else shape
        tensors[name] = np.resize(bits, shape).view(ml_dtypes.bfloat16)
        biggest = max(biggest, tensors[name].nbytes)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    source = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak, fp8 = json.loads(done.stdout.splitlines()[-1])
    print(f"source {source / 1e6:.0f} MB, FP8 {fp8 / 1e6:.0f} MB, peak {(peak - before) / 1e6:.0f} MB more")
    assert source > 700e6 and abs(fp8 / source - 0.5) < 0.01
    assert peak - before <= 1.15 * fp8 + biggest + 0.5e9
    assert peak - before <= 1.15 * fp8 + 6 * biggest  # and the constant is not what lets it pass
