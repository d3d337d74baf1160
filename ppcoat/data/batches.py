"""The order in which pictures are seen: shuffled per epoch, endless, and resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ppcoat.errors import ConfigError


class ResumableBatches:
    """Endless iterator over lists of item numbers, each list `batch_size` long.

    Epoch e is the permutation of the items (each `num_repeats` times) drawn from the seed (seed, e), so the
    order is a pure function of the position and state_dict() is two numbers. No batch is short and no item
    is left out: the last batch of an epoch is filled from the next epoch, so an item can stand twice in
    such a batch.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, num_repeats: int = 1) -> None:
        """Raises ConfigError where there is nothing to draw from."""
        for name, value in (
            ("num_items", num_items),
            ("batch_size", batch_size),
            ("num_repeats", num_repeats),
        ):
            if value < 1:
                raise ConfigError(f"{name}: came {value}, wanted at least 1")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.num_repeats = num_repeats
        self.epoch = 0
        self.position = 0  # items of this epoch already given out
        self._order = self._permutation()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            taken = self._order[self.position : self.position + self.batch_size - len(batch)]
            batch += taken
            self.position += len(taken)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch, as JSON numbers, with what must be equal where it is loaded."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "num_items": self.num_items,
            "num_repeats": self.num_repeats,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises ConfigError where the items or the seed are others."""
        for name in ("num_items", "num_repeats", "seed"):
            if state[name] != getattr(self, name):
                raise ConfigError(
                    f"cannot resume the order of the data: {name} was {state[name]} in the checkpoint and is "
                    f"{getattr(self, name)} now; restore it, or start a new run under another name"
                )
        if state["epoch"] < 0 or not 0 <= state["position"] <= self.num_items * self.num_repeats:
            raise ConfigError(
                f"cannot resume the order of the data: epoch {state['epoch']}, position {state['position']} "
                f"is not within {self.num_items * self.num_repeats} items; the checkpoint was changed by hand"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        return (rng.permutation(self.num_items * self.num_repeats) % self.num_items).tolist()
