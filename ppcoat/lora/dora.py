"""DoRA: a LoRA after which every output of the Linear has a trained length of its own, by PEFT's rule.

    y  = g (x W + s drop(x) A B) + b          g = m / n,   n = lengths of the columns of W + s A B
    dy -> g dy goes back as through a LoRA;   dm = sum over tokens of dy (x W + s drop(x) A B) / n

m [out] starts at the lengths of W's columns (rows in torch's order), so that a new DoRA changes nothing. n is
a constant for the gradient, as in section 4.3 of the paper. Only the LoRA's input is dropped, and n is that
of the whole A.

What is saved for backward is a LoRA's, and n. The product in dm is made again from the x that was saved for
A: to save it would double the bytes, and it costs backward one product with W more. Neither n nor anything
else builds a matrix of W's size: |w + s A b|^2 = |w|^2 + 2 s b (A^T w + s / 2 A^T A b) for each column w of W
and b of B, and |w|^2 is found once.

In files: PEFT's rule, and two that are written under names of Black Forest Labs. By LyCORIS' rule the same
magnitudes give the same weights at strength 1. ComfyUI divides by the lengths of W instead of n, so what it
reads is m |w| / n.

Source: DoRA (arXiv 2402.09353); PEFT's `use_dora` for m, its name and how a strength weakens it (through s).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import paddle
from paddle import nn

from ppcoat.nn.base_weight import BaseWeight, column_squares, on_device, times
from ppcoat.nn.linear import FrozenLinear, LinearUse, LoRALinear, LoRAUse, grown, in_dtype

from . import flux_names
from .delta import LoRAModule
from .keys import TRANSFORMER
from .kinds import DoRA
from .parse import Change

SMALLEST = 1e-24  # squared length of a column, below which it counts as this


class DoRALinear(LoRALinear):
    """A LoRALinear x [..., in] -> [..., out] with a trained length of each output, `lora_magnitude_vector`
    [out], float32. Settings and `scale_multiplier`, which weakens the LoRA and leaves the lengths, are
    LoRALinear's. The weight must not change afterwards."""

    factors = (*LoRALinear.factors, "lora_magnitude_vector")

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        policy: str = "none",
        group_size: int | None = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(base, rank, alpha, dropout, policy, group_size, seed)
        squares = column_squares(self.weight)
        self.__dict__["_squares"] = squares  # no buffer: it stays float32 whatever the model becomes
        self.add_factor("lora_magnitude_vector", _lengths(squares).numpy())

    def use(self, dtype: paddle.dtype) -> LinearUse:
        """As LoRALinear's, for x [..., in] in `dtype`, with the lengths of now."""
        return _DoRAUse(self, self.scale, self.new_seed(), self.lengths(dtype))

    @paddle.no_grad()
    def lengths(self, dtype: paddle.dtype) -> paddle.Tensor:
        """Of the columns of W + s A B, float32 [out]; products are made in `dtype`."""
        return _lengths(self._squares + self._along(0.5, dtype) * 2.0)

    def keep_lengths(self) -> None:
        """The trained lengths become those of W + s A B: the layer computes as its LoRA alone does."""
        self.lora_magnitude_vector.set_value(self.lengths(self._own_dtype))

    def rescaled(self, z: paddle.Tensor, lengths: paddle.Tensor) -> paddle.Tensor:
        """g z of z [..., out], in its dtype, as z + (g - 1) z: in 16 bits g itself would stay 1 for long."""
        return grown(z, (self.lora_magnitude_vector / lengths - 1.0).astype(z.dtype))

    @paddle.no_grad()
    def change(self) -> float:
        """Frobenius norm of what it adds to W, at a `scale_multiplier` of 1."""
        dtype = self._own_dtype
        before, self.scale_multiplier = self.scale_multiplier, 1.0
        g, along = self.lora_magnitude_vector / self.lengths(dtype), self._along(0.0, dtype)
        g, along, squares = (each.numpy().astype(np.float64) for each in (g, along, self._squares))
        self.scale_multiplier = before
        a, b = (each.numpy().astype(np.float64) for each in (self.lora_A, self.lora_B))
        update = (self.alpha / self.rank) ** 2 * (b * (a.T @ a @ b)).sum(0)
        of_columns = (g - 1) ** 2 * squares + 2 * (g - 1) * g * along + g**2 * update
        return float(np.sqrt(np.maximum(of_columns.sum(), 0.0)))

    def kind(self, rule: str = "PEFT") -> DoRA:
        """As a file has it, without `scale_multiplier`. rule: PEFT's, or ComfyUI's, at strength 1."""
        a, b = (np.ascontiguousarray(each.numpy().T) for each in (self.lora_A, self.lora_B))
        magnitude = self.lora_magnitude_vector
        if rule == "ComfyUI":
            magnitude = magnitude * _lengths(self._squares) / self.lengths(self._own_dtype)
        return DoRA(LoRAModule(a, b, self.alpha), magnitude.numpy().reshape([-1, 1]), rule)

    @property
    def _own_dtype(self) -> paddle.dtype:
        """In which W multiplies by itself."""
        return paddle.float32 if isinstance(self.weight, BaseWeight) else self.weight.dtype

    def _along(self, share: float, dtype: paddle.dtype) -> paddle.Tensor:
        """w d + share d d of each column w of W and d of s A B, float32 [out]."""
        a, b = (in_dtype(each, dtype) for each in (self.lora_A, self.lora_B))
        down = a.t().contiguous()
        of_update = paddle.matmul(down, a).scale_(share * self.scale)
        rows = times(down, on_device(self.weight), None, (of_update, b))
        return (rows.astype("float32") * self.lora_B).sum(0) * self.scale


@dataclass(frozen=True)
class _DoRAUse(LoRAUse):
    """lengths: n, float32 [out]."""

    layer: DoRALinear
    lengths: paddle.Tensor

    @property
    def statistics(self) -> tuple[paddle.Tensor, ...]:
        return (self.lengths,)

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        xa = self.down(x)
        y = self.layer.rescaled(self.product(x, xa, None), self.lengths)
        return y if self.layer.bias is None else y.add_(self.layer.bias), xa

    def gradients(
        self, x: paddle.Tensor | None, dy: paddle.Tensor, needs_dx: bool, xa: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, ...]:
        """dx, dA, dB and dm."""
        magnitude, dm = self.layer.lora_magnitude_vector, None
        if not magnitude.stop_gradient:
            products = self.product(x, xa, None).multiply_(dy).reshape([-1, dy.shape[-1]])
            ones = paddle.ones([1, products.shape[0]], products.dtype)  # adds up in float32, without a copy
            dm = paddle.matmul(ones, products)[0].astype(magnitude.dtype) / self.lengths
        return *super().gradients(x, self.layer.rescaled(dy, self.lengths), needs_dx, xa), dm


def comfyui_doras(model: nn.Layer) -> list[Change]:
    """The DoRAs of a FLUX transformer by ComfyUI's rule, one for each module of Black Forest Labs' that they
    touch. What has no DoRA there keeps the lengths of its weight."""
    layers = dict(model.named_sublayers())
    kinds = {path: layer.kind("ComfyUI") for path, layer in layers.items() if isinstance(layer, DoRALinear)}
    lengths = {
        path: _lengths(column_squares(layers[path].weight)).numpy().reshape([-1, 1])
        for own in kinds
        for path in flux_names.bfl_name(own)[1]
        if path not in kinds
    }
    return _fused(kinds, lengths)


def lycoris_doras(changes: Sequence[Change]) -> list[Change]:
    """`changes` with those by PEFT's rule as LyCORIS', one for each module of Black Forest Labs' of which all
    parts are there; the others stay as they are."""
    kinds = {
        each.paths[0]: replace(each.kind, rule="LyCORIS")
        for each in changes
        if each.part == TRANSFORMER
        and isinstance(each.kind, DoRA)
        and (each.kind.rule, type(each.kind.update)) == ("PEFT", LoRAModule)
    }
    whole = {path: kind for path, kind in kinds.items() if _is_whole(path, kinds)}
    return [*_fused(whole, {}), *(each for each in changes if each.paths[0] not in whole)]


def _is_whole(path: str, kinds: Mapping[str, DoRA]) -> bool:
    return flux_names.is_module(path) and all(part in kinds for part in flux_names.bfl_name(path)[1])


def _fused(kinds: Mapping[str, DoRA], lengths: Mapping[str, np.ndarray]) -> list[Change]:
    """DoRAs by diffusers' paths -> by modules of Black Forest Labs'. lengths: of parts without, [n, 1]."""
    updates = flux_names.fuse({path: kind.update for path, kind in kinds.items()})
    paths_of = dict(flux_names.bfl_name(path) for path in kinds)
    changes = []
    for name, update in updates.items():
        paths = paths_of[name]
        (rule,) = {kinds[path].rule for path in paths if path in kinds}
        parts = [kinds[path].magnitude if path in kinds else lengths[path] for path in paths]
        magnitude, swapped = np.concatenate(parts), paths == (flux_names.HALVES_SWAPPED,)
        if swapped:
            magnitude = np.concatenate(np.split(magnitude, 2)[::-1])
        changes.append(Change(TRANSFORMER, paths, "weight", DoRA(update, magnitude, rule), name, swapped))
    return changes


def _lengths(squares: paddle.Tensor) -> paddle.Tensor:
    return squares.clip(min=SMALLEST).sqrt()
