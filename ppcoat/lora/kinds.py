"""What an adapter does to a weight, one small class for each kind but plain LoRA, which is delta.py's.

    LoKr        W + s c kron(w1, w2)                             LoHa   W + s c (w1a w1b) * (w2a w2b)
    GLoRA       W + s c (W a1 a2 + b1 b2)                        IA3    rows (or columns) times 1 + s v
    OFT, BOFT   rows or columns turned, block by block, see rotations.py
    difference  W + s D                                          absolute   D in the place of W, whatever s is
    DoRA        V = W + update; rows or columns of V get lengths of their own, see `DoRA`

s is the strength, c = alpha / dim. Every class has `name`, `shape` [rows, columns] of what it fits (None:
any) and delta(weight, strength) -> W' - W. Arrays are NumPy's, float32 or float64, weights in torch's order
[out, in]; what comes back has the weight's dtype. Formulas: LyCORIS (arXiv 2309.14859) and its public code,
PEFT for its own DoRA; the sources of DoRA's rules are named below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ppcoat.errors import ConfigError

from .delta import LoRAModule
from .rotations import OFT, PEFT_ROLES, PeftRotation, Shape, check_rotation, rotation_of_peft

_LOKR_SIDES = ("lokr_w1", "lokr_w2")
LARGEST = 1e9  # products of such numbers are beyond float32, and pictures black
_FACTORS = ("lokr_", "hada_", "oft_s", "boft_s", "dora_scale")
_GLORA = ("a1", "a2", "b1", "b2")


class Kind(Protocol):
    """What all kinds have. delta: weight [out, in] (or [n] of a norm or bias) and the strength -> W' - W in
    the weight's float dtype."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Shape: ...

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray: ...


@dataclass(frozen=True)
class Difference:
    """values [out, in] or [n] are added."""

    values: np.ndarray
    name = "difference"

    @property
    def shape(self) -> Shape:
        return self.values.shape

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        return strength * self.values.astype(weight.dtype)


@dataclass(frozen=True)
class Absolute:
    """values [out, in] or [n] stand in the place of the weight, at every strength."""

    values: np.ndarray
    name = "absolute"

    @property
    def shape(self) -> Shape:
        return self.values.shape

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        return self.values.astype(weight.dtype) - weight


@dataclass(frozen=True)
class LoKr:
    """factors: w1 and w2 by LyCORIS' names, each whole or as a product (_a [.., dim], _b [dim, ..]). rank,
    alpha: as the file says them, which mean nothing where both are whole."""

    factors: Mapping[str, np.ndarray]
    scale: float
    rank: int = 1
    alpha: float = 1.0
    name = "LoKr"

    @property
    def shape(self) -> Shape:
        (a, b), (c, d) = (self._matrix(name).shape for name in _LOKR_SIDES)
        return a * c, b * d

    @property
    def dim(self) -> int | None:
        """Inner size of w2's product, else of w1's; None where both are whole."""
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in self.factors:
                return len(self.factors[name])
        return None

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        w1, w2 = (self._matrix(name).astype(weight.dtype) for name in _LOKR_SIDES)
        return strength * self.scale * np.kron(w1, w2)

    def _matrix(self, name: str) -> np.ndarray:
        if name in self.factors:
            return self.factors[name]
        return self.factors[f"{name}_a"] @ self.factors[f"{name}_b"]


@dataclass(frozen=True)
class LoHa:
    """w1, w2: pairs ([out, dim], [dim, in]), whose products are multiplied number by number."""

    w1: tuple[np.ndarray, np.ndarray]
    w2: tuple[np.ndarray, np.ndarray]
    scale: float
    name = "LoHa"

    @property
    def shape(self) -> Shape:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        (a, b), (c, d) = ([part.astype(weight.dtype) for part in pair] for pair in (self.w1, self.w2))
        return strength * self.scale * ((a @ b) * (c @ d))


@dataclass(frozen=True)
class GLoRA:
    """a1 [in, dim], a2 [dim, in] change the weight in the measure of itself, b1 [out, dim], b2 [dim, in] add
    to it."""

    a1: np.ndarray
    a2: np.ndarray
    b1: np.ndarray
    b2: np.ndarray
    scale: float
    name = "GLoRA"

    @property
    def shape(self) -> Shape:
        return self.b1.shape[0], self.b2.shape[1]

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        a1, a2, b1, b2 = (part.astype(weight.dtype) for part in (self.a1, self.a2, self.b1, self.b2))
        return strength * self.scale * ((weight @ a1) @ a2 + b1 @ b2)


@dataclass(frozen=True)
class IA3:
    """values [out], or [in] with on_input: W' = W (1 + s values)."""

    values: np.ndarray
    on_input: bool
    name = "IA3"

    @property
    def shape(self) -> Shape:
        return (None, self.values.size) if self.on_input else (self.values.size, None)

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        values = self.values.astype(weight.dtype).reshape([1, -1] if self.on_input else [-1, 1])
        return strength * values * weight


# The rule of the program that wrote a DoRA. All are V * magnitude / |V| at strength 1, but for ComfyUI's
# rows.
DORA_RULES = {
    "PEFT": "the strength scales the update before the lengths are set",
    "LyCORIS": "the strength scales the change of length, the update is whole",
    "OneTrainer": "the strength goes from the base weight to the trained one",
    "ComfyUI": "as OneTrainer's, but rows are measured before the update",
}


@dataclass(frozen=True)
class DoRA:
    """An update (any kind) after which each row, magnitude [out, 1], or each column, [1, in], has a length of
    its own (arXiv 2402.09353). rule: one of DORA_RULES; of PEFT, LyCORIS, OneTrainer and ComfyUI."""

    update: Kind
    magnitude: np.ndarray
    rule: str

    @property
    def name(self) -> str:
        of = "" if self.update.name == "LoRA" else f" of {self.update.name}"
        return f"DoRA{of} by the rule of {self.rule}"

    @property
    def shape(self) -> Shape:
        return self.update.shape

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        by_rows = self.magnitude.shape[1] == 1
        eps = np.finfo(weight.dtype).eps
        whole = weight + self.update.delta(weight, strength if self.rule == "PEFT" else 1.0)
        measured = weight if self.rule == "ComfyUI" and by_rows else whole
        length = np.sqrt(np.sum(np.square(measured), axis=1 if by_rows else 0, keepdims=True)) + eps
        factor = self.magnitude.astype(weight.dtype) / length
        if self.rule == "PEFT":
            return whole * factor - weight
        if self.rule == "LyCORIS":
            return whole * (strength * (factor - 1) + 1) - weight
        return strength * (whole * factor - weight)


def kind_of(
    tensors: Mapping[str, np.ndarray],
    alpha: Callable[[int], float],
    full_lokr: Callable[[], tuple[float, float]],
    config: Mapping,
) -> tuple[Kind | None, set[str]]:
    """The kind, other than LoRA and DoRA, that a module's tensors make, and the roles (keys.py) that it uses.

    alpha(dim): alpha of a module of that dim. full_lokr(): scale and alpha of a LoKr of two whole matrices.
    config: PEFT's, {} for none. None where the tensors make no kind.
    """
    lokr = {role: values for role, values in tensors.items() if role.startswith("lokr_")}
    if lokr and all(side in lokr or {f"{side}_a", f"{side}_b"} <= lokr.keys() for side in _LOKR_SIDES):
        dim = LoKr(lokr, 1.0).dim
        if dim is None:  # LyCORIS then writes alpha = rank
            scale, said = full_lokr()
            return LoKr(lokr, scale, max(1, round(alpha(1))), said), set(lokr)
        return LoKr(lokr, alpha(dim) / dim, dim, max(alpha(dim), np.finfo("float32").tiny)), set(lokr)
    hada = [tensors.get(f"hada_w{i}_{side}") for i in (1, 2) for side in "ab"]
    if all(part is not None for part in hada):
        dim = len(hada[1])
        return LoHa(tuple(hada[:2]), tuple(hada[2:]), alpha(dim) / dim), {
            role for role in tensors if "hada" in role
        }
    if any(role in tensors for role in PEFT_ROLES):
        return rotation_of_peft(tensors, config)
    if "oft_blocks" in tensors:
        bound = float(tensors["alpha"].reshape([])) if "alpha" in tensors else 0.0
        return OFT(tensors["oft_blocks"], bound, tensors.get("rescale")), {"oft_blocks", "rescale"} & set(
            tensors
        )
    if set(_GLORA) <= tensors.keys():
        dim = len(tensors["a2"])
        parts = {name: tensors[name] for name in _GLORA}
        return GLoRA(**parts, scale=alpha(dim) / dim), set(parts)
    if {"=weight", "on_input"} <= tensors.keys():
        return IA3(tensors["=weight"], bool(tensors["on_input"].any())), {"=weight", "on_input"}
    for role, make in (("diff", Difference), ("=weight", Absolute)):
        if role in tensors:
            return make(tensors[role]), {role}
    return None, set()


def is_factor(role: str) -> bool:
    """Whether a tensor of this role (keys.py) is nothing by itself, but needs others of its module."""
    return role in ("A", "B", "magnitude", *_GLORA) or role.startswith(_FACTORS)


def is_zero(kind: Kind) -> bool:
    """Whether it changes nothing, as far as its tensors show without multiplying them."""
    if isinstance(kind, LoRAModule):
        return not kind.norm()
    if isinstance(kind, LoKr):
        return not kind.scale or not all(part.any() for part in kind.factors.values())
    if isinstance(kind, LoHa):
        return not kind.scale or not all(part.any() for part in (*kind.w1, *kind.w2))
    return isinstance(kind, Difference) and not kind.values.any()


def lycoris_tensors(kind: Kind, parameter: str) -> dict[str, np.ndarray] | None:
    """{suffix: array} of a kind in LyCORIS' names, its scale folded in; None if LyCORIS has no such kind."""
    if isinstance(kind, LoRAModule):
        folded = kind.folded()
        return {"lora_down.weight": folded.a, "lora_up.weight": folded.b, "alpha": np.float32(folded.alpha)}
    if isinstance(kind, DoRA):
        inner = lycoris_tensors(kind.update, parameter) if kind.rule in ("LyCORIS", "ComfyUI") else None
        return inner and inner | {"dora_scale": kind.magnitude}
    if isinstance(kind, LoKr):
        last = "lokr_w2" if "lokr_w2" in kind.factors else "lokr_w2_a"
        factors = {
            name: part * np.float32(kind.scale if name == last else 1) for name, part in kind.factors.items()
        }
        return factors | {"alpha": np.float32(kind.dim or kind.rank)}
    if isinstance(kind, LoHa):
        parts = (kind.w1[0] * np.float32(kind.scale), kind.w1[1], *kind.w2)
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return dict(zip(names, parts, strict=True)) | {"alpha": np.float32(len(kind.w1[1]))}
    if isinstance(kind, OFT):
        more = {} if kind.rescale is None else {"rescale": kind.rescale}
        return {"oft_blocks": kind.blocks, "alpha": np.float32(kind.constraint)} | more
    if isinstance(kind, GLoRA):
        by = np.float32(kind.scale)
        parts = {"a1": kind.a1 * by, "a2": kind.a2, "b1": kind.b1 * by, "b2": kind.b2}
        return {f"{name}.weight": part for name, part in parts.items()} | {"alpha": np.float32(len(kind.a2))}
    if isinstance(kind, IA3):
        return {"weight": kind.values, "on_input": np.float32(kind.on_input)}
    if isinstance(kind, Difference):
        return {"diff" if parameter == "weight" else "diff_b": kind.values}
    return None


def check_factor(role: str, values: np.ndarray, key: str) -> None:
    """Raises ConfigError for NaN, infinity and numbers that no training comes to, for an alpha that is more
    than one number, and for a factor that is no matrix (that of a convolution, say). values: any shape,
    float32. key: of the tensor, for the message."""
    finite = np.isfinite(values).all()
    if not finite or (role != "alpha" and np.abs(values).max(initial=0.0) > LARGEST):
        holds = "NaN or infinity" if not finite else f"numbers beyond {LARGEST:g}"
        raise ConfigError(
            f"the tensor {key} of the LoRA holds {holds} (a training that broke, or numbers beyond float16): "
            "use another file of that training"
        )
    wanted = "one number" if role == "alpha" and values.size != 1 else None
    if role in ("A", "B", *_GLORA) or role.startswith(("lokr_", "hada_")):
        wanted = None if values.ndim == 2 and values.size else "a matrix"
    if wanted:
        raise ConfigError(
            f"the tensor {key} of the LoRA is {list(values.shape)}, wanted {wanted}: it is of another model"
        )


def check_shapes(kind: Kind, name: str) -> None:
    """Raises ConfigError for factors that do not fit each other. name: of the module, for the message."""
    if isinstance(kind, DoRA):
        check_shapes(kind.update, name)
        if len(kind.update.shape) != 2:
            raise ConfigError(f"DoRA of {name}: its update is {list(kind.update.shape)}, wanted a matrix")
        rows, columns = kind.update.shape
        if kind.magnitude.shape not in ((rows, 1), (1, columns)):
            raise ConfigError(
                f"DoRA of {name}: the magnitude is {list(kind.magnitude.shape)}, wanted [{rows}] or [1, "
                f"{columns}]"
            )
    chains = {
        LoHa: lambda: [kind.w1, kind.w2],
        GLoRA: lambda: [(kind.a1, kind.a2), (kind.b1, kind.b2)],
        LoKr: lambda: [
            (kind.factors[f"{side}_a"], kind.factors[f"{side}_b"])
            for side in _LOKR_SIDES
            if side not in kind.factors
        ],
    }
    for left, right in chains.get(type(kind), list)():
        if not (left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0] > 0):
            raise ConfigError(
                f"{kind.name} of {name}: {list(left.shape)} and {list(right.shape)} are no two factors "
                "of one "
                "matrix"
            )
    if isinstance(kind, LoHa) and kind.shape != (kind.w2[0].shape[0], kind.w2[1].shape[1]):
        raise ConfigError(f"LoHa of {name}: its two matrices have different shapes")
    if isinstance(kind, GLoRA) and not len(kind.a1) == kind.a2.shape[1] == kind.b2.shape[1]:
        raise ConfigError(f"GLoRA of {name}: a1, a2 and b2 are of different widths")
    if isinstance(kind, OFT | PeftRotation):
        check_rotation(kind, name)
