"""LoRAs to calculate with: cut to a smaller rank, added up, taken out of the difference of two weights.

All of it is float64. delta-W = B A with B [out, r], A [r, in] needs no matrix of the weight's size:

    B = Qb Rb,  A^T = Qa Ra  (QR),  Rb Ra^T = U S V^T  [r, r]   ->   delta-W = (Qb U) S (Qa V)^T

and the first k of these singular values and vectors are its best approximation of rank k (Eckart-Young). A
delta-W that has no small factors is searched for its largest ones with a random probe (Halko, Martinsson,
Tropp, arXiv 0909.4061). What a cut costs is measured on the factors that come out, which are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.progress import Progress

from . import flux_names
from .delta import LoRAModule, norm_of_product
from .keys import TRANSFORMER
from .kinds import Difference, Kind, LoHa, LoKr
from .parse import Change, LoRAFile

SMALL_SIDE = 512  # of a matrix: up to here the whole SVD takes a moment
_PASSES = 3  # of the probe through the matrix and back: within 0.5 % of the best cut, whatever the matrix
_WORST = 3  # layers that a message names
_BLOCK = 1024  # rows of a large matrix that are compared at once

Terms = Sequence[tuple[Kind, float]]  # what is added up, each with its strength
Combined = tuple[LoRAModule, "Loss"]
WithStrengths = Sequence[tuple[LoRAFile, float]]
Place = tuple[str, str]  # part of the pipeline (keys.py), and the path of a Linear there


@dataclass(frozen=True)
class Loss:
    """What a delta-W lost: its Frobenius norm, and that of the difference to what stands for it now."""

    norm: float
    error: float

    @property
    def relative(self) -> float:
        """||difference|| / ||delta-W||; 0 for a delta-W of zeros."""
        return self.error / self.norm if self.norm else 0.0


def told(losses: Mapping[str, Loss]) -> str:
    """For a user: the relative error of all delta-W together, and the layers where it is largest."""
    norm, error = (
        math.hypot(*(getattr(loss, name) for loss in losses.values())) for name in ("norm", "error")
    )
    ordered = sorted(losses, key=lambda path: losses[path].relative, reverse=True)[:_WORST]
    worst = ", ".join(f"{path} {losses[path].relative:.2g}" for path in ordered if losses[path].error)
    overall = f"{error / norm if norm else 0.0:.2g}"
    return f"relative delta-W error {overall} overall" + (f", worst {worst}" if worst else "")


def rank_of(kind: Kind) -> int | None:
    """Rank that is always enough to write what a kind adds to a weight as one LoRA; None where what it adds
    depends on the weight, or the weight is no matrix."""
    if isinstance(kind, LoRAModule):
        return kind.rank
    if isinstance(kind, LoHa):
        return len(kind.w1[1]) * len(kind.w2[1])
    if isinstance(kind, LoKr):
        return math.prod(len(right) for _, right in _sides(kind))
    return min(kind.shape) if isinstance(kind, Difference) and len(kind.shape) == 2 else None


def sum_of(
    files: WithStrengths, rank: int | None, energy: float | None, file_format: str
) -> tuple[dict[Place, LoRAModule], dict[str, Loss]]:
    """The weighted sum of files, each of whose changes of weights has a `rank_of`: a LoRA for each Linear,
    and what they lost by name; rank and energy as in `combined`.

    file_format: to be written in. Kohya's has one LoRA for q, k and v together: there they are cut together.
    """
    together = file_format == "kohya" and not (rank is None and energy is None)
    terms, found, losses = _terms_of(files), {}, {}
    groups: dict[str, list[Place]] = {}
    for part, path in terms:
        is_fused = together and part == TRANSFORMER
        groups.setdefault(flux_names.bfl_name(path)[0] if is_fused else path, []).append((part, path))
    for name, places in Progress(groups.items(), desc="calculating", unit="module"):
        if together and places[0][0] == TRANSFORMER:
            fused = flux_names.fuse({path: combined(terms[part, path])[0] for part, path in places})[name]
            module, losses[name] = combined([(fused, 1.0)], rank, energy)
            parts = flux_names.split_fused(flux_names.find(name), module)
            found |= {(TRANSFORMER, path): each for path, each in parts.items()}
        else:
            found[places[0]], losses[name] = combined(terms[places[0]], rank, energy)
    return found, losses


def is_vector(change: Change) -> bool:
    """Whether it is of a bias or of a norm's weight, which no LoRA holds."""
    return change.parameter == "bias" or len(change.kind.shape) == 1


def vectors_of(files: WithStrengths) -> list[Change]:
    """The changes of biases and norms, added up. Raises ConfigError for whole ones, which stand in the place
    of the model's, if there is more than one file or a strength."""
    found: dict[tuple, Change] = {}
    alone = len(files) == 1 and files[0][1] == 1
    for file, by in files:
        for change in filter(is_vector, file.changes):
            if not alone and not isinstance(change.kind, Difference):
                raise ConfigError(
                    "whole biases and norms cannot be added up: leave out the file that has them"
                )
            key = (change.part, change.paths, change.parameter, change.swapped)
            if not alone:
                before = found[key].kind.values if key in found else np.float32(0)
                change = replace(change, kind=Difference(before + change.kind.values * np.float32(by)))
            found[key] = change
    return list(found.values())


def in_parts(paths: tuple[str, ...], module: LoRAModule) -> dict[str, LoRAModule]:
    """A LoRA of Linears that stand one above the other -> of each."""
    if len(paths) == 1:
        return {paths[0]: module}
    return flux_names.split_fused(flux_names.FluxName(paths, True), module)


def combined(terms: Terms, rank: int | None = None, energy: float | None = None) -> Combined:
    """The sum of what kinds with a `rank_of` add to a weight [out, in], as one LoRA (float32, alpha = rank).

    rank: at most this one; None: no cut, the factors stand side by side and the sum is exact. energy: of the
    singular values as many, up to `rank`, as make up this share of the sum of their squares, so that the
    relative error is at most sqrt(1 - energy).
    """
    inner, shape = sum(rank_of(kind) for kind, _ in terms), terms[0][0].shape
    is_cut = energy is not None or (rank is not None and rank < inner)
    if is_cut and 2 * inner >= min(shape):  # factors so wide cost more than the matrix that they make
        return of_matrix(sum(kind.delta(np.zeros(shape), by) for kind, by in terms), rank, energy)
    factors = [_factors(kind, by) for kind, by in terms]
    b, a = np.concatenate([b for b, _ in factors], axis=1), np.concatenate([a for _, a in factors])
    norm, module = norm_of_product(b, a), _as_lora(b, a)
    if is_cut:
        left, core_left = np.linalg.qr(b)
        right, core_right = np.linalg.qr(a.T)
        u, s, v = np.linalg.svd(core_left @ core_right.T)
        kept = _kept(s, norm, rank, energy)
        module = _balanced(left @ u[:, :kept], s[:kept], v[:kept] @ right.T)
    error = norm_of_product(np.concatenate([b, -module.b], axis=1), np.concatenate([a, module.a]))
    return module, Loss(norm, error)


def of_matrix(matrix: np.ndarray, rank: int | None, energy: float | None = None) -> Combined:
    """A matrix [out, in], float64, as a LoRA; rank and energy as in `combined`."""
    norm, most = float(np.linalg.norm(matrix)), min(matrix.shape)
    limit = most if rank is None else min(rank, most)
    tried = limit if energy is None else min(16, limit)
    while True:
        u, s, v = _largest(matrix, tried)
        tried = limit if len(s) == most else tried
        kept = _kept(s, norm, tried, energy)
        if energy is None or tried == limit or np.sum(s[:kept] ** 2) >= energy * norm**2:
            break
        tried = min(2 * tried, limit)
    module = _balanced(u[:, :kept], s[:kept], v[:kept])
    rows = [slice(start, start + _BLOCK) for start in range(0, len(matrix), _BLOCK)]
    a = module.a.astype("float64")
    parts = [np.linalg.norm(matrix[part] - module.b[part].astype("float64") @ a) for part in rows]
    return module, Loss(norm, math.hypot(*parts))


def fitted_lokr(
    kind: LoKr, wanted: Mapping[str, Sequence[int]], own_scale: float
) -> tuple[dict[str, np.ndarray], Loss] | None:
    """A LoKr as the float32 factors of another one, whose scale is `own_scale`: lokr_w1 and so on.

    wanted: name of a factor there -> its shape. A product of a smaller rank stays one: its _a has fewer
    columns, its _b fewer rows than wanted. None where the two matrices of the Kronecker product have other
    shapes.
    """
    factors, pairs = {}, []
    for name, (left, right) in zip(("lokr_w1", "lokr_w2"), _sides(kind), strict=True):
        left = left * (kind.scale / own_scale if name == "lokr_w2" else 1.0)
        is_whole = name in wanted
        shape = wanted[name] if is_whole else (wanted[f"{name}_a"][0], wanted[f"{name}_b"][1])
        if (len(left), right.shape[1]) != tuple(shape):
            return None
        if is_whole:
            factors[name] = new = np.float32(left @ right)
        else:
            part, _ = combined([(LoRAModule(right, left, len(right)), 1.0)], wanted[f"{name}_b"][0])
            factors |= {f"{name}_a": part.b, f"{name}_b": part.a}
            new = part.b.astype("float64") @ part.a
        pairs.append((left @ right, new))
    (w1, new1), (w2, new2) = pairs
    # kron(w1, w2) - kron(new1, new2) = kron(d1, w2) + kron(new1, d2), and
    # <kron(p, q), kron(r, s)> = <p, r> <q, s>
    d1, d2 = w1 - new1, w2 - new2
    squared = np.vdot(d1, d1) * np.vdot(w2, w2) + np.vdot(new1, new1) * np.vdot(d2, d2)
    squared += 2 * np.vdot(d1, new1) * np.vdot(w2, d2)
    norm = float(np.linalg.norm(w1) * np.linalg.norm(w2))
    return factors, Loss(own_scale * norm, own_scale * math.sqrt(max(float(squared), 0.0)))


def _terms_of(files: WithStrengths) -> dict[Place, Terms]:
    """What is added to each Linear: a fused module's kind as LoRAs of its parts. Raises ConfigError for
    adapters of different shapes."""
    found: dict[Place, list] = {}
    for file, by in files:
        for change in (each for each in file.changes if not is_vector(each)):
            kinds = {change.paths[0]: change.kind}
            if len(change.paths) > 1 or change.swapped:
                name = flux_names.FluxName(change.paths, True)
                kinds = flux_names.split_fused(name, combined([(change.kind, 1.0)])[0])
            for path, kind in kinds.items():
                known = found.setdefault((change.part, path), [])
                if known and known[0][0].shape != kind.shape:
                    shapes = " and ".join(str(list(each.shape)) for each in (known[0][0], kind))
                    raise ConfigError(f"{path} is for weights {shapes}: give adapters of one model")
                known.append((kind, by))
    return found


def _factors(kind: Kind, by: float) -> tuple[np.ndarray, np.ndarray]:
    """B [out, rank_of(kind)] and A [.., in] in float64 with B A = what `kind` adds at strength `by`."""
    if isinstance(kind, LoRAModule):
        return kind.b.astype("float64") * (kind.scale * by), kind.a.astype("float64")
    if isinstance(kind, LoKr):
        (left1, right1), (left2, right2) = _sides(kind)
        return np.kron(left1, left2) * (kind.scale * by), np.kron(right1, right2)
    if isinstance(kind, LoHa):
        (b1, a1), (b2, a2) = ([part.astype("float64") for part in pair] for pair in (kind.w1, kind.w2))
        b = (b1[:, :, None] * b2[:, None, :]).reshape([len(b1), -1])
        return b * (kind.scale * by), (a1[:, None, :] * a2[None, :, :]).reshape([-1, a1.shape[1]])
    delta = kind.delta(np.zeros(kind.shape), by)
    one = np.eye(min(delta.shape))
    return (one, delta) if len(delta) <= delta.shape[1] else (delta, one)


def _sides(kind: LoKr) -> list[tuple[np.ndarray, np.ndarray]]:
    """w1 and w2 of a LoKr as products [.., r] [r, ..] in float64; r of a whole matrix is its smaller side."""
    found = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in kind.factors:
            whole = kind.factors[name].astype("float64")
            one = np.eye(min(whole.shape))
            found.append((one, whole) if len(whole) <= whole.shape[1] else (whole, one))
        else:
            found.append(tuple(kind.factors[f"{name}_{side}"].astype("float64") for side in "ab"))
    return found


def _largest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [out, k], S [k], V^T [k, in] of at least the `rank` largest singular values, from the largest on."""
    width = rank + max(16, rank // 2)  # a wider probe than what is wanted of it
    if min(matrix.shape) <= max(SMALL_SIDE, 2 * width):
        return np.linalg.svd(matrix, full_matrices=False)

    def basis(values: np.ndarray) -> np.ndarray:
        return np.linalg.qr(values)[0]

    probe = basis(matrix @ np.random.default_rng(0).standard_normal([matrix.shape[1], width]))
    for _ in range(_PASSES):
        probe = basis(matrix @ basis(matrix.T @ probe))
    u, s, v = np.linalg.svd(probe.T @ matrix, full_matrices=False)
    return probe @ u, s, v


def _kept(s: np.ndarray, norm: float, rank: int | None, energy: float | None) -> int:
    """How many of the singular values `s` stay; at least one."""
    most = len(s) if rank is None else min(rank, len(s))
    if energy is None:
        return most
    return max(1, min(most, int(np.searchsorted(np.cumsum(s**2), energy * norm**2)) + 1))


def _balanced(u: np.ndarray, s: np.ndarray, v: np.ndarray) -> LoRAModule:
    """U [out, k], S [k], V^T [k, in] -> the LoRA whose two factors are equally large."""
    root = np.sqrt(s)
    return _as_lora(u * root, root[:, None] * v)


def _as_lora(b: np.ndarray, a: np.ndarray) -> LoRAModule:
    return LoRAModule(np.ascontiguousarray(a, "float32"), np.ascontiguousarray(b, "float32"), len(a))
