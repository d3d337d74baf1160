"""What autograd keeps for backward: turn it into FP8, and count its bytes.

    with fp8_saved_tensors("coat") as saved:
        loss = model(x)
    loss.backward()
    print(saved.bytes_kept, saved.bytes_unpacked)

The hooks see every tensor that an operator keeps. Large float tensors that carry a gradient become FP8
groups, once each even if several operators keep the same one. Parameters are left alone and not counted (the
model owns them); constants and small tensors are counted and left alone, and so are slices with gaps in
memory. `count_saved_tensors` counts the ordinary case by the same code. Paddle allows one pair of hooks at a
time: these contexts do not nest, and `recompute(use_reentrant=False)` has hooks of its own. Operations with a
backward of our own (flux_block.py) hold what they need themselves and report it through `record`.

Source: COAT (arXiv 2410.19313) section 5; facts about what each operator keeps are Paddle 3.3's.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import paddle

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import FP8Format, get_format

from .held import HeldTensor, PackedTensor, PlainTensor, pack_tensor
from .policy import check_policy, granularity_groups

FLOATS = (paddle.float32, paddle.bfloat16, paddle.float16)
# Originals held for a moment, so that the next operators that keep them find their packed copy.
REMEMBERED = 4

_active: ContextVar[SavedTensors | None] = ContextVar("ppcoat_saved_tensors", default=None)
_as_they_are: ContextVar[bool] = ContextVar("ppcoat_kept_as_they_are", default=False)


def record(kept: Iterable[HeldTensor]) -> None:
    """Count, in the active context if there is one, what an operation of our own holds for its backward."""
    active = _active.get()
    for each in kept if active is not None else ():
        active.count(each)


@contextmanager
def kept_as_they_are() -> Iterator[None]:
    """Within it, an active context packs nothing: it only counts what autograd keeps."""
    token = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(token)


def pack(x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> PackedTensor:
    """x [..., D] float -> PackedTensor, shared with whoever packed the same x in the active context; counted
    there.
    """
    active = _active.get()
    if active is not None:
        return active.pack(x, fmt, group_size)
    return pack_tensor(x, fmt, group_size)


def fp8_saved_tensors(
    policy: str = "coat",
    nonlinear_granularity: str = "per_group",
    group_size: int = 128,
    fmt: str = "e4m3",
    min_size: int = 4096,
) -> SavedTensors:
    """Context for the forward pass of any model: the tensors that autograd keeps become FP8.

    policy: "none" only counts; all others pack alike (what they say about FLUX blocks is put in by
    `apply_saving_policy`). nonlinear_granularity: "per_group", one scale for `group_size` values along the
    last axis, or "per_tensor". Only float tensors of at least `min_size` elements that carry a gradient are
    packed. The forward result is exact; the gradients carry FP8 rounding (a few percent RMS at group 128).
    Raises ConfigError for wrong values.
    """
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ConfigError(f"min_size must be a whole number of at least 0, got {min_size!r}")
    groups, chosen = granularity_groups(nonlinear_granularity, group_size), get_format(fmt)
    if check_policy(policy) == "none":
        return count_saved_tensors()
    return SavedTensors(chosen, groups, min_size)


def count_saved_tensors() -> SavedTensors:
    """Context: autograd keeps what it always keeps, and the bytes are counted."""
    return SavedTensors(None, None, 0)


class SavedTensors:
    """Pair of saved-tensor hooks with counters. Made by the functions above; entering it sets the counters to
    zero.

    bytes_kept: held for backward, each storage once. bytes_kept_bf16: the same if the model computed in
    bfloat16, so that a CPU's float32 run can tell what a GPU would hold. bytes_unpacked: what the same
    tensors would hold unpacked. tensors_packed: how many were turned into FP8.
    """

    def __init__(self, fmt: FP8Format | None, group_size: int | None, min_size: int) -> None:
        self._fmt, self._group_size, self._min_size = fmt, group_size, min_size
        self._hooks = paddle.autograd.saved_tensors_hooks(self._on_save, self._on_use)
        self._reset()

    def __enter__(self) -> SavedTensors:
        if _active.get() is not None:
            raise ConfigError("saved-tensor contexts do not nest: leave the active one first")
        self._reset()
        self._hooks.__enter__()
        self._token = _active.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.reset(self._token)
        self._hooks.__exit__(*error)
        self._recent.clear()

    def pack(self, x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> PackedTensor:
        """x -> its packed form; the same memory seen again a moment later gives the same object. Counts it
        once.
        """
        key = (_identity(x), fmt.name, group_size)
        if key not in self._recent:
            packed = pack_tensor(x, fmt, group_size)
            self.count(packed)
            # Holding x itself is what makes its address an identity: the memory cannot be given to another
            # tensor.
            self._recent[key] = (x, packed)
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key][1]

    def count(self, kept: HeldTensor) -> None:
        """Add one object that is held for backward."""
        self.bytes_kept += kept.nbytes
        self.bytes_kept_bf16 += kept.nbytes_bf16
        self.bytes_unpacked += kept.nbytes_unpacked
        self.tensors_packed += not isinstance(kept, PlainTensor)

    def _reset(self) -> None:
        self.bytes_kept = self.bytes_kept_bf16 = self.bytes_unpacked = self.tensors_packed = 0
        self._recent: OrderedDict[tuple, tuple[paddle.Tensor, PackedTensor]] = OrderedDict()
        self._plain: weakref.WeakValueDictionary[tuple, _Kept] = weakref.WeakValueDictionary()

    def _on_save(self, x: paddle.Tensor) -> _Kept:
        order = _memory_order(x) if self._wants(x) else None
        if order is None:
            return self._keep_plain(x)
        with paddle.no_grad():
            stored = x.detach().transpose(order)
        return _Kept(self.pack(stored, self._fmt, self._group_size), stored.shape, order)

    def _on_use(self, kept: _Kept) -> paddle.Tensor:
        if not isinstance(kept.tensor, PackedTensor):
            return kept.tensor
        with paddle.no_grad():
            return kept.tensor.unpack().reshape(kept.shape).transpose(_inverse(kept.order))

    def _wants(self, x: paddle.Tensor) -> bool:
        """A tensor without gradient is a constant (RoPE tables, masks): its owner holds it anyway, and
        exactness is free.
        """
        if self._fmt is None or _as_they_are.get() or x.dtype not in FLOATS:
            return False
        if x.persistable or x.stop_gradient:
            return False
        return x.ndim > 0 and x.size >= self._min_size

    def _keep_plain(self, x: paddle.Tensor) -> _Kept:
        key = _identity(x)
        kept = self._plain.get(key)
        if kept is None:
            # Without its graph: an op that keeps its own result would be held by itself, and never freed.
            kept = self._plain[key] = _Kept(x.detach())
            if not x.persistable:
                self.count(PlainTensor(x, statistic=x.stop_gradient))
        return kept


@dataclass(eq=False)
class _Kept:
    """What the graph holds for one saved tensor: itself, or its packed form with the shape and axis order of
    its memory.
    """

    tensor: paddle.Tensor | PackedTensor
    shape: list[int] | None = None
    order: list[int] | None = None


def _memory_order(x: paddle.Tensor) -> list[int] | None:
    """Axes from the slowest to the fastest in memory, None if x has gaps (a slice of something larger).

    Paddle reads what an unpack hook returns with the strides of the saved tensor, so it must come back in the
    same order.
    """
    if x.is_contiguous():
        return list(range(x.ndim))
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    return order if x.detach().transpose(order).is_contiguous() else None


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda axis: order[axis])


def _identity(x: paddle.Tensor) -> tuple:
    """Equal for two handles of the same live memory read in the same order; reshaped views share their packed
    copy.
    """
    layout = "contiguous" if x.is_contiguous() else (tuple(x.shape), tuple(x.strides))
    return x.data_ptr(), x.size, x.dtype, layout, x.inplace_version
