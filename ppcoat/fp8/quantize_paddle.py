"""`quantize` and `dequantize` by Paddle's own FP8 kernels, for the inputs that these take.

They exist on GPUs only (Paddle 3.3: kernels `fp8_quant_blockwise` and `fused_act_dequant`) and know matrices
of 16-bit floats, E4M3, groups of 128. Whether they follow the reference's rule for zeros and for what is not
finite is left to the check on first use.
"""

from __future__ import annotations

import paddle

from .backend import Unsuited
from .formats import FP8Format

GROUP = 128
HALVES = (paddle.bfloat16, paddle.float16)


def quantize(
    x: paddle.Tensor, fmt: FP8Format, group_size: int | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x [..., D] bfloat16 or float16, D a multiple of 128 -> codes, scale as the reference's. Raises Unsuited
    for anything else."""
    _require(fmt, group_size, x.shape[-1])
    if x.dtype not in HALVES or not x.is_contiguous():
        raise Unsuited(f"x is {x.dtype} or has gaps; Paddle's kernel wants contiguous bfloat16 or float16")
    codes, scale = paddle.incubate.nn.functional.fp8_quant_blockwise(
        x.reshape([-1, x.shape[-1]]), output_scale_transpose=False, using_pow2_scale=False
    )
    return codes.view("uint8").reshape(x.shape), scale.reshape([*x.shape[:-1], x.shape[-1] // GROUP])


def dequantize(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    fmt: FP8Format,
    group_size: int | None = None,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize` -> values [..., D], bfloat16 only. Raises Unsuited for anything else."""
    _require(fmt, group_size, codes.shape[-1])
    if dtype not in ("bfloat16", paddle.bfloat16):
        raise Unsuited(f"dequantize to {dtype}; Paddle's kernel gives bfloat16")
    values = paddle.incubate.nn.functional.fused_act_dequant(
        codes.view(fmt.dtype).reshape([-1, codes.shape[-1]]), scale.reshape([-1, scale.shape[-1]])
    )
    return values.reshape(codes.shape)


def _require(fmt: FP8Format, group_size: int | None, width: int) -> None:
    if fmt.name != "e4m3" or group_size != GROUP or width % GROUP:
        raise Unsuited(f"{fmt.name}, groups of {group_size} in {width}; Paddle's kernel has E4M3 in 128")
