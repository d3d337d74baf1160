"""Many parameters as one flat buffer, so that an optimizer step is a few large operations instead of many
small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle.nn import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue

LOW_PRECISION = (paddle.bfloat16, paddle.float16)
# Numbers of a flat buffer that plain Paddle works on at once, which bounds what it holds besides. 2^20 is
# faster on a CPU than 2^18 and 2^22, and twice as fast as all at once.
PIECE = 1 << 20
TOGETHER = (
    32  # groups: a CPU's vector instructions give other last bits than the numbers left over after them
)


def row_pieces(groups: int, block_size: int) -> list[slice]:
    """Rows of a flat buffer [groups, block_size] in parts of about PIECE numbers. The sizes of parts are
    multiples of TOGETHER, so that results have the bits that they would have in one part."""
    rows = max(1, PIECE // block_size // TOGETHER) * TOGETHER
    return [slice(start, min(start + rows, groups)) for start in range(0, groups, rows)]


class FlatLayout:
    """Where each of many tensors of any shape lies in a flat buffer [G, block_size], and the ways in and out.
    No group holds numbers of two tensors.
    """

    def __init__(self, params: Sequence[paddle.Tensor], block_size: int) -> None:
        self.params = list(params)
        self.block_size = block_size
        sizes = np.array([param.size for param in params], dtype=np.int64)
        self.groups = -(-sizes // block_size)  # groups of each parameter, the last one perhaps partly empty
        self.shape = [int(self.groups.sum()), block_size]
        self._offsets = np.concatenate([[0], np.cumsum(self.groups)]) * block_size  # in elements
        self._used = self._used_per_group(sizes)

    def current(self) -> paddle.Tensor:
        """float32 [G, block_size]: what the tensors hold now."""
        return self.gather(self.params)

    def gather(self, tensors: list[paddle.Tensor], rows: slice | None = None) -> paddle.Tensor:
        """Tensors in the order of the parameters -> float32 [G, block_size], or only these rows of it; unused
        places are zero.
        """
        rows = slice(0, self.shape[0]) if rows is None else rows
        whole = rows == slice(0, self.shape[0])
        if not whole:
            tensors = self._within(tensors, rows)
        # Paddle's CPU kernel fuses float32 only, and takes any other dtype for it.
        if any(tensor.dtype != paddle.float32 for tensor in tensors):
            tensors = [tensor.astype("float32") for tensor in tensors]
        _, fused = paddle._C_ops.coalesce_tensor(
            tensors, paddle.float32, True, False, False, 0.0, True, 4 * self.block_size, 4, [], []
        )
        flat = fused.reshape([-1, self.block_size])
        if self._used is None:
            return flat
        used = self._used if whole else self._used[rows]
        inside = paddle.arange(self.block_size, dtype="int32").unsqueeze(0) < used
        return paddle.where(inside, flat, paddle.zeros([1], dtype="float32"))

    def views(self, flat: paddle.Tensor) -> list[paddle.Tensor]:
        """A buffer [G, block_size] of any dtype -> its parts that are the tensors, in their shapes. They
        share its memory."""
        elements = flat.reshape([-1])
        return [
            elements[int(start) : int(start) + param.size].reshape(param.shape)
            for param, start in zip(self.params, self._offsets[:-1], strict=True)
        ]

    def rows_of_each(self) -> list[slice]:
        """Rows of each parameter."""
        ends = np.cumsum(self.groups).tolist()
        return [slice(end - int(count), end) for end, count in zip(ends, self.groups, strict=True)]

    def _within(self, tensors: list[paddle.Tensor], rows: slice) -> list[paddle.Tensor]:
        """The parts of tensors that lie in these rows, [n] each; they share memory."""
        start, stop = rows.start * self.block_size, rows.stop * self.block_size
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        return [
            tensor.reshape([-1])[max(0, start - offset) : min(tensor.size, stop - offset)]
            for tensor, offset in zip(tensors[first:last], self._offsets[first:last].tolist(), strict=True)
        ]

    def _used_per_group(self, sizes: np.ndarray) -> paddle.Tensor | None:
        """int32 [G, 1]: elements in use, None where every group is full (as in LoRAs of ordinary widths)."""
        if not (sizes % self.block_size).any():
            return None
        used = np.full(self.shape[0], self.block_size, dtype=np.int32)
        used[np.cumsum(self.groups) - 1] = sizes - (self.groups - 1) * self.block_size
        return paddle.to_tensor(used[:, None])


class FlatSpace(FlatLayout):
    """A flat buffer [G, block_size] that parameters live in: they are views of it.

    It has the parameters' dtype. float32 parameters are updated there. bfloat16 and float16
    parameters have a float32 master copy beside it, which is updated and then rounded; without a master
    (`keep_master=False`, bfloat16 only) the update is rounded stochastically, so that changes smaller than
    half a step of bfloat16 are not lost on average.
    """

    def __init__(self, params: list[paddle.Tensor], block_size: int, keep_master: bool = True) -> None:
        super().__init__(params, block_size)
        self._stored = paddle.zeros(self.shape, dtype=params[0].dtype)
        with_master = keep_master and params[0].dtype in LOW_PRECISION
        self.master = paddle.zeros(self.shape, dtype="float32") if with_master else None
        self._adopt()

    def current(self) -> paddle.Tensor:
        """float32 [G, block_size]: what the parameters hold now. Not to be changed: it may be no copy."""
        self.adopt_moved()
        return self.values()

    def values(self) -> paddle.Tensor:
        """float32 [G, block_size] to update in place and hand to `store`: the master copy, the parameters
        themselves, or a passing copy of them.
        """
        if self.master is not None:
            return self.master
        return self._stored if self._stored.dtype == paddle.float32 else self._stored.astype("float32")

    def store(self, values: paddle.Tensor) -> None:
        """Updated `values` -> parameters."""
        if self._stored.dtype != paddle.float32:
            round_into(self._stored, values, stochastic=self.master is None)

    def updated(self) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """What a step writes: (master copy, parameters), or (parameters, None) where there is no master; all
        [G, block_size].
        """
        return (self._stored, None) if self.master is None else (self.master, self._stored)

    def adopt_moved(self) -> None:
        """Take in a parameter that was given other memory since (a cast, a new tensor). Its own value counts,
        or the master copy where there is one.
        """
        if all(param.data_ptr() == place for param, place in zip(self.params, self._places, strict=True)):
            return
        if self.master is None:
            self._adopt()
        else:
            self._share()
            self.store(self.master)

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
            values = self.gather(self.params)
            if self.master is not None:
                paddle.assign(values, output=self.master)
            paddle.assign(values.astype(self._stored.dtype), output=self._stored)
        self._share()

    def _share(self) -> None:
        """Let every parameter look into the flat buffer."""
        for param, view in zip(self.params, self.views(self._stored), strict=True):
            view._share_buffer_to(param)
        self._places = [param.data_ptr() for param in self.params]


def round_into(stored: paddle.Tensor, values: paddle.Tensor, stochastic: bool) -> None:
    """float32 `values` -> `stored` of a narrower dtype, any shape, to nearest or stochastically."""
    rounded = round_stochastically(values) if stochastic else values.astype(stored.dtype)
    paddle.assign(rounded, output=stored)


def round_stochastically(values: paddle.Tensor) -> paddle.Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact; any shape.

    bfloat16 is the upper half of a float32: a random number is added to the lower half, then it is cut off.
    Values that bfloat16 holds exactly stay. Draws from Paddle's generator (`paddle.seed`). Source of the
    practice: arXiv 2010.06192 (pure bfloat16 training).
    """
    noise = paddle.randint(0, 1 << 16, values.shape, dtype="int32")
    bits = paddle.bitwise_and(values.view("int32").add(noise), paddle.full([1], -(1 << 16), dtype="int32"))
    return bits.view("float32").astype("bfloat16")


class FlatGradient:
    """The gradients of all parameters, clipped, as a flat buffer float32 [G, B] that is read by slices of
    rows. Where it is larger than a piece on a CPU it is never there as a whole: each piece is gathered when
    it is asked for.

    finite: bool [1], whether every value is finite, and so is its square. On a GPU nothing waits for it.
    """

    def __init__(self, space: FlatLayout, grads: list[paddle.Tensor], clip: object | None = None) -> None:
        self._space, self._grads, self._clip, self.shape = space, grads, clip, space.shape
        pieces = row_pieces(*space.shape)
        if grads[0].place.is_gpu_place() or len(pieces) == 1:
            self._whole = space.gather(grads)
            squares = paddle.square(self._whole).sum(-1, keepdim=True)
        else:
            self._whole = None
            sums = [paddle.square(space.gather(grads, rows)).sum(-1, keepdim=True) for rows in pieces]
            squares = paddle.concat(sums)
        # A sum of squares is inf or NaN when a value is, and also when the second moment would overflow.
        self.finite = paddle.isfinite(squares).all().reshape([1])
        self._factor = _FACTORS[type(clip)](clip, squares, space) if type(clip) in _FACTORS else None
        if self._whole is not None:
            self._whole = self._clipped(self._whole, slice(0, self.shape[0]))

    def __getitem__(self, rows: slice) -> paddle.Tensor:
        if self._whole is not None:
            return self._whole[rows]
        return self._clipped(self._space.gather(self._grads, rows), rows)

    @property
    def tensor(self) -> paddle.Tensor | FlatGradient:
        """The buffer as one tensor where there is one, else this object, which has the same rows."""
        return self if self._whole is None else self._whole

    def of(self, space: FlatLayout, parts: Callable[[list], list]) -> FlatGradient:
        """The same of a part of each gradient, float32 [G', B]: clipped with the factor of the whole."""
        part = FlatGradient(space, parts(self._grads))
        part.finite, part._factor = self.finite, self._factor
        if part._whole is not None:
            part._whole = part._clipped(part._whole, slice(0, part.shape[0]))
        return part

    def _clipped(self, grad: paddle.Tensor, rows: slice) -> paddle.Tensor:
        if type(self._clip) is ClipGradByValue:
            return paddle.clip(grad, self._clip.min, self._clip.max)
        if self._factor is None:
            return grad
        return grad.multiply_(self._factor if self._factor.ndim < 2 else self._factor[rows])


def _global_norm_factor(
    clip: ClipGradByGlobalNorm, squares: paddle.Tensor, space: FlatSpace
) -> paddle.Tensor:
    norm = paddle.sqrt(squares.sum())
    return clip.clip_norm / paddle.clip(norm, min=clip.clip_norm)


def _norm_factor(clip: ClipGradByNorm, squares: paddle.Tensor, space: FlatSpace) -> paddle.Tensor:
    ids = space.parameter_ids()
    norms = paddle.sqrt(paddle.geometric.segment_sum(squares, ids))[ids]
    return clip.clip_norm / paddle.clip(norms, min=clip.clip_norm)


# from the sums of squares of the groups [G, 1]: what gradients are multiplied by, [] or [G, 1]
_FACTORS = {ClipGradByGlobalNorm: _global_norm_factor, ClipGradByNorm: _norm_factor}
CLIPS = (*_FACTORS, ClipGradByValue)
