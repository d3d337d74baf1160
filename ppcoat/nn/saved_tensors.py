"""What is saved for backward: by the ops of ops.py, which ask a `Saver`, and by autograd, through hooks.

    with fp8_saved_tensors("coat") as saved:
        loss = model(x)
    loss.backward()
    print(saved.bytes_kept, saved.bytes_unpacked)

The context is both. As the active Saver it tells ops what to save of their inputs (policy.py) and counts it.
Its hooks see every tensor that an operator of Paddle saves, so they serve any model: large float tensors that
carry a gradient become FP8 groups, once each even if several operators save the same one. Parameters are left
alone and not counted (the model owns them); constants and small tensors are counted and left alone, and so
are slices with gaps in memory. `count_saved_tensors` counts the ordinary case by the same code. Paddle allows
one pair of hooks at a time: these contexts do not nest, and Paddle's `recompute(use_reentrant=False)` has
hooks of its own.

Source: COAT (arXiv 2410.19313) section 5; facts about what each operator saves are Paddle 3.3's.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Protocol

import paddle

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3, FP8Format, get_format

from .policy import AS_IT_IS, NONE, SavingPolicy, get_policy, granularity_groups
from .saved_forms import (
    FP8Saved,
    PlainSaved,
    Recomputed,
    SavedTensor,
    SharedSaved,
    numel,
    save_fp8,
    save_residual,
)

FLOATS = (paddle.float32, paddle.bfloat16, paddle.float16)
# Originals that the hooks hold for a moment, so that the next operators that save them find their FP8 copy.
REMEMBERED = 4

_active: ContextVar[Saver | None] = ContextVar("ppcoat_saver", default=None)


def saver() -> Saver:
    """The active Saver. Outside of all contexts it is one that leaves everything to autograd."""
    return _active.get() or Saver(NONE)


def policy_of_recomputation() -> SavingPolicy:
    """What ops save while that is computed again which is `checkpointed` now: by hand what they need, as it
    is; outside of all contexts what autograd saves, so that gradients are those without checkpointing."""
    return NONE if _active.get() is None else AS_IT_IS


@contextmanager
def saved_as_they_are(policy: SavingPolicy = AS_IT_IS) -> Iterator[None]:
    """Context manager: ops save their inputs as they are and hooks turn nothing into FP8. What is saved still
    counts in the context around it."""
    inner = Saver(policy, counted_by=_active.get())
    token = _active.set(inner)
    try:
        yield
    finally:
        _active.reset(token)
        inner.forget()


class TakesOutput(Protocol):
    """An op that saves nothing of its output's size, because whoever reads the output gives it back."""

    output: paddle.Tensor | None


@dataclass(eq=False)
class _TensorFacts:
    """What is known of a tensor that is alive: how it is computed again, the FP8 forms that exist of it and
    which of them are counted as saved, what its readers share, the op that wants it back in backward."""

    tensor: weakref.ref
    recomputed: Recomputed | None = None
    shape: list[int] | None = None  # of what is computed again
    forms: dict[tuple, FP8Saved] = field(default_factory=dict)
    counted: set[tuple] = field(default_factory=set)
    inputs: dict[int, SharedSaved] = field(default_factory=dict)
    maker: TakesOutput | None = None


class Saver:
    """Saves tensors for backward in the forms that `policy` names, each tensor once, and counts them.

    bytes_kept: saved for backward, each storage once. bytes_kept_bf16: the same if the model computed in
    bfloat16, so that a CPU's float32 run can tell what a GPU would save. bytes_unpacked: what the same
    tensors would take as they were. ("kept" means saved: logs of users have the key kept_bytes, so the
    counters stay as they are called.) counted_by: another Saver that counts instead. checkpoint_fmt: see
    `save_checkpoint`.
    """

    checkpoint_fmt: FP8Format | None = None
    _plain: weakref.WeakValueDictionary[tuple, PlainSaved]

    def __init__(self, policy: SavingPolicy, counted_by: Saver | None = None) -> None:
        self.policy, self._counted_by = policy, counted_by
        self._reset()
        if counted_by is not None:
            self._plain = counted_by._plain

    def save(self, x: paddle.Tensor) -> SavedTensor:
        """x [..., D] in the groups of the policy, or as it is under a policy without a format."""
        fmt = self.policy.fmt
        return self.save_plain(x) if fmt is None else self._fp8(x, fmt, self.policy.group_size)

    def save_residual(self, x: paddle.Tensor) -> SavedTensor:
        """x [..., D], D even, in E4M3 with a 4-bit residual: for what 3 bits of mantissa are too few."""
        if self.policy.fmt is None:
            return self.save_plain(x)
        return self.count(save_residual(x, self.policy.group_size))

    def save_plain(self, x: paddle.Tensor, statistic: bool = False) -> SavedTensor:
        """x, of any shape, as it is. statistic: it is float32 whatever the compute dtype."""
        if x.persistable:
            return PlainSaved(x.detach(), statistic)  # its address says nothing: block swapping changes it
        key = _identity(x)
        saved = self._plain.get(key)
        if saved is not None and saved.tensor.shape != x.shape:
            return PlainSaved(x.detach(), statistic)  # the same memory, counted already
        if saved is None:
            # Without its graph: an op that saves its own result would be held by itself, and never freed.
            saved = self._plain[key] = self.count(PlainSaved(x.detach(), statistic))
        return saved

    def save_input(self, x: paddle.Tensor, fmt: FP8Format | None, group_size: int | None) -> SavedTensor:
        """x [..., D] as a Linear wants it for its weight's gradient: computed again by the op that made it,
        where that op offers it; else in `fmt`; else (fmt None) as `save` does.
        """
        saved = self.offered(x)
        if saved is None:
            as_policy = fmt is None or (self.policy.by_hand and self.policy.fmt is None)
            saved = self.save(x) if as_policy else self._fp8(x, fmt, group_size)
        return saved if isinstance(saved, PlainSaved) else self._shared(x, saved)

    def save_checkpoint(self, x: paddle.Tensor) -> SavedTensor:
        """Tokens x [B, tokens, D], an input of what is `checkpointed`, in `checkpoint_fmt` (None: as they
        are)."""
        fmt = self.checkpoint_fmt
        return self.save_plain(x) if fmt is None else self._fp8(x, fmt, self.policy.group_size)

    def offer(self, output: paddle.Tensor, again: Callable[[], paddle.Tensor]) -> None:
        """Whoever saves `output` (any shape) while it is alive saves nothing, and calls `again` in
        backward."""
        known = self._known_of(output)
        known.recomputed, known.shape = Recomputed(again), output.shape

    def _shared(self, x: paddle.Tensor, saved: SavedTensor) -> SharedSaved:
        """`saved` for one more of the readers of x, of any shape."""
        shared = self._known_of(x).inputs.setdefault(id(saved), SharedSaved(saved))
        shared.readers += 1
        return shared

    def offered(self, x: paddle.Tensor) -> Recomputed | None:
        """What `offer` was told of x, of any shape, or of what x is a reshaped view of. A handle without
        gradient gets nothing: its reader could come after the op has given back what it saved."""
        known = self._known_of(x)
        if known.recomputed is None or x.stop_gradient:
            return None
        if x.shape == known.shape:
            return known.recomputed
        again, shape = known.recomputed.again, x.shape
        return Recomputed(lambda: again().reshape(shape))

    def wants_back(self, output: paddle.Tensor, maker: TakesOutput) -> None:
        """The attention that reads `output` [B, tokens, heads, head_dim] will set maker.output to it in
        backward."""
        self._known_of(output).maker = maker

    def maker_of(self, x: paddle.Tensor) -> TakesOutput | None:
        """The op that called `wants_back` for x (any shape)."""
        return self._known_of(x).maker

    def count(self, saved: SavedTensor) -> SavedTensor:
        """Add one object that is saved for backward; returns it."""
        if self._counted_by is not None:
            return self._counted_by.count(saved)
        self.bytes_kept += saved.nbytes
        self.bytes_kept_bf16 += saved.nbytes_bf16
        self.bytes_unpacked += saved.nbytes_unpacked
        return saved

    def forget(self) -> None:
        """The forward pass is over: nothing that comes is a tensor that was known."""
        self._known.clear()

    def fp8_form(self, x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> FP8Saved:
        """x [..., D] in FP8 for whoever computes with it now: made once while x is alive, also for those that
        save it. Counted when it is saved. Results of products depend on it, see `_identity`."""
        forms, key = self._known_of(x).forms, (fmt.name, group_size, *x.shape)
        if key not in forms:
            views = (form for other, form in forms.items() if other[:2] == key[:2] and other[-1] == key[-1])
            view = next(views, None)  # the same rows, reshaped
            forms[key] = save_fp8(x, fmt, group_size) if view is None else view.reshaped(x.shape)
        return forms[key]

    def _fp8(self, x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> SavedTensor:
        form, kind = self.fp8_form(x, fmt, group_size), (fmt.name, group_size, x.shape[-1])
        counted = self._known_of(x).counted
        if kind not in counted:
            counted.add(kind)
            self.count(form)
        return form

    def _known_of(self, x: paddle.Tensor) -> _TensorFacts:
        """While x is alive its memory is its own, so that the address tells other handles of it, too."""
        key = _identity(x)
        known = self._known.get(key)
        if known is None or known.tensor() is None:
            known = self._known[key] = _TensorFacts(weakref.ref(x, lambda _: self._known.pop(key, None)))
        return known

    def _reset(self) -> None:
        self.bytes_kept = self.bytes_kept_bf16 = self.bytes_unpacked = 0
        self._known: dict[tuple, _TensorFacts] = {}
        self._plain = weakref.WeakValueDictionary()


def fp8_saved_tensors(
    policy: str | SavingPolicy = "coat",
    nonlinear_granularity: str = "per_group",
    group_size: int = 128,
    fmt: str = "e4m3",
    min_size: int = 4096,
    fp8_checkpoints: bool = False,
) -> SavedTensors:
    """Context manager for the forward pass of any model: what is saved for backward becomes FP8.

    policy: a name of policy.py, or an object with groups and format of its own. "none" only counts. Ops
    follow it to the letter; under the hooks, which serve all other operators, those but "none" are alike.
    nonlinear_granularity: "per_group", one scale for `group_size` values along the last axis, or
    "per_tensor". min_size: the hooks turn float tensors of at least so many elements that carry a gradient
    into FP8. fp8_checkpoints: so are the inputs of what is `checkpointed`, in E4M3. The forward result is
    exact; the gradients carry FP8 rounding (a few percent RMS at group 128). Raises ConfigError for wrong
    values.
    """
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ConfigError(f"min_size must be a whole number of at least 0, got {min_size!r}")
    groups, chosen = granularity_groups(nonlinear_granularity, group_size), get_format(fmt)
    if isinstance(policy, str):
        policy = get_policy(policy, groups)
        policy = policy if policy.fmt is None else replace(policy, fmt=chosen)
    return SavedTensors(policy, min_size, E4M3 if fp8_checkpoints else None)


def count_saved_tensors() -> SavedTensors:
    """Context manager: autograd saves what it always saves, and the bytes are counted."""
    return SavedTensors(NONE, 0)


class SavedTensors(Saver):
    """The active Saver of a `with` block, and a pair of saved-tensor hooks. Made by the functions above;
    entering it sets the counters to zero.
    """

    def __init__(self, policy: SavingPolicy, min_size: int, checkpoint_fmt: FP8Format | None = None) -> None:
        super().__init__(policy)
        self.checkpoint_fmt, self._min_size = checkpoint_fmt, min_size
        self._hooks = paddle.autograd.saved_tensors_hooks(self._on_save, self._on_use)

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
        self.forget()

    def forget(self) -> None:
        super().forget()
        self._recent.clear()

    def _reset(self) -> None:
        super()._reset()
        self._recent: OrderedDict[tuple, tuple[paddle.Tensor, SavedTensor]] = OrderedDict()

    def _on_save(self, x: paddle.Tensor) -> _InMemoryOrder:
        known = self._known.get(_identity(x))
        if known is not None and known.recomputed is not None and known.tensor() is not None:
            return _InMemoryOrder(
                self._shared(known.tensor(), known.recomputed), x.shape, list(range(x.ndim))
            )
        order = _memory_order(x) if self._wants(x) else None
        if order is None:
            return _InMemoryOrder(self.save_plain(x, statistic=x.stop_gradient))
        with paddle.no_grad():
            stored = x.detach().transpose(order)
            return _InMemoryOrder(self._fp8_for_a_moment(stored), stored.shape, order)

    @staticmethod
    def _on_use(saved: _InMemoryOrder) -> paddle.Tensor:
        return saved.unpack()

    def _fp8_for_a_moment(self, x: paddle.Tensor) -> SavedTensor:
        """x in FP8. The same memory seen again a moment later gives the same object: operators that read one
        tensor follow each other, and each hook call gets a handle of its own, which dies at once."""
        key = _identity(x)
        if key not in self._recent:
            # Holding x itself is what makes its address an identity: the memory cannot be given to another.
            self._recent[key] = (x, self._fp8(x, self.policy.fmt, self.policy.group_size))
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key][1]

    def _wants(self, x: paddle.Tensor) -> bool:
        """A tensor without gradient is a constant (RoPE tables, masks): its owner has it anyway, and
        exactness is free.
        """
        if self.policy.fmt is None or _active.get() is not self or x.dtype not in FLOATS:
            return False
        if x.persistable or x.stop_gradient:
            return False
        return x.ndim > 0 and numel(x) >= self._min_size


@dataclass(eq=False)
class _InMemoryOrder:
    """What the graph holds for one saved tensor: a form of it, with the shape and axis order of its memory
    where that form is not the tensor itself."""

    saved: SavedTensor
    shape: list[int] | None = None
    order: list[int] | None = None

    def unpack(self) -> paddle.Tensor:
        """The tensor again."""
        if self.order is None:
            return self.saved.unpack()
        with paddle.no_grad():
            return self.saved.unpack().reshape(self.shape).transpose(_inverse(self.order))


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
    """Equal for two handles of the same live memory read in the same order, also for reshaped views. A change
    by `set_value` or `copy_` is not seen, because Paddle counts in-place operations only: nothing may change
    an activation in that way.
    """
    layout = "contiguous" if x.is_contiguous() else (tuple(x.shape), tuple(x.strides))
    return x.data_ptr(), numel(x), x.dtype, layout, x.inplace_version
