"""OFT and BOFT: rows or columns of a weight turned, block by block, by orthogonal matrices.

    LyCORIS   rows: R = (I + Q)(I - Q)^-1, Q = B - B^T; each turn at strength s is s R + (1 - s) I
    PEFT      columns: R = (I - Q)(I + Q)^-1, or a few terms of a series; W' = W + s (W R^T - W)

BOFT (butterfly) turns several times, each time rows that stand further apart. PEFT itself gives its rotations
no strength; between the base and the trained weight ours goes straight. Formulas: OFT (arXiv 2306.07280),
BOFT (arXiv 2311.06243) and the public code of LyCORIS 4.1.3 and PEFT 0.14 to 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ppcoat.errors import ConfigError

from .header import ROTATIONS, number

Shape = tuple[int | None, ...]
PEFT_ROLES, PEFT_SCALES = ("oft_R", "oft_r", "boft_R"), ("oft_s", "boft_s")  # tensors of PEFT's rotations
STRENGTH_OF_PEFT = (
    "PEFT gives OFT and BOFT no strength; here it leads straight from the base to the trained weight"
)
LAST_COUNTS_ONCE = (0, 18)  # version of PEFT since which the last term of its series does
_LAYOUT = {"oft_R": ("n", "b", "b"), "oft_r": ("n", "b", "b"), "boft_R": ("stages", "n", "b", "b")}
_MOST_TERMS = 64


@dataclass(frozen=True)
class OFT:
    """LyCORIS'. Rows turned by R, where `blocks` B are [n, b, b] (OFT) or [stages, n, b, b] (BOFT).

    constraint: the file's alpha; above 0, Q of all blocks is at most alpha * out long. rescale [out] or None:
    factors of the turned rows, at every strength.
    """

    blocks: np.ndarray
    constraint: float = 0.0
    rescale: np.ndarray | None = None

    @property
    def name(self) -> str:
        return "OFT" if self.blocks.ndim == 3 else "BOFT"

    @property
    def shape(self) -> Shape:
        return self.blocks.shape[-3] * self.blocks.shape[-1], None

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        turns = self._turns(weight.dtype, strength, len(weight))
        if turns.ndim == 3:
            turned = _turned(weight, turns.swapaxes(1, 2)[None], 0)
        else:
            turned = _turned(weight, turns, 1)
        if self.rescale is not None:
            turned = turned * self.rescale.astype(weight.dtype).reshape([-1, 1])
        return turned - weight

    def _turns(self, dtype: np.dtype, strength: float, rows: int) -> np.ndarray:
        q = self.blocks.astype(dtype)
        q = q - q.swapaxes(-1, -2)
        length, most = float(np.sqrt(np.sum(np.square(q, dtype="float64")))), self.constraint * rows
        if 0 < most < length:
            q = q * dtype.type(most / length)
        one = np.eye(q.shape[-1], dtype=dtype)
        turn = (one + q) @ np.linalg.inv(one - q)
        return strength * turn + (1 - strength) * one


@dataclass(frozen=True)
class PeftRotation:
    """PEFT's OFT and BOFT. q [stages, n, b, b], skew: columns turned by R. series: its factors of Q^0, Q^1,
    ..., () for the exact (I - Q)(I + Q)^-1. rescale [out] or None: factors of the turned rows. With n = 1 and
    shared, the one block turns all columns, b at a time.
    """

    q: np.ndarray
    series: tuple[float, ...] = ()
    rescale: np.ndarray | None = None
    shared: bool = False
    kind: str = "OFT"

    @property
    def name(self) -> str:
        return f"{self.kind} of PEFT"

    @property
    def block(self) -> int:
        """Columns that turn together."""
        return self.q.shape[-1]

    @property
    def shape(self) -> Shape:
        rows = None if self.rescale is None else self.rescale.size
        return rows, None if self.shared else self.q.shape[1] * self.block

    def delta(self, weight: np.ndarray, strength: float) -> np.ndarray:
        q = self.q.astype(weight.dtype)
        one = np.eye(self.block, dtype=weight.dtype)
        if self.series:
            turns, power = one * self.series[0], one
            for factor in self.series[1:]:
                power = power @ q
                turns = turns + weight.dtype.type(factor) * power
        else:
            turns = (one - q) @ np.linalg.inv(one + q)
        together = self.block // 2 if len(turns) > 1 else 0
        turned = _turned(np.ascontiguousarray(weight.T), turns, together).T
        if self.rescale is not None:
            turned = turned * self.rescale.astype(weight.dtype).reshape([-1, 1])
        return strength * (turned - weight)


def _turned(rows: np.ndarray, turns: np.ndarray, together: int) -> np.ndarray:
    """rows [k, columns] turned by turns [stages, n or 1, b, b], one stage after the other.

    In stage i a block's b rows come half from one place and half from 2^i b / 2 rows below. together: how
    many from one place stand side by side in the block: 1 (LyCORIS) or b / 2 (PEFT); 0: all rows turn where
    they stand, in the one stage.
    """
    size, columns = turns.shape[-1], rows.shape[1]
    turned = rows
    for stage, turn in enumerate(turns):
        if not together:
            return (turn @ rows.reshape([-1, size, columns])).reshape(rows.shape)
        apart = 2**stage * (size // 2) // together
        mixed = turned.reshape([-1, 2, apart, together * columns]).swapaxes(1, 2)
        mixed = turn @ mixed.reshape([-1, size, columns])
        mixed = mixed.reshape([-1, apart, 2, together * columns]).swapaxes(1, 2)
        turned = mixed.reshape(rows.shape)
    return turned


def rotation_of_peft(tensors: Mapping[str, np.ndarray], config: Mapping) -> tuple[PeftRotation, set[str]]:
    """PEFT's rotation from a module's tensors, by role, and PEFT's config; and the roles that it uses.

    oft_R [n, b (b - 1) / 2] (PEFT from 0.16), oft_r [n, b, b] with oft_s [out, 1] (0.14 and 0.15), boft_R
    [stages, n, b, b] with boft_s [out, 1]; floats. Raises ConfigError without the config, which alone says
    which rotation is meant, and for other shapes.
    """
    role = next(role for role in PEFT_ROLES if role in tensors)
    if config.get("peft_type") not in ROTATIONS:
        raise ConfigError(
            f"PEFT's {role} means nothing without the adapter_config.json that PEFT wrote beside it, or with "
            "that of another file: put the right one there"
        )
    if role == "oft_r" and "oft_block_size" not in config:
        raise ConfigError("OFT of PEFT before 0.14 turns another way and is not known here: train it anew")
    blocks = tensors[role]
    if role == "oft_R":
        blocks = _unfolded(blocks)
    if blocks.ndim != len(_LAYOUT[role]) or blocks.shape[-1] != blocks.shape[-2]:
        raise ConfigError(f"PEFT's {role} is {list(blocks.shape)}, wanted [{', '.join(_LAYOUT[role])}]")
    scale = next((each for each in PEFT_SCALES if each in tensors), None)
    rescale, used = (None, {role}) if scale is None else (tensors[scale], {role, scale})
    if role == "boft_R":
        return PeftRotation(_skew(blocks), (), rescale, kind="BOFT"), used
    if config.get("coft"):
        blocks = _shortened(blocks, number(config.get("eps", 6e-5), "eps"))
    series = _series(config) if role == "oft_R" else ()
    return PeftRotation(_skew(blocks)[None], series, rescale, bool(config.get("block_share"))), used


def _unfolded(values: np.ndarray) -> np.ndarray:
    """What stands above the diagonals, [n, b (b - 1) / 2] -> skew [n, b, b]."""
    count = values.shape[-1] if values.ndim == 2 else 0
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if not count or size * (size - 1) // 2 != count:
        raise ConfigError(f"PEFT's oft_R is {list(values.shape)}, wanted [n, b (b - 1) / 2]")
    rows, columns = np.triu_indices(size, 1)
    whole = np.zeros([len(values), size, size], values.dtype)
    whole[:, rows, columns] = values
    return whole - whole.swapaxes(1, 2)


def _skew(blocks: np.ndarray) -> np.ndarray:
    return (blocks - blocks.swapaxes(-1, -2)) / 2


def _shortened(blocks: np.ndarray, most: float) -> np.ndarray:
    """Constrained OFT: no block [n, b, b] is longer than most / sqrt(n)."""
    lengths = np.sqrt(np.sum(np.square(blocks, dtype="float64"), axis=(1, 2), keepdims=True))
    factors = np.minimum(1.0, most / math.sqrt(len(blocks)) / np.maximum(lengths, 1e-30))
    return blocks * factors.astype(blocks.dtype)


def _series(config: Mapping) -> tuple[float, ...]:
    """Factors of the powers of Q that stand for (I + Q)(I - Q)^-1; () where it is computed exactly."""
    if config.get("use_cayley_neumann") is False:
        return ()
    terms = int(number(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms"))
    if not 1 <= terms <= _MOST_TERMS:
        raise ConfigError(f"num_cayley_neumann_terms is {terms}, wanted 1 to {_MOST_TERMS}")
    if terms < 3:
        return (1.0, 2.0)[:terms]
    version = tuple(int(part) for part in re.findall(r"\d{1,6}", str(config.get("peft_version", "")))[:2])
    if version < LAST_COUNTS_ONCE:
        return (1.0, *[2.0] * (terms - 1))
    return (1.0, *[2.0] * (max(terms, 4) - 2), 1.0)


def check_rotation(kind: OFT | PeftRotation, name: str) -> None:
    """Raises ConfigError for blocks or factors of rows that do not fit. In BOFT's last stage, rows that are
    half a block times 2 ** (stages - 1) apart stand side by side. name: of the module, for the message."""
    blocks = kind.q if isinstance(kind, PeftRotation) else kind.blocks
    shape = blocks.shape
    if len(shape) not in (3, 4) or shape[-2] != shape[-1]:
        raise ConfigError(f"OFT of {name}: blocks are {list(shape)}, wanted [n, b, b]")
    stages = shape[0] if len(shape) == 4 else 1
    is_butterfly = len(shape) == 4 and (stages > 1 or isinstance(kind, OFT))
    if is_butterfly and (shape[1] % 2 ** (stages - 1) or shape[-1] % 2):
        raise ConfigError(
            f"BOFT of {name}: blocks are {list(shape)}, {shape[1]} a stage, wanted a multiple of "
            f"2^{stages - 1} for {stages} stages, and an even side"
        )
    rows = shape[-3] * shape[-1] if isinstance(kind, OFT) else None
    if rows and kind.rescale is not None and kind.rescale.size != rows:
        raise ConfigError(f"{kind.name} of {name}: rescale is {list(kind.rescale.shape)}, wanted [{rows}]")
