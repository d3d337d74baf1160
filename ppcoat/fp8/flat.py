"""Many parameters as one flat buffer, so that an optimizer step is a few large operations instead of many
small ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle
from paddle.nn import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue

LOW_PRECISION = (paddle.bfloat16, paddle.float16)


class FlatSpace:
    """Where each parameter lies in the flat buffer [G, block_size] float32, and the ways in and out of it."""

    def __init__(self, params: list[paddle.Tensor], block_size: int) -> None:
        self.params = params
        self.block_size = block_size
        sizes = np.array([param.size for param in params], dtype=np.int64)
        self.groups = -(-sizes // block_size)  # groups of each parameter, the last one perhaps partly empty
        self.low_precision = params[0].dtype in LOW_PRECISION
        self._offsets = np.concatenate([[0], np.cumsum(self.groups)]) * block_size  # in elements
        self._used = self._used_per_group(sizes)
        self.flat = paddle.zeros([int(self.groups.sum()), block_size], dtype="float32")
        self._adopt()

    def gather(self, tensors: list[paddle.Tensor]) -> paddle.Tensor:
        """Tensors in the order of the parameters -> float32 [G, block_size]; unused places are zero."""
        if tensors[0].dtype != paddle.float32:  # Paddle's CPU kernel fuses float32 only
            tensors = [tensor.astype("float32") for tensor in tensors]
        _, fused = paddle._C_ops.coalesce_tensor(
            tensors, paddle.float32, True, False, False, 0.0, True, 4 * self.block_size, 4, [], []
        )
        flat = fused.reshape(self.flat.shape)
        if self._used is None:
            return flat
        inside = paddle.arange(self.block_size, dtype="int32").unsqueeze(0) < self._used
        return paddle.where(inside, flat, paddle.zeros([1], dtype="float32"))

    def adopt_moved(self) -> None:
        """Take a parameter's own value again if it was given other memory since (a cast, a new tensor)."""
        if not self.low_precision and any(
            param.data_ptr() != address for param, address in zip(self.params, self._addresses, strict=True)
        ):
            self._adopt()

    def write_back(self) -> None:
        """Flat buffer -> low-precision parameters. float32 parameters are views and need nothing."""
        if self.low_precision:
            for param, view in zip(self.params, self._views(), strict=True):
                paddle.assign(view.astype(param.dtype), output=param)

    def per_group(self, values: list[float]) -> float | paddle.Tensor:
        """One number per parameter -> a float where all agree, else float32 [G, 1]."""
        if len(set(values)) == 1:
            return values[0]
        return paddle.to_tensor(np.repeat(np.float32(values), self.groups)[:, None])

    def parameter_ids(self) -> paddle.Tensor:
        """int64 [G]: which parameter each group belongs to."""
        return paddle.to_tensor(np.repeat(np.arange(len(self.params)), self.groups))

    def _adopt(self) -> None:
        with paddle.no_grad():
            paddle.assign(self.gather(self.params), output=self.flat)
            if not self.low_precision:
                for param, view in zip(self.params, self._views(), strict=True):
                    view._share_buffer_to(param)
        self._addresses = [param.data_ptr() for param in self.params]

    def _views(self) -> Iterable[paddle.Tensor]:
        elements = self.flat.reshape([-1])
        for param, start in zip(self.params, self._offsets[:-1], strict=True):
            yield elements[int(start) : int(start) + param.size].reshape(param.shape)

    def _used_per_group(self, sizes: np.ndarray) -> paddle.Tensor | None:
        """int32 [G, 1]: elements in use, None where every group is full (as in LoRAs of ordinary widths)."""
        if not (sizes % self.block_size).any():
            return None
        used = np.full(int(self.groups.sum()), self.block_size, dtype=np.int32)
        used[np.cumsum(self.groups) - 1] = sizes - (self.groups - 1) * self.block_size
        return paddle.to_tensor(used[:, None])


def _clip_global_norm(
    clip: ClipGradByGlobalNorm, grad: paddle.Tensor, squares: paddle.Tensor, space: FlatSpace
) -> paddle.Tensor:
    norm = paddle.sqrt(squares.sum())
    return grad * (clip.clip_norm / paddle.clip(norm, min=clip.clip_norm))


def _clip_norm(
    clip: ClipGradByNorm, grad: paddle.Tensor, squares: paddle.Tensor, space: FlatSpace
) -> paddle.Tensor:
    ids = space.parameter_ids()
    norms = paddle.sqrt(paddle.geometric.segment_sum(squares, ids))[ids]
    return grad * (clip.clip_norm / paddle.clip(norms, min=clip.clip_norm))


def _clip_value(
    clip: ClipGradByValue, grad: paddle.Tensor, squares: paddle.Tensor, space: FlatSpace
) -> paddle.Tensor:
    return paddle.clip(grad, clip.min, clip.max)


CLIPS = {ClipGradByGlobalNorm: _clip_global_norm, ClipGradByNorm: _clip_norm, ClipGradByValue: _clip_value}
