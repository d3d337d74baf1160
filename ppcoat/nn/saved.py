"""What autograd keeps for backward: turn it into FP8, and count its bytes.

    with fp8_saved_tensors("coat") as saved:
        loss = model(x)
    loss.backward()
    print(saved.bytes_kept, saved.bytes_unpacked)

The hooks see every tensor that an operator keeps. Large float tensors that carry a gradient become FP8
groups, once each even if several operators keep the same one. Parameters are left alone and not counted (the
model owns them); constants and small tensors are counted and left alone, and so are slices with gaps in
memory. `count_saved_tensors` counts the ordinary case by the same code. Paddle allows one pair of hooks at a
time: these contexts do not nest, and Paddle's `recompute(use_reentrant=False)` has hooks of its own.
Operations with a backward of our own hold what they need themselves: FLUX blocks (flux_block.py) report it
through `record`, what is computed again (checkpoint.py) goes through `hold`.

Source: COAT (arXiv 2410.19313) section 5; facts about what each operator keeps are Paddle 3.3's.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import paddle

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3, FP8Format, get_format

from .held import HeldTensor, PackedTensor, PlainTensor, RebuiltTensor, finely_pack, pack_tensor
from .policy import SavingPolicy, get_policy, granularity_groups

FLOATS = (paddle.float32, paddle.bfloat16, paddle.float16)
# Originals held for a moment, so that the next operators that keep them find their packed copy.
REMEMBERED = 4

_active: ContextVar[SavedTensors | None] = ContextVar("ppcoat_saved_tensors", default=None)
_as_they_are: ContextVar[bool] = ContextVar("ppcoat_kept_as_they_are", default=False)


def saving_now() -> SavedTensors | None:
    """The active context; None where there is none, and within `kept_as_they_are`."""
    return None if _as_they_are.get() else _active.get()


def record(kept: Iterable[HeldTensor]) -> None:
    """Count, in the active context if there is one, what an operation of our own holds for its backward."""
    active = _active.get()
    for each in kept if active is not None else ():
        active.count(each)


@contextmanager
def kept_as_they_are() -> Iterator[None]:
    """Within it nothing is packed: an active context only counts what autograd keeps."""
    token = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(token)


def pack(x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> HeldTensor | Kept:
    """x [..., D] float -> its packed form, shared with whoever packed the same x in the active context and
    counted there; RebuiltTensor if x is computed again, x as it is within `kept_as_they_are`.
    """
    active = _active.get()
    if _as_they_are.get():
        return PlainTensor(x.detach()) if active is None else active.hold(x, None)
    if active is not None:
        return active.rebuilt(x) or active.pack(x, fmt, group_size)
    return pack_tensor(x, fmt, group_size)


def fp8_saved_tensors(
    policy: str = "coat",
    nonlinear_granularity: str = "per_group",
    group_size: int = 128,
    fmt: str = "e4m3",
    min_size: int = 4096,
    fp8_checkpoints: bool = False,
) -> SavedTensors:
    """Context for the forward pass of any model: the tensors that autograd keeps become FP8.

    policy: "none" only counts; all others pack alike, and those with "+recompute" leave out what the model
    names as cheap (`recomputed` in checkpoint.py; FLUX blocks get theirs from `apply_saving_policy`).
    nonlinear_granularity: "per_group", one scale for `group_size` values along the last axis, or
    "per_tensor". Only float tensors of at least `min_size` elements that carry a gradient are packed.
    fp8_checkpoints: so are the inputs of what is `checkpointed`, in E4M3. The forward result is exact; the
    gradients carry FP8 rounding (a few percent RMS at group 128). Raises ConfigError for wrong values.
    """
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ConfigError(f"min_size must be a whole number of at least 0, got {min_size!r}")
    groups, chosen = granularity_groups(nonlinear_granularity, group_size), get_format(fmt)
    named = get_policy(policy, groups)
    named = named if named.fmt is None else replace(named, fmt=chosen)
    return SavedTensors(named, min_size, E4M3 if fp8_checkpoints else None)


def count_saved_tensors() -> SavedTensors:
    """Context: autograd keeps what it always keeps, and the bytes are counted."""
    return SavedTensors(SavingPolicy("none"), 0)


class SavedTensors:
    """Pair of saved-tensor hooks with counters. Made by the functions above; entering it sets the counters to
    zero.

    bytes_kept: held for backward, each storage once. bytes_kept_bf16: the same if the model computed in
    bfloat16, so that a CPU's float32 run can tell what a GPU would hold. bytes_unpacked: what the same
    tensors would hold unpacked. tensors_packed: how many were turned into FP8. policy: what is kept, and how;
    checkpoint_fmt: of the inputs of what is `checkpointed`.
    """

    def __init__(self, policy: SavingPolicy, min_size: int, checkpoint_fmt: FP8Format | None = None) -> None:
        self.policy, self.checkpoint_fmt, self._min_size = policy, checkpoint_fmt, min_size
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
            self._remember(key, x, packed)
        self._recent.move_to_end(key)
        return self._recent[key][1]

    def hold(self, x: paddle.Tensor, fmt: FP8Format | None, finely: bool = False) -> Kept:
        """x as an operation of our own holds it, counted: in `fmt` and groups of the policy where the hooks
        would pack it, with half a byte more if `finely`; else as it is.
        """
        rebuilt, order = self.rebuilt(x), _memory_order(x) if self._wants(x, fmt) else None
        if rebuilt is not None:
            return Kept(rebuilt, x.shape, list(range(x.ndim)))
        if order is None:
            return self._keep_plain(x)
        with paddle.no_grad():
            stored = x.detach().transpose(order)
            if not finely:
                return Kept(self.pack(stored, fmt, self.policy.group_size), stored.shape, order)
            packed = finely_pack(stored, self.policy.group_size)
        self.count(packed)
        return Kept(packed, stored.shape, order)

    def rebuild(self, x: paddle.Tensor, by: RebuiltTensor) -> None:
        """Whoever keeps x within the next moments keeps `by` instead, which is not counted."""
        self._remember((_identity(x), None, None), x, by)

    def rebuilt(self, x: paddle.Tensor) -> RebuiltTensor | None:
        """What `rebuild` was told of the memory of x."""
        return self._recent.get((_identity(x), None, None), (None, None))[1]

    def count(self, kept: HeldTensor) -> None:
        """Add one object that is held for backward."""
        self.bytes_kept += kept.nbytes
        self.bytes_kept_bf16 += kept.nbytes_bf16
        self.bytes_unpacked += kept.nbytes_unpacked
        self.tensors_packed += not isinstance(kept, PlainTensor)

    def _reset(self) -> None:
        self.bytes_kept = self.bytes_kept_bf16 = self.bytes_unpacked = self.tensors_packed = 0
        self._recent: OrderedDict[tuple, tuple[paddle.Tensor, PackedTensor | RebuiltTensor]] = OrderedDict()
        self._plain: weakref.WeakValueDictionary[tuple, Kept] = weakref.WeakValueDictionary()

    def _on_save(self, x: paddle.Tensor) -> Kept:
        return self.hold(x, self.policy.fmt)

    @staticmethod
    def _on_use(kept: Kept) -> paddle.Tensor:
        return kept.unpack()

    def _remember(self, key: tuple, x: paddle.Tensor, kept: PackedTensor | RebuiltTensor) -> None:
        # Holding x itself is what makes its address an identity: the memory cannot be given to another
        # tensor.
        self._recent[key] = (x, kept)
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    def _wants(self, x: paddle.Tensor, fmt: FP8Format | None) -> bool:
        """A tensor without gradient is a constant (RoPE tables, masks): its owner holds it anyway, and
        exactness is free.
        """
        if fmt is None or _as_they_are.get() or x.dtype not in FLOATS:
            return False
        if x.persistable or x.stop_gradient:
            return False
        return x.ndim > 0 and x.size >= self._min_size

    def _keep_plain(self, x: paddle.Tensor) -> Kept:
        key = _identity(x)
        kept = self._plain.get(key)
        if kept is None:
            # Without its graph: an op that keeps its own result would be held by itself, and never freed.
            kept = self._plain[key] = Kept(x.detach())
            if not x.persistable:
                self.count(PlainTensor(x, statistic=x.stop_gradient))
        return kept


@dataclass(eq=False)
class Kept:
    """What the graph holds for one saved tensor: itself, or another form of it with the shape and axis order
    of its memory.
    """

    tensor: paddle.Tensor | HeldTensor
    shape: list[int] | None = None
    order: list[int] | None = None

    def unpack(self) -> paddle.Tensor:
        """The tensor again."""
        if isinstance(self.tensor, paddle.Tensor):
            return self.tensor
        with paddle.no_grad():
            return self.tensor.unpack().reshape(self.shape).transpose(_inverse(self.order))


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
