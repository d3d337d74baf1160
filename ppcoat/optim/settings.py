"""Settings that all optimizers share: how states are stored, decay, clipping, rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paddle.nn import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue

from ppcoat.errors import ConfigError
from ppcoat.fp8.adamw import MomentCodec
from ppcoat.fp8.formats import get_format

# How a state is stored. RELATIVE: as a first moment, beside a second one called m2. WEIGHTS: always float32.
RELATIVE, SIGNED, POSITIVE, WEIGHTS = "relative", "signed", "positive", "weights"


@dataclass(frozen=True)
class FP8QuantizationConfig:
    """How the moments are stored. `m1` is the first moment, `m2` the second; formats "e4m3" or "e5m2".

    block_size: elements per group, a positive multiple of 16. Bytes per parameter for both moments at 128:
    2 + 2 * (4 + 1) / 128 = 2.078 with expansion (amax float32, k one byte), 2.0625 without.
    Raises ConfigError for a wrong value.
    """

    use_fp8_m1: bool = True
    use_fp8_m2: bool = True
    m1_format: str = "e4m3"
    m2_format: str = "e4m3"
    block_size: int = 128
    use_dynamic_range_expansion: bool = True

    def __post_init__(self) -> None:
        for name in ("use_fp8_m1", "use_fp8_m2", "use_dynamic_range_expansion"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        get_format(self.m1_format)
        get_format(self.m2_format)
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 16:
            raise ConfigError(f"block_size must be a positive multiple of 16, got {size!r}")

    def codecs(self) -> tuple[MomentCodec, MomentCodec]:
        """The codecs of the first and the second moment; the second moment is never negative."""
        expand = self.use_dynamic_range_expansion
        fmt1 = get_format(self.m1_format) if self.use_fp8_m1 else None
        fmt2 = get_format(self.m2_format) if self.use_fp8_m2 else None
        return MomentCodec(fmt1, expand, positive=False), MomentCodec(fmt2, expand, positive=True)

    def by_name(self, kinds: dict[str, str]) -> dict[str, MomentCodec]:
        """The codecs of an optimizer's states, from how they are stored."""
        first, second = self.codecs()
        codecs = {RELATIVE: first, SIGNED: replace(first, alone=True), POSITIVE: second,
                  WEIGHTS: MomentCodec(None, False, positive=False)}  # fmt: skip
        return {name: codecs[kind] for name, kind in kinds.items()}

    def state_bytes(
        self, shapes: Sequence[Sequence[int]], beta1: float = 0.9, kinds: dict[str, str] | None = None
    ) -> int:
        """Bytes that state_bytes() of an optimizer with these states gives for parameters of these shapes, by
        default those of FP8AdamW; allocates nothing."""
        groups = sum(-(-math.prod(shape) // self.block_size) for shape in shapes)
        if kinds is None:
            kinds = {"m1": RELATIVE, "m2": POSITIVE} if beta1 > 0 else {"m2": POSITIVE}
        codecs = self.by_name(kinds).values()
        return groups * sum(codec.group_bytes(self.block_size) for codec in codecs)


@dataclass(frozen=True)
class FlatSettings:
    """What every optimizer takes. grad_clip: ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue or None.
    stochastic_rounding: for bfloat16 parameters, which then have no float32 master copy (4 bytes each); the
    updated value is rounded up or down at random to bfloat16, with the exact value as its mean.
    """

    weight_decay: float = 0.01
    grad_clip: ClipGradByGlobalNorm | ClipGradByNorm | ClipGradByValue | None = None
    fp8_config: FP8QuantizationConfig | None = None
    stochastic_rounding: bool = False


def check_number(name: str, value: float, below: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < below:  # false for NaN too
        wanted = "0 or more" if below == math.inf else f"in [0, {below:g})"
        came = repr(value) if isinstance(value, int | float | str) else type(value).__name__
        raise ConfigError(f"{name} must be a number {wanted}, got {came}")
