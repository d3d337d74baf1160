"""The order in which pictures are seen: shuffled per epoch, endless, and resumable at any batch."""

from __future__ import annotations

import copy
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from ppcoat.data.examples import Example
from ppcoat.errors import ConfigError

MOST_SEEN = 10_000_000  # in an epoch, whose order is held in memory
# Fact -> what a user is told of it: the checkpoint's value and the one of now.
_WORDS = {
    "num_examples": "the number of pictures (each size and mirrored copy counts) was {} and is {} now",
    "batch_size": "the batch of all processes was {} and is {} now",
    "seed": "the seed was {} and is {} now",
    "sizes_and_repeats": "sizes, repeats or regularisation of the pictures changed",
}


class ResumableBatches:
    """Endless iterator over lists of example numbers, each list `batch_size` long and of one bucket.

    Batch n is a pure function of (examples, batch_size, seed, n). state_dict() therefore holds one position,
    and the settings that a resumed run must share. Epoch e of a bucket is a permutation of its examples (each
    `repeats` times) drawn from (seed, e). No batch is short and no example is left out: the last batch of a
    bucket in an epoch borrows from that bucket's next epoch, which is then that much shorter. All examples
    are seen equally often. Where a bucket is smaller than a batch, one batch has its examples several times,
    and epochs that were borrowed completely have no batch of it.

    With regularisation examples, batches 0, 2, 4, ... consist of them alone, as in ai-toolkit, and the other
    batches have none. The epochs of the two kinds are counted separately.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        """Raises ConfigError for no examples, for a batch_size below 1, and for an epoch above MOST_SEEN."""
        if not examples:
            raise ConfigError("there is no picture to train on; wanted at least 1")
        if batch_size < 1:
            raise ConfigError(f"batch_size: came {batch_size}, wanted at least 1")
        self.num_examples = len(examples)
        self.batch_size = batch_size
        self.seed = seed
        self.batches = 0  # returned so far
        self._streams = _streams(examples, batch_size, seed)
        shapes = [(each.size, each.repeats, each.is_reg, *each.shape[2]) for each in examples]
        contents = [
            (each.item.image_path.name, each.item.file_bytes, each.captions, *_beside(each))
            for each in examples
        ]
        self._facts = {
            "num_examples": len(examples),
            "batch_size": batch_size,
            "seed": seed,
            "sizes_and_repeats": zlib.crc32(repr(shapes).encode()),
        }
        self._contents = zlib.crc32(repr(contents).encode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        turn, stream = divmod(self.batches, len(self._streams))
        self.batches += 1
        return self._streams[stream].batch(turn)

    def ahead(self, count: int) -> Iterator[list[int]]:
        """The next `count` batches; the position of this iterator does not change."""
        return islice(copy.copy(self), count)  # shares all but the position

    def batches_of(self, epochs: int) -> int:
        """Number of batches in which every ordinary example is seen `epochs` times (times its repeats)."""
        return self._streams[-1].batches_before(epochs) * len(self._streams)

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch, the facts that `load_state_dict` compares, and a checksum of what
        the examples hold; all are JSON numbers."""
        return {"batches": self.batches, **self._facts, "contents": self._contents}

    def difference(self, state: dict[str, int]) -> str | None:
        """What of the examples and the batch was different when `state` was made; None: nothing."""
        changed = [name for name, value in self._facts.items() if state.get(name) != value]
        if "num_examples" in changed and "sizes_and_repeats" in changed:
            changed.remove("sizes_and_repeats")  # follows from the other
        told = [_WORDS[name].format(state.get(name), self._facts[name]) for name in changed]
        return " and ".join(told) or None

    def has_other_contents(self, state: dict[str, int]) -> bool:
        """Whether captions, names or bytes of picture files were different when `state` was made; the order
        does not depend on them."""
        return state.get("contents", self._contents) != self._contents

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in `state`. Raises ConfigError if the examples, their sizes or repeats,
        the batch size or the seed differ from those of the checkpoint."""
        changed = self.difference(state)
        if changed is not None:
            raise ConfigError(
                f"cannot resume the order of the data: {changed}; set it back, or start a new run under "
                "another name"
            )
        if state["batches"] < 0:
            raise ConfigError(
                f"cannot resume the order of the data: batches {state['batches']} is below 0; the checkpoint "
                "was changed by hand"
            )
        self.batches = state["batches"]


class _Bucket:
    """Examples that may share a batch, as one endless sequence: one permutation of them per epoch."""

    def __init__(self, entries: np.ndarray, batch_size: int, seed: int, number: int) -> None:
        self.entries, self.batch_size = entries, batch_size
        self.seed, self.number = seed, number
        self._epochs: dict[int, np.ndarray] = {}

    def batches_before(self, epoch: int) -> int:
        """Number of batches that the epochs before this one take, rounded up."""
        return -(-epoch * len(self.entries) // self.batch_size)

    def batch(self, number: int) -> list[int]:
        start = number * self.batch_size
        return [self._entry(place) for place in range(start, start + self.batch_size)]

    def _entry(self, place: int) -> int:
        epoch, place = divmod(place, len(self.entries))
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch, self.number])
            order = rng.permutation(len(self.entries))
            # a batch spans few epochs, in order; the first batch of a resumed run may need the epoch before
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order
        return int(self.entries[self._epochs[epoch][place]])


class _Stream:
    """The buckets of the ordinary or of the regularisation examples, and the order in which they take
    turns."""

    def __init__(self, buckets: list[_Bucket]) -> None:
        self.buckets = buckets
        self._turns: tuple[int, np.ndarray] = (-1, np.empty(0, np.int32))

    def batch(self, number: int) -> list[int]:
        # an epoch may have no batch at all, if earlier epochs borrowed all of its entries
        epoch = bisect_right(range(self._bound(number)), number, key=self.batches_before) - 1
        place = number - self.batches_before(epoch)
        turns = self._turns_of(epoch)
        bucket = int(turns[place])
        earlier = np.count_nonzero(turns[:place] == bucket)
        return self.buckets[bucket].batch(self.buckets[bucket].batches_before(epoch) + earlier)

    def _bound(self, number: int) -> int:
        """An epoch that begins after batch `number`: the upper end of the search."""
        first = self.buckets[0]
        return (number + 1) * first.batch_size // len(first.entries) + 2

    def batches_before(self, epoch: int) -> int:
        return sum(bucket.batches_before(epoch) for bucket in self.buckets)

    def _turns_of(self, epoch: int) -> np.ndarray:
        """The shuffled turns of an epoch: one bucket number per batch."""
        if self._turns[0] != epoch:
            counts = [each.batches_before(epoch + 1) - each.batches_before(epoch) for each in self.buckets]
            turns = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            first = self.buckets[0]  # the 1 sets it apart from the permutations within buckets
            rng = np.random.default_rng([first.seed, epoch, first.number, 1])
            self._turns = epoch, turns[rng.permutation(len(turns))]
        return self._turns[1]


def _beside(example: Example) -> list[tuple]:
    """What goes with an example, as far as it tells whether that has changed."""
    paths = [each.path for each, _ in example.references] + ([example.mask.path] if example.mask else [])
    return [(path.name, path.stat().st_size) for path in paths]


def _streams(examples: Sequence[Example], batch_size: int, seed: int) -> list[_Stream]:
    """Regularisation examples first, if there are any; buckets by size, and by the sizes of references."""
    groups: dict[tuple, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.shape, []).append(number)
    streams: dict[bool, list[_Bucket]] = {}
    seen = sum(example.repeats for example in examples)
    if seen > MOST_SEEN:
        raise ConfigError(
            f"an epoch has {seen} pictures, wanted at most {MOST_SEEN}: lower num_repeats, which only counts "
            "against that of the other datasets"
        )
    for number, key in enumerate(sorted(groups)):
        entries = _repeated(groups[key], np.array([examples[i].repeats for i in groups[key]]))
        bucket = _Bucket(entries, batch_size, seed, number)
        streams.setdefault(key[0], []).append(bucket)
    return [_Stream(streams[is_reg]) for is_reg in sorted(streams, reverse=True)]


def _repeated(numbers: Sequence[int], repeats: np.ndarray) -> np.ndarray:
    """All numbers, then those again that are to come twice, three times, ..."""
    ends = np.unique(repeats)
    rounds = [np.tile(np.array(numbers, np.int32)[repeats >= end], end - begin)
              for begin, end in zip([0, *ends[:-1]], ends, strict=True)]  # fmt: skip
    return np.concatenate(rounds)
