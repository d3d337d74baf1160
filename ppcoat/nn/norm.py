"""The norms of FLUX for models: plain Paddle under autograd. Their formulas, and the ops for blocks that go
backward by hand, are in fp8/norm.py.
"""

from __future__ import annotations

from ppcoat.fp8 import norm as ops
from ppcoat.fp8.norm import rms_norm, rms_norm_grad, rms_rstd
from ppcoat.fp8.rules import NORM_EPSILON

__all__ = [
    "NORM_EPSILON",
    "modulated_norm",
    "modulated_norm_grad",
    "rms_norm",
    "rms_norm_grad",
    "rms_rstd",
]

# A kernel has no gradient that autograd knows of: models always take the references.
modulated_norm, modulated_norm_grad = ops.modulated_norm.reference, ops.modulated_norm_grad.reference
