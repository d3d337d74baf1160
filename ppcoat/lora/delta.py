"""One LoRA of a file as numbers, delta-W = alpha / rank * B A, and norms of delta-W that never build it.

||B A||^2 = sum((B^T B) * (A A^T)), so a 12288 x 3072 update costs two [rank, rank] products, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LoRAModule:
    """a [rank, in] and b [out, rank] float32: torch's order, whatever the file's is. scale = alpha / rank."""

    a: np.ndarray
    b: np.ndarray
    alpha: float
    name = "LoRA"

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it fits."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def folded(self) -> LoRAModule:
        """The same delta-W with alpha = rank: the scale goes into b."""
        return self if self.scale == 1.0 else LoRAModule(self.a, self.b * np.float32(self.scale), self.rank)

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """What it adds at a strength to a weight [out, in], in the weight's float dtype."""
        return (self.b.astype(weight.dtype) * (self.scale * strength)) @ self.a.astype(weight.dtype)

    def norm(self) -> float:
        """Frobenius norm of delta-W."""
        return norm_of_product(self.b.astype(np.float64) * self.scale, self.a)


@dataclass(frozen=True)
class LoRASummary:
    """What there is to say of a LoRA before anyone draws with it. norm: Frobenius, of all delta-W together;
    norms: of each module; zero: paths whose delta-W is zero, which do nothing; error: the largest relative
    error of a delta-W in the file that was written, from rounding to its dtype."""

    norm: float
    norms: dict[str, float]
    zero: list[str]
    error: float = 0.0

    def line(self) -> str:
        """One line for a log."""
        said = f"delta-W norm {self.norm:.4g}, {len(self.norms)} modules, {len(self.zero)} of them zero"
        return f"{said}, each rounded within {self.error:.1g}" if self.error else said


def summarize(modules: Mapping[str, LoRAModule]) -> LoRASummary:
    """Norms of a LoRA's modules; NaN and inf stay visible in them."""
    return summary_of({path: module.norm() for path, module in modules.items()})


def summary_of(norms: Mapping[str, float]) -> LoRASummary:
    """The summary of modules whose delta-W have these norms, by path."""
    total = float(np.sqrt(np.sum(np.square(list(norms.values())))))
    return LoRASummary(total, dict(norms), [path for path, norm in norms.items() if norm == 0])


def relative_difference(got: LoRAModule | None, want: LoRAModule) -> float:
    """||delta-W of got - delta-W of want|| / ||delta-W of want||; None is a module of zeros.

    0.0 for equal factors, NaN among them included; inf where something came of nothing.
    """
    if got is None:
        return _relative(want.norm(), want.norm())
    if got.scale == want.scale and _equal(got.a, want.a) and _equal(got.b, want.b):
        return 0.0
    b1, b2 = (module.b.astype(np.float64) * module.scale for module in (got, want))
    if got.rank == want.rank:
        # (B1 - B2) A1 + B2 (A1 - A2) has no large terms that cancel, unlike B1 A1 - B2 A2
        b, a = (b1 - b2, b2), (got.a, got.a - want.a.astype(np.float64))
    else:
        b, a = (b1, -b2), (got.a, want.a)
    return _relative(norm_of_product(np.concatenate(b, axis=1), np.concatenate(a)), want.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN wins over every number, 0.0 for none."""
    return float(np.max([0.0, *errors]))


def norm_of_product(b: np.ndarray, a: np.ndarray) -> float:
    """Frobenius norm of B A, for B [out, r] and A [r, in] of a float dtype; in float64."""
    b, a = b.astype(np.float64), a.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf are told by the result
        return float(np.sqrt(np.maximum(np.sum((b.T @ b) * (a @ a.T)), 0.0)))


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first, second, equal_nan=True)
