"""Products of FP8 matrices: activations with a scale for each 1 x 128 values, weights for each 128 x 128.

y = x W and dx = dy W^T come from one stored weight. Products are added up in float32; a bias and the update
of a LoRA are added before the only rounding. `scaled_matmul` has a Triton twin, see backend.py.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3 for the scales and where sums are kept in float32.
"""

from __future__ import annotations

import paddle

from . import backend
from .blocks import BLOCK, dequantize_blocks
from .formats import E4M3
from .operands import BlockMatrix, Epilogue
from .quantize import dequantize


@backend.op
def scaled_matmul(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    weight: BlockMatrix,
    transpose: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen, and holds nothing)
    dtype: str = "float32",
) -> paddle.Tensor:
    """x W, or x W^T with `transpose`, plus the epilogue -> [M, N] in `dtype`.

    codes uint8 [M, K], scale float32 [M, ceil(K / 128)]: x, E4M3 in groups of 128; weight [K, N], with
    `transpose` [N, K]. Forward is transpose False with K = in, N = out; the gradient by the input is
    transpose True with K = out, N = in.
    """
    x = dequantize(codes, scale, E4M3, BLOCK)
    y = paddle.matmul(x, dequantize_blocks(weight.codes, weight.scale), transpose_y=transpose)
    if epilogue.bias is not None:
        y = y + epilogue.bias.astype("float32")
    if epilogue.down is not None:
        down, up = epilogue.down.astype("float32"), epilogue.up.astype("float32")
        y = y + paddle.matmul(down, up, transpose_y=transpose)
    return y.astype(dtype)
