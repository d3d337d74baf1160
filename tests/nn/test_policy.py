"""Saving policies by name."""

from typing import get_args

import pytest

from ppcoat.config import schema
from ppcoat.errors import ConfigError
from ppcoat.nn.policy import POLICIES, check_policy, get_policy


def test_names_are_those_of_the_config():
    assert get_args(schema.PolicyName) == POLICIES


def test_each_keeps_less_than_the_one_before():
    policies = [get_policy(name, 64) for name in POLICIES]
    assert [policy.by_hand for policy in policies] == [False, True, True, True]
    assert [policy.fmt is not None for policy in policies] == [False, True, True, True]
    assert [policy.recompute for policy in policies] == [False, False, True, True]
    assert [policy.attention_in_fp8 for policy in policies] == [False, False, False, True]
    assert all(policy.group_size == 64 for policy in policies)
    assert get_policy("coat", None).group_size is None


def test_unknown_names_and_sizes_are_answered():
    with pytest.raises(ConfigError, match="'coats', the nearest is 'coat'"):
        check_policy("coats")
    with pytest.raises(ConfigError, match="unknown saving policy 3"):
        check_policy(3)
    for size in (0, -16, 1.5, True):
        with pytest.raises(ConfigError, match="group_size"):
            get_policy("coat", size)
