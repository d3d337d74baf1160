"""Frozen parameters of the last blocks live in host memory and visit the device while their block computes.

    swapper = swap_blocks(list(last_blocks(transformer, 20).values()))     # after inject_lora
    ...                                                         # train and draw as before
    swapper.remove()

When a block begins, forward or backward, the next one's parameters begin to travel; at most two swapped
blocks are on the device at once. Frozen parameters never change, so nothing travels back. The data of a
tensor is exchanged, not the tensor: autograd, saved tensors and checkpointing see the same parameters, and
results are equal bit for bit. LoRA parameters never move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import paddle
from paddle import nn

from ppcoat.device import on_gpu
from ppcoat.errors import ConfigError

from .linear import AdaptedLinear

FORWARD, BACKWARD = 1, -1


class Transport(Protocol):
    """How tensors, of any shape and dtype, get from host memory to the device."""

    def to_host(self, x: paddle.Tensor) -> paddle.Tensor:
        """A copy of x, or x where it is there already, from which `start` can copy fast."""

    def start(self, hosts: Sequence[paddle.Tensor]) -> tuple[list[paddle.Tensor], object]:
        """Begin to copy to the device -> tensors that may be used after wait(ticket), and the ticket."""

    def wait(self, ticket: object) -> None:
        """Let the computation that is asked for from now on begin after the copies have arrived."""


class SameMemory:
    """Host and device are the same: tensors of any shape and dtype stay where they are."""

    def to_host(self, x: paddle.Tensor) -> paddle.Tensor:
        return _alias(x)

    def start(self, hosts: Sequence[paddle.Tensor]) -> tuple[list[paddle.Tensor], object]:
        return list(hosts), None

    def wait(self, ticket: object) -> None:
        return None


class CudaTransport:
    """For tensors of any shape and dtype: page-locked host memory and a stream of its own, which copies while
    the other computes."""

    def __init__(self) -> None:
        self._stream = paddle.device.Stream()

    def to_host(self, x: paddle.Tensor) -> paddle.Tensor:
        return _alias(x) if x.place.is_cuda_pinned_place() else x.pin_memory()

    def start(self, hosts: Sequence[paddle.Tensor]) -> tuple[list[paddle.Tensor], object]:
        # The copies may get the memory of a block just sent away, which kernels in the queue still read.
        self._stream.wait_stream(paddle.device.current_stream())
        with paddle.device.stream_guard(self._stream):
            copies = [host.cuda(blocking=False) for host in hosts]
            return copies, self._stream.record_event()

    def wait(self, ticket: object) -> None:
        paddle.device.current_stream().wait_event(ticket)


class BlockSwapper:
    """Made by `swap_blocks`. resident: numbers of the swapped blocks that are on the device or on their
    way."""

    def __init__(self, blocks: Sequence[nn.Layer], transport: Transport) -> None:
        self._transport = transport
        self._tensors = [_frozen_tensors(block) for block in blocks]
        self._hosts = [[transport.to_host(x) for x in tensors] for tensors in self._tensors]
        self._on_the_way: dict[int, tuple[list[paddle.Tensor], object]] = {}
        self._current, self._direction = -1, FORWARD
        self.resident: list[int] = []
        self._hooks = []
        for index, block in enumerate(blocks):
            self._exchange(index, self._hosts[index])
            self._hooks.append(block.register_forward_pre_hook(self._before_forward(index)))
            self._hooks.append(block.register_forward_post_hook(self._after_forward(index)))

    def enter(self, index: int, direction: int) -> None:
        """Swapped block `index` is about to compute: have it on the device, and send for the next."""
        if index == self._current and index > 0 and direction == FORWARD and self._direction == BACKWARD:
            return  # checkpointing runs the block again, within its backward
        self._current, self._direction = index, direction
        following = index + direction
        if not 0 <= following < len(self._tensors):
            following = index - direction  # the end of the row: backward, or the next step, turns round here
        for other in [i for i in self.resident if i not in (index, following)]:
            self._leave(other)
        if index not in self.resident:
            self._begin(index)
        self._arrive(index)
        if 0 <= following < len(self._tensors) and following not in self.resident:
            self._begin(following)

    @property
    def tensors(self) -> list[paddle.Tensor]:
        """All that are swapped, of any shape and dtype."""
        return [x for tensors in self._tensors for x in tensors]

    def rest(self) -> None:
        """Let all blocks be in host memory until one begins again."""
        for index in list(self.resident):
            self._leave(index)

    def remove(self) -> None:
        """Bring all blocks to the device for good, and take the hooks out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for index in range(len(self._tensors)):
            if index not in self.resident:
                self._begin(index)
            self._arrive(index)

    def _begin(self, index: int) -> None:
        self._on_the_way[index] = self._transport.start(self._hosts[index])
        self.resident.append(index)

    def _arrive(self, index: int) -> None:
        if index in self._on_the_way:
            copies, ticket = self._on_the_way.pop(index)
            self._transport.wait(ticket)
            self._exchange(index, copies)

    def _leave(self, index: int) -> None:
        self._on_the_way.pop(index, None)
        self._exchange(index, self._hosts[index])
        self.resident.remove(index)

    def _exchange(self, index: int, sources: Sequence[paddle.Tensor]) -> None:
        for tensor, source in zip(self._tensors[index], sources, strict=True):
            take_data(tensor, source)

    def _before_forward(self, index: int):
        def before(block: nn.Layer, inputs: tuple) -> None:
            self.enter(index, FORWARD)

        return before

    def _after_forward(self, index: int):
        def at_backward(gradient: paddle.Tensor) -> None:
            self.enter(index, BACKWARD)

        def after(block: nn.Layer, inputs: tuple, outputs: paddle.Tensor | tuple) -> None:
            # the gradient of an output is there just before the block's own backward begins
            for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
                if output is not None and not output.stop_gradient:
                    output.register_hook(at_backward)

        return after


def swap_blocks(blocks: Sequence[nn.Layer], transport: Transport | None = None) -> BlockSwapper:
    """Let `blocks` (in the order in which they compute) swap their frozen parameters.

    Call it after inject_lora, before or after a saving policy is put in. transport: None chooses by the
    current device; on a CPU, host and device are the same and no memory is saved.
    """
    if transport is None:
        transport = CudaTransport() if on_gpu() else SameMemory()
    return BlockSwapper(blocks, transport)


def last_blocks(model: nn.Layer, count: int) -> dict[str, nn.Layer]:
    """The last `count` of model.named_blocks(), by path, in the order in which they run.

    Raises ConfigError for a count that is not from 0 to the number of blocks.
    """
    blocks = list(model.named_blocks().items())
    check_count(count, len(blocks))
    return dict(blocks[len(blocks) - count :])


def check_count(count: int, blocks: int) -> None:
    """Raises ConfigError for a count that is not from 0 to the number of blocks."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= blocks:
        raise ConfigError(f"blocks_to_swap: came {count!r}, but this model has {blocks} blocks: lower it")


def move_to_host(x: paddle.Tensor) -> None:
    """Give the tensor x (any shape and dtype) its data in page-locked host memory, in place; on a CPU it is
    there already."""
    if x.place.is_gpu_place():
        take_data(x, x.pin_memory())


def take_data(x: paddle.Tensor, source: paddle.Tensor) -> None:
    """Give the tensor x (any shape and dtype) the data of another, wherever that lies, in place."""
    # `source` has a name until the end: get_tensor() gives a reference that does not keep its tensor
    x.get_tensor()._share_data_with(source.get_tensor())


def _frozen_tensors(block: nn.Layer) -> list[paddle.Tensor]:
    """Parameters and buffers (FP8 codes and scales) of a block, but for its adapters and what is trained."""
    own = {id(p) for layer in block.sublayers(include_self=True) if isinstance(layer, AdaptedLinear)
             for p in (getattr(layer, name) for name in layer.factors)}  # fmt: skip
    tensors = [*block.parameters(), *block.buffers()]
    return [x for x in tensors if x.stop_gradient and id(x) not in own]


def _alias(x: paddle.Tensor) -> paddle.Tensor:
    """Another tensor on the data of x, which keeps it when x gets other data."""
    other = paddle.empty([0], x.dtype)
    take_data(other, x)
    return other
