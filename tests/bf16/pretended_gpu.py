"""What a GPU changes in ppcoat, without one: models in half precision, flash attention, kernels.

    with PretendedGpu() as gpu:
        train_lora(config)              # device "cpu", dtype "auto": bfloat16
    gpu.unsuited, gpu.different, gpu.launches

Half precision is that of half_precision.py. Each op that has a Triton kernel calls the kernel's launcher with
the very tensors of the run, up to the launch, which does not happen; then the reference computes. What the
launcher refuses is counted, and so is each result whose dtype or shape is not the reference's. Attention in
half precision goes through flash attention, written out here with what it saves for backward.
"""

import importlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import paddle.nn.functional as F
from half_precision import HALVES, HalfPrecision, RoundingNoise, place, tensors_in
from paddle.autograd import PyLayer

from ppcoat import device
from ppcoat.fp8 import backend
from ppcoat.models.flux import transformer
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.newbie import nextdit
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.models.pictures import LatentPictures
from ppcoat.nn import attention

CAPABILITY = 90
NAN_CODE = 0x7F  # of E4M3
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}  # of a launch, not of a kernel


def relative(values: Sequence[float], wanted: Sequence[float]) -> float:
    """Largest relative difference."""
    return float(np.max(np.abs(np.array(values) / np.array(wanted) - 1)))


def four_deviations(changes: Sequence[float]) -> float:
    """Four standard deviations of these changes around no change."""
    assert np.isfinite(changes).all() and len(changes) > 1
    return 4 * float(np.sqrt(np.mean(np.square(changes))))


class PretendedGpu:
    """Context manager, see above; nothing of it is left when the context ends.

    half: the HalfPrecision inside. unsuited {(op, reason)}, different {(op, what differs)}, launches {kernel}
    and calls {op}: how often.
    """

    def __init__(self) -> None:
        self.half = HalfPrecision()
        self.unsuited, self.different, self.launches, self.calls = (Counter() for _ in range(4))

    def __enter__(self) -> "PretendedGpu":
        with ExitStack() as stack:
            real = F.scaled_dot_product_attention
            for owner, name, value in (
                (device, "computes_in_half", lambda: True),
                (attention, "attention_kernel", _attention_kernel),
                (F, "scaled_dot_product_attention", lambda *q, **k: _flash(real, *q, **k)),
                (backend.Op, "__call__", lambda op, *args, **kwargs: self._op(op, args, kwargs)),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            self._pretend_triton(stack)
            stack.enter_context(self.half)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _pretend_triton(self, stack: ExitStack) -> None:
        import triton
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        # Where tests of kernels ran before, kernels are the interpreter's; neither kind is launched here.
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="0"))
        for kind in (JITFunction, InterpretedFunction):
            launch = lambda kernel, grid: partial(self._stop_short, kernel, grid)  # noqa: E731
            stack.enter_context(mock.patch.object(kind, "__getitem__", launch))
        driver = SimpleNamespace(active=_Driver(), set_active=lambda driver: None)
        stack.enter_context(mock.patch.object(triton.runtime, "driver", driver))

    def _stop_short(self, kernel, grid, *args, **kwargs):
        constants = {name for name in kwargs if name not in OPTIONS}
        assert {*kernel.arg_names[: len(args)], *constants} == {*kernel.arg_names}, kernel.fn.__name__
        assert len(args) + len(constants) == len(kernel.arg_names), kernel.fn.__name__
        assert all(isinstance(size, int) and size > 0 for size in grid), f"grid {grid}"
        self.launches[kernel.fn.__name__] += 1

    def _op(self, op: backend.Op, args: tuple, kwargs: dict):
        launcher = op.version("triton") if backend.forced() != backend.REFERENCE else None
        if launcher is None or not paddle.in_dynamic_mode():
            return op.reference(*args, **kwargs)
        self.calls[op.name] += 1
        found = None
        try:
            found = launcher(*args, **kwargs)
        except backend.Unsuited as error:
            self.unsuited[op.name, f"{error} ({place()})"] += 1
        wanted = op.reference(*args, **kwargs)
        if found is not None and _form(found) != _form(wanted):
            self.different[op.name, f"kernel {_form(found)}, reference {_form(wanted)}"] += 1
        return wanted


class FarMemory:
    """A Transport of nn/swap.py whose host memory the device cannot read: a block that computes before its
    parameters have arrived, or after they have left, meets NaN."""

    def __init__(self) -> None:
        self._held: dict[int, paddle.Tensor] = {}

    def to_host(self, x: paddle.Tensor) -> paddle.Tensor:
        nothing = paddle.full_like(x, NAN_CODE if x.dtype == paddle.uint8 else float("nan"))
        self._held[id(nothing)] = x.clone()
        return nothing

    def start(self, hosts: list[paddle.Tensor]) -> tuple[list[paddle.Tensor], None]:
        return [self._held[id(host)].clone() for host in hosts], None

    def wait(self, ticket: None) -> None:
        return None


def bfloat16_noise(seed: int) -> RoundingNoise:
    """For a float32 run of ppcoat: noise wherever the transformer of a bfloat16 run on a GPU rounds. Encoders
    are left alone: T5 computes the numbers of its position buckets in float32."""
    exact = [(transformer, "sinusoid"), (nextdit, "sinusoid"), (transformer, "rotary_angles")]
    exact += [(nextdit, "rotary_angles"), (FluxPipeline, "encode_prompt"), (LatentPictures, "encode_image")]
    exact += [(NewbiePipeline, "encode_prompt"), (LatentPictures, "decode_latents")]
    return RoundingNoise(seed, tuple(exact), ((backend.Op, "__call__"), (attention, "attention")))


class _Driver:
    """What Triton asks of a driver before a launch."""

    def get_current_target(self):
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _attention_kernel(q: paddle.Tensor, bias: paddle.Tensor | None = None) -> str:
    return attention.FLASH if q.dtype in HALVES else attention.MATH


def _flash(real, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
    if query.dtype not in HALVES or not paddle.in_dynamic_mode():
        return real(query, key, value, attn_mask, dropout_p, is_causal, **rest)
    assert not (dropout_p or is_causal or rest)
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    dtypes = {x.dtype for x in tensors}
    assert len(dtypes) == 1, f"flash attention of {dtypes} at {place()}"
    assert query.shape[-1] <= 256 and query.shape[-1] % 8 == 0, f"head size {query.shape[-1]} at {place()}"
    assert query.shape[2] == key.shape[2] == value.shape[2], f"heads at {place()}"
    if paddle.is_grad_enabled() and not all(x.stop_gradient for x in (query, key, value)):
        return _FlashAttention.apply(query, key, value, attn_mask)
    return _attended(query, key, value, attn_mask)[0]


class _FlashAttention(PyLayer):
    """As the flash attention of arXiv 2307.08691: float32 inside, one rounding of the result; saves q, k, v,
    the result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        o, lse = _attended(q, k, v, mask)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask = mask
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensor()
        weights, do32 = (_scores(q, k, ctx.mask) - lse).exp(), _by_heads(do)
        dv = paddle.matmul(weights, do32, transpose_x=True)
        along = (do32 * _by_heads(o)).sum(-1, keepdim=True)
        ds = weights * (paddle.matmul(do32, _by_heads(v), transpose_y=True) - along) * q.shape[-1] ** -0.5
        dq, dk = paddle.matmul(ds, _by_heads(k)), paddle.matmul(ds, _by_heads(q), transpose_x=True)
        found = tuple(_by_tokens(x).astype(q.dtype) for x in (dq, dk, dv))
        return found if ctx.mask is None else (*found, None)


def _attended(q, k, v, mask):
    scores = _scores(q, k, mask)
    top = scores.max(-1, keepdim=True)
    lse = (scores - top).exp().sum(-1, keepdim=True).log() + top
    return _by_tokens(paddle.matmul((scores - lse).exp(), _by_heads(v))).astype(q.dtype), lse


def _scores(q, k, mask):
    scores = paddle.matmul(_by_heads(q), _by_heads(k), transpose_y=True) * q.shape[-1] ** -0.5
    return scores if mask is None else scores + mask.astype("float32")


def _by_heads(x):
    return x.astype("float32").transpose([0, 2, 1, 3])


def _by_tokens(x):
    return x.transpose([0, 2, 1, 3]).contiguous()


def _form(result) -> list[str]:
    """Dtype and shape of each tensor."""
    return [f"{x.dtype} {list(x.shape)}" for x in tensors_in(result)]
