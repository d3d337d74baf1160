"""Order of the data: complete, shuffled, resumable, one bucket at a time."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppcoat.data.batches import ResumableBatches, _repeated
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def flat(batches, count):
    return [item for batch in islice(batches, count) for item in batch]


@quick
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_one_bucket_is_permutation_after_permutation(example, items, size, seed, repeats):
    """The order that runs had before there were buckets, drawn here again."""
    got = flat(ResumableBatches([example(repeats=repeats)] * items, size, seed), 9)
    total, wanted = items * repeats, []
    for epoch in range(9 * size // total + 1):
        wanted += (np.random.default_rng([seed, epoch]).permutation(total) % items).tolist()
    assert got == wanted[: 9 * size]


buckets = st.lists(
    st.tuples(st.sampled_from([(64, 64), (64, 32), (32, 64)]), st.integers(1, 3), st.booleans()),
    min_size=1,
    max_size=14,
)


@quick
@given(buckets, st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 25))
def test_resumed_order_is_the_same_and_batches_are_of_one_kind(example, kinds, size, seed, stop):
    examples = [example(size=each, repeats=n, is_reg=is_reg) for each, n, is_reg in kinds]
    whole = list(islice(ResumableBatches(examples, size, seed), stop + 9))
    first = ResumableBatches(examples, size, seed)
    head = list(islice(first, stop))
    assert list(first.ahead(9)) == whole[stop:] and first.batches == stop
    second = ResumableBatches(examples, size, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + list(islice(second, 9)) == whole
    for batch in whole:
        assert len(batch) == size
        assert len({(examples[i].size, examples[i].is_reg) for i in batch}) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_no_example_is_left_out_of_an_epoch_and_none_is_favoured(example, size):
    """Buckets of 7, 2 and 1 examples: also the smallest is seen in the first epoch, and none more often."""
    examples = [example((64, 64))] * 7 + [example((64, 32))] * 2 + [example((32, 64), repeats=3)]
    per_epoch = {(64, 64): 7, (64, 32): 2, (32, 64): 3}
    batches, epochs = ResumableBatches(examples, size, 5), 24
    done = {kind: 0 for kind in per_epoch}
    for epoch in range(1, epochs + 1):
        # enough batches that each bucket has given out all its entries of `epoch` epochs
        wanted = {kind: -(-epoch * count // size) for kind, count in per_epoch.items()}
        for _ in range(sum(wanted.values()) - sum(done.values())):
            done[examples[next(batches)[0]].size] += 1
        assert done == wanted
    seen = Counter(flat(ResumableBatches(examples, size, 5), sum(done.values())))
    assert seen == {**dict.fromkeys(range(9), epochs), 9: 3 * epochs}  # 24 epochs fill whole batches


def test_buckets_take_turns_in_an_order_of_the_seed(example):
    examples = [example((64, 64))] * 20 + [example((64, 32))] * 20

    def kinds(seed):
        return [examples[batch[0]].size[1] for batch in islice(ResumableBatches(examples, 2, seed), 20)]

    assert Counter(kinds(0)) == {64: 10, 32: 10}
    assert kinds(0) != sorted(kinds(0)) and kinds(0) != kinds(1)


def test_regularisation_batches_are_every_other_one_from_the_first(example):
    examples = [example()] * 5 + [example(is_reg=True)] * 2 + [example((64, 32), is_reg=True)]
    batches = list(islice(ResumableBatches(examples, 2, 0), 40))
    for number, batch in enumerate(batches):
        assert {examples[i].is_reg for i in batch} == {number % 2 == 0}
    ordinary = [i for batch in batches[1::2] for i in batch]
    assert ordinary == flat(ResumableBatches(examples[:5], 2, 0), 20)  # as if the others were not there


def test_epochs_and_seeds_differ(example):
    order = flat(ResumableBatches([example()] * 50, 50, 0), 2)
    assert order[:50] != list(range(50)) and order[:50] != order[50:]
    assert flat(ResumableBatches([example()] * 50, 50, 1), 1) != order[:50]


def test_other_data_is_refused_by_name(example):
    state = ResumableBatches([example()] * 4, 2, 0).state_dict()
    others = {
        r"pictures \(each size and mirrored copy counts\) was 4 and is 5 now;": ([example()] * 5, 2, 0),
        "the batch of all processes was 2 and is 3 now and the seed was 0 and is 1 now": (
            [example()] * 4,
            3,
            1,
        ),
        "sizes, repeats or regularisation of the pictures changed": (
            [example()] * 3 + [example(repeats=2)],
            2,
            0,
        ),
    }
    for said, arguments in others.items():
        with pytest.raises(ConfigError, match=said):
            ResumableBatches(*arguments).load_state_dict(state)


def test_other_captions_and_files_are_noticed_and_keep_the_order(example):
    first = ResumableBatches([example()] * 4, 2, 0)
    for changed in (
        example(captions=("a hat",)),
        replace(example(), item=Item(Path("none.png"), "", 1, 1, file_bytes=9)),
    ):
        other = ResumableBatches([*[example()] * 3, changed], 2, 0)
        assert other.has_other_contents(first.state_dict()) and other.difference(first.state_dict()) is None
    assert not first.has_other_contents(ResumableBatches([example()] * 4, 2, 0).state_dict())
    assert not first.has_other_contents({"batches": 0})  # of an earlier version


def test_positions_outside_and_empty_data_are_refused(example):
    batches = ResumableBatches([example()] * 4, 2, 0)
    with pytest.raises(ConfigError, match="batches -1"):
        batches.load_state_dict(batches.state_dict() | {"batches": -1})
    with pytest.raises(ConfigError, match="no picture"):
        ResumableBatches([], 2, 0)
    with pytest.raises(ConfigError, match="batch_size: came 0"):
        ResumableBatches([example()], 0, 0)


def test_a_late_batch_is_found_without_walking_there(example):
    examples = [example((64, 64))] * 7 + [example((64, 32))]
    late = ResumableBatches(examples, 3, 0)
    late.load_state_dict(late.state_dict() | {"batches": 10**9})
    assert len(next(late)) == 3


def test_pictures_that_count_several_times_come_round_by_round():
    assert _repeated([4, 5, 6], np.array([1, 3, 2])).tolist() == [4, 5, 6, 5, 6, 5]


def test_a_long_epoch_is_an_array_and_a_longer_one_is_refused(example):
    batches = ResumableBatches([example(repeats=10**6), example(size=(32, 64))], 4, 0)
    assert len(next(batches)) == 4 and batches.batches_of(1) == 250_001
    with pytest.raises(ConfigError, match="an epoch has 1000000000 pictures, wanted at most 10000000"):
        ResumableBatches([example(repeats=10**9)], 4, 0)
