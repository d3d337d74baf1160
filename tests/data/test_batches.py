"""Order of the data: complete, shuffled, resumable."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcoat.data.batches import ResumableBatches
from ppcoat.errors import ConfigError


def flat(batches, count):
    return [item for batch in islice(batches, count) for item in batch]


@given(
    st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 9)
)
def test_resumed_order_is_the_same_and_each_epoch_is_complete(items, size, seed, repeats, stop):
    whole = ResumableBatches(items, size, seed, repeats)
    order = flat(whole, stop + 9)
    assert len(order) == size * (stop + 9)  # no short batch
    first = ResumableBatches(items, size, seed, repeats)
    head = flat(first, stop)
    second = ResumableBatches(items, size, seed, repeats)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + flat(second, 9) == order
    epoch = items * repeats
    for start in range(0, len(order) - epoch + 1, epoch):
        assert Counter(order[start : start + epoch]) == dict.fromkeys(range(items), repeats)


def test_epochs_and_seeds_differ():
    order = flat(ResumableBatches(50, 50, 0), 2)
    assert order[:50] != list(range(50)) and order[:50] != order[50:]
    assert flat(ResumableBatches(50, 50, 1), 1) != order[:50]


@pytest.mark.parametrize(("change", "field"), [({"num_items": 5}, "num_items"), ({"seed": 1}, "seed")])
def test_other_data_is_refused_by_name(change, field):
    state = ResumableBatches(4, 2, 0).state_dict()
    with pytest.raises(ConfigError, match=f"{field} was"):
        ResumableBatches(**({"num_items": 4, "batch_size": 2, "seed": 0} | change)).load_state_dict(state)


def test_positions_outside_and_empty_data_are_refused():
    batches = ResumableBatches(4, 2, 0)
    with pytest.raises(ConfigError, match="position 9"):
        batches.load_state_dict(batches.state_dict() | {"position": 9})
    with pytest.raises(ConfigError, match="num_items: came 0"):
        ResumableBatches(0, 2, 0)


def test_another_batch_size_may_resume():
    one = ResumableBatches(6, 2, 0)
    head = flat(one, 2)
    three = ResumableBatches(6, 3, 0)
    three.load_state_dict(one.state_dict())
    assert head + flat(three, 2) == flat(ResumableBatches(6, 1, 0), 10)
