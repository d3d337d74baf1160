"""Where the parts of a pipeline are while it draws: all on the device, or each there only while it computes.

    pipeline.enable_model_cpu_offload()         the encoders come and go, then the transformer, then the VAE
    pipeline.enable_block_swap(20)              the transformer's last 20 blocks visit one by one (nn/swap.py)
    pipeline.enable_sequential_cpu_offload()    both, for all blocks of all models

A part is sent for when it is called, by whatever pipeline, and the one before it leaves. The data of a tensor
is exchanged, not the tensor: adapters and whoever holds a parameter see the same, and pictures are equal bit
for bit. On a CPU host and device are one, and all this changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import paddle
from paddle import nn
from ppdiffusers import AutoencoderKL

from ppcoat.device import on_gpu, set_device
from ppcoat.errors import ConfigError
from ppcoat.nn.swap import BlockSwapper, Transport, last_blocks, swap_blocks, take_data

ENCODERS = ("text_encoder", "text_encoder_2", "clip_model")


@dataclass(frozen=True)
class Placement:
    """How a pipeline draws within a card. quantize: format of the transformer's weights, False for floats.
    offload: only the part that computes is on the device, and the text encoders are gone once all prompts are
    encoded. stream_encoders: the blocks of the text encoders visit it one by one. blocks_to_swap: so many of
    the transformer's do. vae_tiling, vae_slicing: the VAE sees a tile, a picture at a time."""

    quantize: str | bool = False
    offload: bool = False
    stream_encoders: bool = False
    blocks_to_swap: int = 0
    vae_tiling: bool = False
    vae_slicing: bool = False

    def __str__(self) -> str:
        """What a user reads of it, in one line."""
        base = f"{self.quantize.upper()} base" if self.quantize else "base not quantised"
        parts = [base]
        if self.offload:
            streamed = ", their blocks one by one" if self.stream_encoders else ""
            parts.append(f"text encoders first, then off the card{streamed}")
            parts.append("transformer and VAE in turns")
        if self.blocks_to_swap:
            parts.append(f"{self.blocks_to_swap} blocks swapped")
        parts += ["VAE in tiles"] if self.vae_tiling else []
        parts += ["one picture after the other through the VAE"] if self.vae_slicing else []
        return "; ".join(parts)


class Carrier(Protocol):
    """How the data of tensors, of any shape and dtype, gets to the device and back, in place."""

    def to_device(self, x: paddle.Tensor) -> None:
        """Give x its data on the current device."""

    def to_host(self, x: paddle.Tensor) -> None:
        """Give x its data in host memory."""


class OneMemory:
    """Host and device are the same: tensors of any shape and dtype stay where they are."""

    def to_device(self, x: paddle.Tensor) -> None:
        return None

    def to_host(self, x: paddle.Tensor) -> None:
        return None


class CudaCarrier:
    """For tensors of any shape and dtype: the current GPU and pageable memory of the host."""

    def to_device(self, x: paddle.Tensor) -> None:
        if not x.place.is_gpu_place():
            take_data(x, x.cuda())

    def to_host(self, x: paddle.Tensor) -> None:
        if x.place.is_gpu_place():
            take_data(x, x.cpu())


class Offload:
    """Keeps all but one of some models in host memory. current: the name of the one on the device."""

    def __init__(
        self, models: Mapping[str, nn.Layer], swappers: dict[str, BlockSwapper], carrier: Carrier
    ) -> None:
        """models: by name. swappers: of those whose blocks are swapped; they move these tensors."""
        self._models, self._swappers, self._carrier = dict(models), swappers, carrier
        self.current: str | None = None
        for model in self._models.values():
            self._move(model, carrier.to_host)
        self._hooks = [
            layer.register_forward_pre_hook(self._before(name))
            for name, model in self._models.items()
            for layer in _entries(model)
        ]
        _give_back()

    def enter(self, name: str | None) -> None:
        """This model is about to compute: the one before it leaves. None: it only leaves."""
        if name == self.current:
            return
        if self.current is not None:
            if self.current in self._swappers:
                self._swappers[self.current].rest()
            self._move(self._models[self.current], self._carrier.to_host)
            _give_back()
        if name is not None:
            self._move(self._models[name], self._carrier.to_device)
        self.current = name

    def forget(self, name: str) -> None:
        """This model is not needed any more."""
        del self._models[name]
        self._swappers.pop(name, None)
        self.current = None if self.current == name else self.current

    def remove(self) -> None:
        """Take the hooks out: all stay where they are."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, name: str):
        def before(layer: nn.Layer, inputs: tuple) -> None:
            self.enter(name)

        return before

    def _move(self, model: nn.Layer, move: Any) -> None:
        swapped = {id(x) for swapper in self._swappers.values() for x in swapper.tensors}
        for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values():
            if id(x) not in swapped:
                move(x)


class Offloading:
    """Mixed into a DiffusionPipeline: diffusers' methods for drawing with less of the card."""

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: Any = None, *, carrier: Carrier | None = None
    ) -> None:
        """From now on each model is on the device only while it computes: the text encoders, the transformer,
        the VAE in turns. Models that take the place of others later are not moved. `to` ends it.

        gpu_id, device: which becomes Paddle's current one, if given. carrier: None chooses by it. Raises
        ConfigError for a device that is not there.
        """
        if device is not None or gpu_id is not None:
            set_device(f"gpu:{gpu_id}" if device is None else _name_of(device, gpu_id))
        if "_offload" in self.__dict__:
            self.__dict__.pop("_offload").remove()
        self.__dict__["_offload"] = Offload(
            {name: part for name, part in self.components.items() if isinstance(part, nn.Layer)},
            self.__dict__.setdefault("_swappers", {}),
            carrier or (CudaCarrier() if on_gpu() else OneMemory()),
        )

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """`enable_model_cpu_offload`, and of the model that computes only a block or two are on the device:
        the least memory, and slow. Models without blocks, such as the VAE, come whole."""
        for name, part in self.components.items():
            if isinstance(part, nn.Layer) and _blocks(part):
                self.enable_block_swap(part=name)
        self.enable_model_cpu_offload(gpu_id, device)

    def enable_block_swap(
        self, blocks: int | None = None, part: str = "transformer", transport: Transport | None = None
    ) -> None:
        """Let the last `blocks` (None: all) of a model visit the device while they compute, two at a time;
        LoRAs stay there. Raises ConfigError for more blocks than there are. transport: see nn/swap.py."""
        model, swappers = getattr(self, part), self.__dict__.setdefault("_swappers", {})
        if part in swappers:
            swappers.pop(part).remove()
        for parameter in model.parameters():
            parameter.stop_gradient = True
        chosen = _blocks(model) if blocks is None else list(last_blocks(model, blocks).values())
        if chosen:
            swappers[part] = swap_blocks(chosen, transport)

    def bring(self, part: str) -> None:
        """Have this model on the device, as if it were about to compute; where nothing is moved it is."""
        if "_offload" in self.__dict__:
            self.__dict__["_offload"].enter(part)

    def release_encoders(self) -> None:
        """With `enable_model_cpu_offload`, drop the text encoders: what is drawn from now on is encoded."""
        if "_offload" not in self.__dict__:
            return
        for part in ENCODERS:
            if getattr(self, part, None) is not None:
                self.__dict__["_offload"].forget(part)
                setattr(self, part, None)
        _give_back()

    def maybe_free_model_hooks(self) -> None:
        """Sends the model that is on the device back, too, where `enable_model_cpu_offload` was called."""
        if "_offload" in self.__dict__:
            self.__dict__["_offload"].enter(None)

    def drop_parts(self, *names: str) -> None:
        """Take these models out for good, with what waits of them in host memory. The others stay where they
        are: in host memory after `enable_model_cpu_offload`, which ends here."""
        self.maybe_free_model_hooks()
        for name in names:
            self.__dict__.get("_swappers", {}).pop(name, None)
            setattr(self, name, None)
        if "_offload" in self.__dict__:
            self.__dict__.pop("_offload").remove()

    def _offloaded(self, wanted: bool) -> Any:
        """The pipeline, offloading if that is wanted."""
        if wanted:
            self.enable_model_cpu_offload()
        return self

    def _end_offload(self) -> None:
        """For `to`, which brings all to one device."""
        for swapper in self.__dict__.pop("_swappers", {}).values():
            swapper.remove()
        if "_offload" in self.__dict__:
            self.__dict__.pop("_offload").remove()


@contextmanager
def loaded_to_host(wanted: bool = True) -> Iterator[None]:
    """Context manager: what is loaded lies in host memory, if `wanted`."""
    before = paddle.get_device()
    try:
        if wanted:
            paddle.set_device("cpu")
        yield
    finally:
        paddle.set_device(before)


def _entries(model: nn.Layer) -> list[nn.Layer]:
    """The layers whose call begins a model's computation; a VAE has two ways through it."""
    if not isinstance(model, AutoencoderKL):
        return [model]
    layers = (model.encoder.conv_in, model.post_quant_conv, model.decoder.conv_in)
    return [layer for layer in layers if layer is not None]


def _blocks(model: nn.Layer) -> list[nn.Layer]:
    """The blocks of a transformer or text encoder, in the order in which they run."""
    if hasattr(model, "named_blocks"):
        return list(model.named_blocks().values())
    if isinstance(model, AutoencoderKL):
        return []
    lists = [layer for layer in model.sublayers() if isinstance(layer, nn.LayerList)]
    return list(max(lists, key=len, default=[]))


def _name_of(device: Any, gpu_id: int | None) -> str:
    """The name for set_device of what diffusers calls "cuda:1" or "cuda"."""
    name = str(device).removeprefix("Place(").removesuffix(")").replace("cuda", "gpu")
    if gpu_id is not None and ":" in name and name != f"gpu:{gpu_id}":
        raise ConfigError(f"enable_model_cpu_offload: came gpu_id {gpu_id} and device {device}; give one")
    return name if gpu_id is None or ":" in name else f"{name}:{gpu_id}"


def _give_back() -> None:
    if on_gpu():
        paddle.device.cuda.empty_cache()
