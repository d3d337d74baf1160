"""A FLUX double block with LoRA made of the kernels' launchers, for a machine with a card and no Paddle, and
the same block in plain ops for autograd.

`LauncherBlock` does what a block of models/flux/transformer.py does under the saving policy "coat+recompute",
with tensors of any library; batch 1. Attention is the library's own, and so are the products, except those
with a weight that `with_fp8_weights` has put into FP8. `ops` has
    linear(x, w, b)  times(x, w)  times_transposed(x, w) = x w^T  transposed_times(x, y) = x^T y over all rows
    fp8_weight(w) -> codes and scales of its 128 x 128 blocks
    concat(parts, axis)  attention(q, k, v)  attention_again(q, k, v) -> result, its gradients as a function
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppcoat.fp8.formats import E4M3, BlockMatrix, Epilogue, Groups

GROUP = 128
LINEARS = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "out": (1, 1), "up": (1, 4), "down": (4, 1)}  # widths
DEVIATION = 0.02  # of a LoRA's A and B, and of biases


@dataclass
class LoRALinear:
    """x W + b + (x A) B: weight [in, out], bias [out], a [in, rank], b [rank, out]; alpha = rank. stored: the
    weight in FP8, where products with it are FP8 ones."""

    weight: Any
    bias: Any
    a: Any
    b: Any
    stored: BlockMatrix | None = None


@dataclass
class Stream:
    """The parameters of text or image: Linears by name, modulation [width, 6 width] without LoRA, weights of
    the norms of queries and keys, cos and sin float32 [tokens, head_dim / 2]."""

    linears: dict[str, LoRALinear]
    modulation: tuple[Any, Any]
    norms: tuple[Any, Any]
    angles: tuple[Any, Any]

    def loras(self) -> Iterator[Any]:
        for linear in self.linears.values():
            yield from (linear.a, linear.b)


def random_stream(put: Callable, sizes: Any, tokens: int, seed: int) -> Stream:
    """put(array) -> tensor in the block's dtype; put(array, dtype)."""
    rng, width, head_dim = np.random.default_rng(seed), sizes.width, sizes.width // sizes.heads

    def normal(*shape: int, deviation: float = DEVIATION) -> Any:
        return put(rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation))

    def linear(inputs: int, outputs: int) -> LoRALinear:
        weight = normal(inputs, outputs, deviation=inputs**-0.5)
        return LoRALinear(weight, normal(outputs), normal(inputs, sizes.rank), normal(sizes.rank, outputs))

    angles = rng.uniform(0, 6, [tokens, head_dim // 2])
    return Stream(
        {name: linear(width * k, width * n) for name, (k, n) in LINEARS.items()},
        (normal(width, 6 * width), normal(6 * width)),
        tuple(put(rng.uniform(0.5, 1.5, [head_dim]).astype("float32")) for _ in range(2)),
        tuple(put(part(angles).astype("float32"), "float32") for part in (np.cos, np.sin)),
    )


def with_fp8_weights(ops: Any, streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
    """The same parameters; the Linears with LoRA hold their weights in FP8, too."""

    def stored(linear: LoRALinear) -> LoRALinear:
        return replace(linear, stored=BlockMatrix(*ops.fp8_weight(linear.weight)))

    return tuple(
        replace(stream, linears={name: stored(linear) for name, linear in stream.linears.items()})
        for stream in streams
    )


def autograd_block(eager: dict[str, Callable], ops: Any, streams: tuple, vec: Any, *inputs: Any) -> tuple:
    """vec [1, width]; inputs: txt, img [1, tokens, width] -> txt, img. eager: as the libraries have it."""

    def linear(stream: Stream, name: str, x: Any) -> Any:
        part = stream.linears[name]
        return ops.linear(x, part.weight, part.bias) + ops.times(ops.times(x, part.a), part.b)

    modulations, heads = [], []
    for stream, h in zip(streams, inputs, strict=True):
        modulations.append(modulation_of(ops, stream, vec))
        shift, scale, *_ = modulations[-1]
        x = eager["modulated_norm"](h, shift, scale)
        q, k, v = (as_heads(linear(stream, name, x), stream) for name in "qkv")
        turns = [angle.unsqueeze(1) for angle in stream.angles]
        norm = eager["rms_norm_rotated"]
        heads.append([*(norm(x, weight, *turns) for x, weight in zip((q, k), stream.norms, strict=True)), v])
    both = ops.attention(*(ops.concat(pair, 1) for pair in zip(*heads, strict=True)))
    outputs = []
    for stream, h, o, rows in zip(
        streams, inputs, split(both.flatten(2), inputs[0]), modulations, strict=True
    ):
        _, _, gate_a, shift, scale, gate_m = rows
        h = eager["gated_residual"](linear(stream, "out", o), gate_a, h)
        u = linear(stream, "up", eager["modulated_norm"](h, shift, scale))
        outputs.append(eager["gated_residual"](linear(stream, "down", eager["gelu"](u)), gate_m, h))
    return tuple(outputs)


class LauncherBlock:
    """One pass: `forward`, then `backward`. run: launchers by name; half: the dtype of the tensors."""

    def __init__(self, run: dict[str, Callable], ops: Any, streams: tuple[Stream, Stream], half: str) -> None:
        self.ops = ops
        self.passes = [_StreamPass(run, ops, stream, half) for stream in streams]

    def forward(self, vec: Any, txt: Any, img: Any) -> tuple[Any, Any]:
        """vec [1, width], txt and img [1, tokens, width] -> txt, img."""
        inputs = (txt, img)
        heads = [each.heads(h, vec) for each, h in zip(self.passes, inputs, strict=True)]
        self.qkv = [self.ops.concat(pair, 1) for pair in zip(*heads, strict=True)]
        both = self.ops.attention(*self.qkv).flatten(2)
        parts = zip(self.passes, inputs, split(both, txt), strict=True)
        return tuple(each.rest(h, o) for each, h, o in parts)

    def backward(self, d_txt: Any, d_img: Any) -> list[Any]:
        """-> gradients of txt and img, then of A and B of each Linear in the order of `Stream.loras`."""
        both, gradients = self.ops.attention_again(*self.qkv)
        outputs = split(both.flatten(2), d_txt)
        parts = zip(self.passes, (d_txt, d_img), outputs, strict=True)
        d_streams, d_outputs = zip(*(each.rest_backward(dy, o) for each, dy, o in parts), strict=True)
        d_heads = gradients(as_heads(self.ops.concat(d_outputs, 1), self.passes[0].stream))
        d_heads = zip(*(split(d, d_txt) for d in d_heads), strict=True)
        results = zip(*(split(x, d_txt) for x in self.qkv[:2]), strict=True)
        parts = zip(self.passes, d_streams, d_heads, results, strict=True)
        d_inputs = [each.heads_backward(dh, d_qkv, qk) for each, dh, d_qkv, qk in parts]
        return d_inputs + [d for each in self.passes for name in LINEARS for d in each.lora_gradients[name]]


class _StreamPass:
    """Text or image: `heads` before attention, `rest` after it. Inputs of norms and GELU are held in FP8."""

    def __init__(self, run: dict[str, Callable], ops: Any, stream: Stream, half: str) -> None:
        self.run, self.ops, self.stream, self.half = run, ops, stream, half
        self.xa, self.lora_gradients = {}, {}

    def heads(self, h: Any, vec: Any) -> list[Any]:
        self.shift_a, self.scale_a, self.gate_a, *rest = modulation_of(self.ops, self.stream, vec)
        self.shift_m, self.scale_m, self.gate_m = rest
        x = self.run["modulated_norm"](h, self.shift_a, self.scale_a)
        self.h = self._packed(h)
        q, k, v = (as_heads(self._linear(name, x), self.stream) for name in "qkv")
        norm, (weight_q, weight_k) = self.run["rms_norm_rotated"], self.stream.norms
        q, self.rstd_q = norm(q, weight_q, self.stream.angles)
        k, self.rstd_k = norm(k, weight_k, self.stream.angles)
        return [q, k, v]

    def rest(self, h: Any, o: Any) -> Any:
        h = self.run["gated_residual"](self._linear("out", o), self.gate_a, h)
        x = self.run["modulated_norm"](h, self.shift_m, self.scale_m)
        self.h2 = self._packed(h)
        u = self._linear("up", x)
        self.u = self._packed(u)
        return self.run["gated_residual"](self._linear("down", self.run["gelu"](u)), self.gate_m, h)

    def rest_backward(self, dy: Any, o: Any) -> tuple[Any, Any]:
        """dy -> gradients of h (the part that does not go through attention) and of o."""
        run, (u, u_groups), (h, groups) = self.run, self.u, self.h2
        d_mlp = self._backward("down", run["gelu"](u, u_groups), run["gated_residual"](dy, self.gate_m))
        du = run["gelu_grad"](u, d_mlp, u_groups)
        dx = self._backward("up", run["modulated_norm"](h, self.shift_m, self.scale_m, groups), du)
        dh = run["modulated_norm_grad"](h, self.scale_m, dx, groups).add_(dy)
        return dh, self._backward("out", o, run["gated_residual"](dh, self.gate_a))

    def heads_backward(self, dh: Any, d_qkv: Any, results: Any) -> Any:
        norm_grad, (weight_q, weight_k) = self.run["rms_norm_rotated_grad"], self.stream.norms
        (dq, dk, dv), (q, k), (h, groups) = d_qkv, results, self.h
        dq = norm_grad(dq, q, self.rstd_q, weight_q, self.stream.angles)
        dk = norm_grad(dk, k, self.rstd_k, weight_k, self.stream.angles)
        x = self.run["modulated_norm"](h, self.shift_a, self.scale_a, groups)
        dx = self._backward("q", x, dq.flatten(2))
        dx.add_(self._backward("k", x, dk.flatten(2))).add_(self._backward("v", x, dv.flatten(2)))
        return self.run["modulated_norm_grad"](h, self.scale_a, dx, groups).add_(dh)

    def _linear(self, name: str, x: Any) -> Any:
        part = self.stream.linears[name]
        self.xa[name] = self.ops.times(x, part.a)
        if part.stored is not None:
            return self._fp8_product(x, part.stored, False, Epilogue(part.bias, self.xa[name][0], part.b))
        return self.ops.linear(x, part.weight, part.bias).add_(self.ops.times(self.xa[name], part.b))

    def _backward(self, name: str, x: Any, dy: Any) -> Any:
        ops, part = self.ops, self.stream.linears[name]
        dyb = ops.times_transposed(dy, part.b)
        self.lora_gradients[name] = ops.transposed_times(x, dyb), ops.transposed_times(self.xa[name], dy)
        if part.stored is not None:
            return self._fp8_product(dy, part.stored, True, Epilogue(None, dyb[0], part.a))
        return ops.times_transposed(dy, part.weight).add_(ops.times_transposed(dyb, part.a))

    def _fp8_product(self, x: Any, weight: BlockMatrix, transpose: bool, added: Epilogue) -> Any:
        """As nn/base_weight.py: x rounded to FP8, LoRA and bias added before the result is rounded."""
        codes, scale = self.run["quantize"](x[0].contiguous(), E4M3, GROUP)
        return self.run["scaled_matmul"](codes, scale, weight, transpose, added, self.half).unsqueeze(0)

    def _packed(self, x: Any) -> tuple[Any, Groups]:
        codes, scale = self.run["quantize"](x, E4M3, GROUP)
        return codes, Groups(scale, E4M3, GROUP, self.half)


def modulation_of(ops: Any, stream: Stream, vec: Any) -> list[Any]:
    """Shift, scale and gate before attention, then those before the feed-forward, each [1, 1, width]."""
    rows = ops.linear(vec, *stream.modulation).reshape([1, 6, -1])
    return [rows[:, i : i + 1].contiguous() for i in range(6)]


def as_heads(x: Any, stream: Stream) -> Any:
    """[1, tokens, width] -> [1, tokens, heads, head_dim]."""
    return x.reshape([1, x.shape[1], -1, stream.norms[0].shape[0]])


def split(both: Any, txt: Any) -> list[Any]:
    """[1, tokens, ...], text first -> the text's and the image's part."""
    tokens = txt.shape[1]
    return [both[:, :tokens].contiguous(), both[:, tokens:].contiguous()]
