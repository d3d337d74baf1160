"""What ops take beside plain tensors: how codes are read, a stored weight, what a product ends with. Kernels
read the same, with tensors of another library, too: nothing here imports Paddle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paddle

    from .formats import FP8Format


@dataclass(frozen=True)
class Groups:
    """How codes uint8 [..., D] are read: `scale`, `fmt` and `group_size` as `quantize` gave and took them;
    the dtype of the values."""

    scale: paddle.Tensor
    fmt: FP8Format
    group_size: int | None
    dtype: str | paddle.dtype = "float32"


@dataclass(frozen=True)
class BlockMatrix:
    """A weight [in, out] as `quantize_blocks` gives it: codes uint8, scale float32 for 128 x 128 values."""

    codes: paddle.Tensor
    scale: paddle.Tensor


@dataclass(frozen=True)
class Epilogue:
    """What is added to a product [M, N] before it is rounded: bias [N], and down [M, rank] times `up`.

    up: [rank, N], a LoRA's B; where the weight is transposed [N, rank], its A. The LoRA's factor is in `down`
    already.
    """

    bias: paddle.Tensor | None = None
    down: paddle.Tensor | None = None
    up: paddle.Tensor | None = None
