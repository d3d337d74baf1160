"""GGUF against the package of llama.cpp, and the memory that encoded files take while they are read."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.models import gguf_files
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import linear_weights, load_component
from ppcoat.models.single_file import components_in

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, FULL = FIXTURES / "single_file", FIXTURES / "tiny_flux_fp32"
BF16 = FOLDER / "flux_bfl_bf16.safetensors"


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs:
        return dict(refs)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K",
                                  "Q5_K", "Q6_K", "IQ4_XS"])  # fmt: skip
def test_blocks_of_gguf_are_those_of_llama_cpp(refs, kind):
    rows, wanted = refs[f"blocks/{kind}/bytes"], refs[f"blocks/{kind}/values"]
    assert gguf_files.row_bytes(wanted.shape[1], kind) == rows.shape[1]
    np.testing.assert_allclose(gguf_files.decoded(rows, kind), wanted, rtol=1e-6 if "K" in kind else 0)


def test_t5_is_read_from_gguf_under_the_names_of_llama_cpp(tmp_path):
    """Its shapes tell T5's config, and blocks its values."""
    folder = load_component(FULL / "text_encoder_2", "text_encoder_2", "float32")
    names = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}
    inside = {"SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v",
              "SelfAttention.o": "attn_o", "SelfAttention.relative_attention_bias": "attn_rel_b",
              "DenseReluDense.wi_0": "ffn_gate", "DenseReluDense.wi_1": "ffn_up",
              "DenseReluDense.wo": "ffn_down"}  # fmt: skip
    writer, kind = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder"), gguf.GGMLQuantizationType.Q8_0
    wanted = {}
    for name, tensor in load_file(FULL / "text_encoder_2/model.safetensors").items():
        module = name.removesuffix(".weight")
        if module not in names:
            _, _, block, _, layer, rest = module.split(".", 5)
            norm = "attn_norm" if layer == "0" else "ffn_norm"
            names[module] = f"enc.blk.{block}.{inside.get(rest, norm)}"
        quantised = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        blocks = gguf.quantize(tensor, kind) if quantised else tensor
        wanted[name] = gguf.dequantize(blocks, kind) if quantised else tensor
        writer.add_tensor(f"{names[module]}.weight", blocks, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    component = FluxFiles.found(BF16, text_encoders=tmp_path / "t5.gguf")["text_encoder_2"]
    told = {key: value for key, value in component.config.items() if key in folder.source_config}
    assert told == {key: folder.source_config[key] for key in told} and "d_kv" in told
    model = load_component(component, "text_encoder_2", "float32").state_dict()
    for name, values_of in wanted.items():
        got = model[name].numpy()
        linear = any(part in name for part in ("SelfAttention", "DenseRelu")) and "bias" not in name
        np.testing.assert_array_equal(got.T if linear else got, values_of, err_msg=name)
    other = shutil.copy(tmp_path / "t5.gguf", tmp_path / "llama.gguf")
    Path(other).write_bytes(Path(other).read_bytes().replace(b"t5encoder", b"llamatext"))
    with pytest.raises(ConfigError, match="is a GGUF file of 'llamatext', wanted flux"):
        FluxFiles.found(BF16, text_encoders=other)


def test_a_missing_gguf_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="read by the package gguf: pip install gguf"):
        components_in(FOLDER / "flux_Q4_0.gguf")


CHILD = """
import json, sys
import paddle
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.loading import load_transformer
from ppcoat.models.quantized_base import quantized_model_bytes, load_quantized_transformer

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

(paddle.ones([4, 4]) @ paddle.ones([4, 4])).numpy()
component = FluxFiles.found(sys.argv[1])["transformer"]
before = status("VmRSS")
model = {"fp8": load_quantized_transformer, "plain": load_transformer}[sys.argv[2]](component, "bfloat16")
print(json.dumps([before, status("VmHWM"), quantized_model_bytes(model)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "base"), [("fp8", "fp8"), ("fp8", "plain"), ("Q8_0", "fp8"), ("Q4_0", "plain")]
)
def test_peak_memory_is_what_is_kept_and_a_tensor(tmp_path, kind, base):
    """400 million values, so that decoding all at once would take 1.6 GB: above 1.15 times the model that is
    kept, the process takes no more than a few of its largest matrix in float32."""
    config = {"attention_head_dim": 128, "num_attention_heads": 10, "num_layers": 4, "num_single_layers": 6,
              "guidance_embeds": True, "in_channels": 64}  # fmt: skip
    with paddle.LazyGuard():
        model = FluxTransformer2DModel(**config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    file, largest = tmp_path / "model.safetensors", 4 * max(map(math.prod, shapes.values()))
    linears = {name: shapes.pop(name)[::-1] for name in linear_weights(model)}
    plain = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if kind == "fp8":
        codes = np.arange(0x20, 0x40, dtype=np.uint8)
        plain |= {
            name: np.resize(codes, shape).view(ml_dtypes.float8_e4m3fn) for name, shape in linears.items()
        }
        plain |= {f"{name.removesuffix('weight')}scale_weight": np.ones([1], np.float32) for name in linears}
        save_file(plain, file)
    else:
        block = gguf.quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], gguf.GGMLQuantizationType[kind])
        writer = gguf.GGUFWriter(file, "flux")
        for name, tensor in plain.items():
            writer.add_tensor(name, tensor)
        for name, (rows, columns) in linears.items():
            blocks = np.resize(block, [rows, columns // 32 * block.size])
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    del plain
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), base], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak, kept = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} as {base}: kept {kept / 1e6:.0f} MB, peak {(peak - before) / 1e6:.0f} MB more")
    assert kept > (350e6 if base == "fp8" else 750e6)
    assert peak - before <= 1.15 * kept + 6 * largest
