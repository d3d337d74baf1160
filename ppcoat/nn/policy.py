"""Saving policies by name: what is saved for backward, and in which form.

    none                       what autograd saves, in compute dtype
    coat                       every input of a Linear, norm or activation in FP8; attention as it is
    coat+recompute             of those only the inputs of norms and activations; the rest is computed again
    coat+recompute+attention   the same, and values in FP8, queries and keys in FP8 with a 4-bit residual

The ops of ops.py follow it; all other operators get the first step from hooks (saved_tensors.py).
Source of the first step: COAT (arXiv 2410.19313) section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppcoat.errors import ConfigError, unknown_name
from ppcoat.fp8.formats import E4M3, FP8Format


@dataclass(frozen=True)
class SavingPolicy:
    """What to save for backward. fmt None: everything in its own dtype.

    recompute: inputs of Linears and attention's output are computed again in backward. invert_head_norms:
    queries and keys before their norm are recovered from the normalised ones in backward; otherwise they are
    saved. attention_in_fp8: values are saved in FP8, rotated queries and keys in FP8 with a 4-bit residual.
    group_size: values along the last axis that share a scale (None: one scale per tensor); how a Linear's
    input is grouped is the Linear's own setting. by_hand False: ops leave it to autograd what to save.
    """

    name: str
    fmt: FP8Format | None = None
    recompute: bool = False
    invert_head_norms: bool = True
    attention_in_fp8: bool = False
    group_size: int | None = 128
    by_hand: bool = True


NONE = SavingPolicy("none", by_hand=False)
AS_IT_IS = SavingPolicy("as it is")  # of ops in what is computed again
_NAMED = {
    policy.name: policy
    for policy in (
        NONE,
        SavingPolicy("coat", E4M3),
        SavingPolicy("coat+recompute", E4M3, recompute=True),
        SavingPolicy("coat+recompute+attention", E4M3, recompute=True, attention_in_fp8=True),
    )
}
POLICIES = tuple(_NAMED)


def get_policy(name: str, group_size: int | None = 128) -> SavingPolicy:
    """The policy of that name with this group size. Raises ConfigError for a wrong name or size."""
    policy = _NAMED[check_policy(name)]
    if group_size is not None:
        granularity_groups("per_group", group_size)
    return replace(policy, group_size=group_size)


def check_policy(name: str) -> str:
    """Return `name` if it is one of POLICIES, else raise ConfigError with the nearest of them."""
    if name not in POLICIES:
        raise ConfigError(unknown_name("saving policy", name, POLICIES))
    return name


def granularity_groups(granularity: str, group_size: int) -> int | None:
    """Values that share a scale: `group_size` for "per_group", None (all) for "per_tensor". Raises
    ConfigError for another name or a size that is no positive whole number.
    """
    if granularity not in ("per_tensor", "per_group"):
        raise ConfigError(f"granularity must be per_tensor or per_group, got {granularity!r}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"group_size must be a positive whole number, got {group_size!r}")
    return group_size if granularity == "per_group" else None
