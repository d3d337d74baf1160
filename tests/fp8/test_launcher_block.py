"""The double block of the torch benchmark, in Triton's interpreter with Paddle tensors: it computes what the
library's own block does under "coat+recompute", and what autograd does but for the rounding of FP8."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from ppcoat.bench.kernel_library import PaddleLibrary
from ppcoat.fp8.matmul import quantize_blocks
from ppcoat.lora import inject_lora
from ppcoat.lora.layer import FLUX_TARGETS
from ppcoat.models.flux.transformer import DoubleBlock
from ppcoat.nn.attention import attention
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears, sublayer_at
from ppcoat.nn.recompute import LocalGraph
from ppcoat.nn.saved_tensors import fp8_saved_tensors

SIZES = SimpleNamespace(width=128, heads=2, rank=4)
TEXT, IMAGE = 3, 5
NAMES = {  # of the Linears in a double block, text and image
    "q": ("attn.add_q_proj", "attn.to_q"),
    "k": ("attn.add_k_proj", "attn.to_k"),
    "v": ("attn.add_v_proj", "attn.to_v"),
    "out": ("attn.to_add_out", "attn.to_out.0"),
    "up": ("ff_context.net.0.proj", "ff.net.0.proj"),
    "down": ("ff_context.net.2", "ff.net.2"),
}
NORMS = (("norm_added_q", "norm_added_k"), ("norm_q", "norm_k"))
FP8_ERROR = 2.0**-4  # of a value: half a step of E4M3


class PaddleOps:
    """What launcher_block.py asks of a library."""

    linear, times = staticmethod(F.linear), staticmethod(paddle.matmul)
    concat, attention = staticmethod(paddle.concat), staticmethod(attention)

    def fp8_weight(self, w):
        return quantize_blocks(w)

    def times_transposed(self, x, w):
        return paddle.matmul(x, w, transpose_y=True)

    def transposed_times(self, x, y):
        return paddle.matmul(x.flatten(0, 1), y.flatten(0, 1), transpose_x=True)

    def attention_again(self, *qkv):
        graph = LocalGraph(attention, *qkv)
        return graph.output, graph.gradients


def put(values, dtype="float32"):
    return paddle.to_tensor(values.astype(dtype))


@pytest.fixture(scope="module")
def case(on_triton):
    """A random block, its inputs and the gradients of its results; text first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        module, rng = importlib.import_module("launcher_block"), np.random.default_rng(2)
    streams = tuple(module.random_stream(put, SIZES, n, seed) for seed, n in enumerate((TEXT, IMAGE)))
    inputs, grads = ([put(rng.standard_normal([1, n, SIZES.width])) for n in (TEXT, IMAGE)] for _ in range(2))
    vec = put(rng.standard_normal([1, SIZES.width]))
    launchers = importlib.import_module("ppcoat.bench.kernel_cases").LAUNCHERS
    run = {name: on_triton(launcher) for name, launcher in launchers.items()}
    names = ["txt", "img", "d txt", "d img"]
    names += [f"d {part} of {name}, {s}" for s in ("txt", "img") for name in module.LINEARS for part in "AB"]

    def passed(streams):
        block = module.LauncherBlock(run, PaddleOps(), streams, "float32")
        with paddle.no_grad():
            got = [*block.forward(vec, *inputs)]
        return dict(zip(names, got + block.backward(*grads), strict=True))

    parameters = {"streams": streams, "inputs": inputs, "grads": grads, "vec": vec}
    return SimpleNamespace(module=module, passed=passed, got=passed(streams), **parameters)


def errors(got, wanted):
    assert len(got) == len(wanted)
    return {
        name: float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
        for (name, ours), theirs in zip(got.items(), wanted, strict=True)
    }


def of_the_library(case, in_fp8):
    """Results and gradients of the library's block with the parameters of `case`."""
    model = nn.Layer()
    model.blocks = nn.LayerList([DoubleBlock(SIZES.heads, SIZES.width // SIZES.heads)])
    (block,) = model.blocks
    for side, stream in enumerate(case.streams):
        for name, linear in stream.linears.items():
            base = sublayer_at(block, NAMES[name][side])
            base.weight.set_value(linear.weight)
            base.bias.set_value(linear.bias)
        for norm, weight in zip(NORMS[side], stream.norms, strict=True):
            getattr(block.attn, norm).weight.set_value(weight)
        modulation = (block.norm1_context, block.norm1)[side].linear
        modulation.weight.set_value(stream.modulation[0])
        modulation.bias.set_value(stream.modulation[1])
    if in_fp8:
        modulations = [norm.linear for norm in (block.norm1, block.norm1_context)]
        quantize_linears(model)
        for norm, linear in zip((block.norm1, block.norm1_context), modulations, strict=True):
            norm.linear = linear  # not in FP8 in launcher_block.py
        assert len(multiply_in_fp8(model)) == 12
    layers = inject_lora(block, SIZES.rank, SIZES.rank, targets=FLUX_TARGETS["transformer_blocks"])
    loras = []
    for side, stream in enumerate(case.streams):
        for name, linear in stream.linears.items():
            layer = layers[NAMES[name][side]]
            layer.lora_A.set_value(linear.a)
            layer.lora_B.set_value(linear.b)
            loras += [layer.lora_A, layer.lora_B]

    txt, img = (x.detach() for x in case.inputs)
    txt.stop_gradient = img.stop_gradient = False
    angles = (paddle.concat(parts) for parts in zip(*(s.angles for s in case.streams), strict=True))
    with fp8_saved_tensors("coat+recompute"):
        out_img, out_txt = block(img, txt, case.vec, *angles)
    paddle.autograd.backward([out_txt, out_img], case.grads)
    return [out_txt, out_img, txt.grad, img.grad, *(p.grad for p in loras)]


def test_it_is_the_block_of_the_library(case):
    found = errors(case.got, of_the_library(case, in_fp8=False))
    assert max(found.values()) < 1e-5, found


def test_with_fp8_products_too(case):
    """Where float32 rounds otherwise a code may be the next one; a factor that was not rounded, or a scale of
    the wrong block, would show in every number."""
    streams = case.module.with_fp8_weights(PaddleOps(), case.streams)
    got = case.passed(streams)
    found = errors(got, of_the_library(case, in_fp8=True))
    assert max(found.values()) < 1e-2, found
    plain = errors(case.got, list(got.values()))
    assert min(plain.values()) > 1e-2, plain


def test_it_is_autograd_of_the_plain_block_but_for_the_rounding(case):
    inputs = [*case.inputs, *(lora for stream in case.streams for lora in stream.loras())]
    for x in inputs:
        x.stop_gradient = False
    eager = PaddleLibrary().eager()
    outputs = case.module.autograd_block(eager, PaddleOps(), case.streams, case.vec, *case.inputs)
    wanted = [*outputs, *paddle.grad(list(outputs), inputs, case.grads)]
    found = errors(case.got, wanted)
    assert found["txt"] < 1e-5 and found["img"] < 1e-5
    assert max(found.values()) < FP8_ERROR, found
    assert max(found.values()) > FP8_ERROR / 10  # something is rounded
