"""The strength of adapters (LoRAs) in a model, without knowing what they are: every sublayer with a
`scale_multiplier` is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from paddle import nn

from ppcoat.errors import ConfigError


def adapters(layer: nn.Layer, factor: float = 1.0) -> dict[nn.Layer, float]:
    """The sublayers that have a `scale_multiplier` (adapters put in from outside), and `factor` times it."""
    return {
        sub: sub.scale_multiplier * factor for sub in layer.sublayers() if hasattr(sub, "scale_multiplier")
    }


@contextmanager
def adapters_set(scales: dict[nn.Layer, float]) -> Iterator[None]:
    """Within it, the `scale_multiplier` of each key is its value; afterwards what it was before."""
    before = {layer: layer.scale_multiplier for layer in scales}
    try:
        for layer, scale in scales.items():
            layer.scale_multiplier = scale
        yield
    finally:
        for layer, scale in before.items():
            layer.scale_multiplier = scale


def scale_of(joint_attention_kwargs: dict | None) -> float | None:
    """The scale wanted for this call, None if none is. Raises ConfigError for other keys."""
    known = dict(joint_attention_kwargs or {})
    scale = known.pop("scale", None)
    if known:
        raise ConfigError(f"joint_attention_kwargs has unknown keys {sorted(known)}: only 'scale' is known")
    return scale
