"""NewBie-image's transformer with its Linears in FP8; how it is read and kept on disk is in fp8_base.py."""

from __future__ import annotations

from pathlib import Path

from paddle import nn

from ppcoat.models.fp8_base import load_fp8
from ppcoat.models.fp8_copy import FP8Copy
from ppcoat.models.newbie_loading import open_nextdit
from ppcoat.models.nextdit import NextDiT_CLIP
from ppcoat.nn.swap import check_count


def load_fp8_nextdit(
    folder: str | Path, dtype: str | None = None, copy: FP8Copy | None = None, blocks_to_swap: int = 0
) -> NextDiT_CLIP:
    """The transformer of a component folder in eval mode, the weight of every Linear in FP8.

    All 246 Linears of the 3B model are quantised; biases and norms are in `dtype` (None: float32 on CPU,
    bfloat16 on GPU). copy, and what else is raised: see `load_fp8`. blocks_to_swap: the last so many `layers`
    are left in host memory. Raises ConfigError as `open_nextdit` and `last_layers`.
    """
    return load_fp8(
        lambda: open_nextdit(folder, dtype), copy, lambda model: last_layers(model, blocks_to_swap)
    )


def last_layers(model: NextDiT_CLIP, count: int) -> dict[str, nn.Layer]:
    """The last `count` of `layers` by path, in model order. Raises ConfigError for a count that is not from 0
    to the number of layers."""
    check_count(count, len(model.layers))
    first = len(model.layers) - count
    return {f"layers.{i}": model.layers[i] for i in range(first, len(model.layers))}
