"""A TrainingCache for more pictures than memory can hold encoded: it holds those of the next batches only.

At 1024 px a picture of FLUX takes 4.7 MB encoded, 450,000 of them 2.1 TB. Here each rank looks ahead in the
order of the data, encodes its own share of the next batches, trains on them, drops them and looks ahead
again. Nothing is encoded that the run does not see. No rank waits for what another encodes, but for the step
that both take together: windows are counted in batches, so all ranks come to the end of theirs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
import paddle

from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Embedding, Encoders, TrainingCache, build_cache
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example
from ppcoat.errors import ConfigError


@dataclass
class WindowedCache:
    """What a trainer uses of TrainingCache, from the sampler that the trainer draws from.

    examples, batches: all of the run; batches give the global batch. encoders(): a context within which
    encoders are loaded. Windows of a resumed run begin elsewhere: it repeats the numbers of an uninterrupted
    one where an encoding does not depend on what else is encoded. length: batches in a window, a multiple of
    those in a step, so that none begins within one. last: batches in the whole run. kept: holds the captions
    that stay (previews, and the empty one if an example may drop its caption). share: a rank's part of a
    global batch. store: as build_cache takes it.
    """

    examples: list[Example]
    batches: ResumableBatches
    encoders: Callable[[], AbstractContextManager[Encoders]]
    length: int
    last: int
    kept: TrainingCache
    share: Callable[[Sequence], Sequence] = list
    store: EmbeddingStore | None = None
    _held: TrainingCache | None = field(default=None, init=False)
    _places: dict[int, int] = field(default_factory=dict, init=False)  # number of an example -> that in _held
    _numbers: range = field(default=range(0), init=False)  # of the batches of this window

    @property
    def pictures(self) -> int:
        """How many are held now."""
        return len(self._places)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> dict[str, paddle.Tensor | float]:
        """As TrainingCache.batch, for the batch that `batches` gave last. Rows of other ranks hold a picture
        of this one: only their number counts, and what rng gives for them.

        Encodes the next window where this one is over. Raises ConfigError as build_cache does.
        """
        number = self.batches.batches - 1
        if number not in self._numbers:
            self._look_ahead(number, indices)
        mine = list(self.share(indices))
        rows = [mine[0]] * len(indices)
        for row, index in zip(self.share(range(len(indices))), mine, strict=True):
            rows[row] = index
        return self._held.batch([self._places[i] for i in rows], rng)

    def text(self, captions: Sequence[str]) -> Embedding:
        """As TrainingCache.text, for the captions that stay."""
        return self.kept.text(captions)

    def _look_ahead(self, number: int, indices: Sequence[int]) -> None:
        """Drop this window and encode the one that begins with batch `number`, which has these examples."""
        self._held, self._places, self._numbers = None, {}, range(0)
        numbers = range(number, max(number + 1, min(number + self.length, self.last)))
        following = self.batches.ahead(len(numbers) - 1)
        wanted = list(dict.fromkeys(i for batch in [indices, *following] for i in self.share(batch)))
        self._held = self._encoded([self.examples[i] for i in wanted])
        self._places, self._numbers = {index: place for place, index in enumerate(wanted)}, numbers

    def _encoded(self, examples: list[Example]) -> TrainingCache:
        # the empty caption has been encoded, so that no example asks for it here
        asked = [replace(example, caption_dropout_rate=0.0) for example in examples]
        state = paddle.get_rng_state()  # new layers draw initial weights
        try:
            with self.encoders() as encoders:
                found = build_cache(asked, encoders, store=self.store)
        except ConfigError as error:
            raise ConfigError(
                f"{error} (found while encoding the next {len(examples)} pictures; checkpoints are unharmed: "
                "put it right and go on from the last one)"
            ) from None
        finally:
            paddle.set_rng_state(state)
        # TrainingCache draws numbers for captions where any example of the run has variants
        varied = [example for example in self.examples if len(example.captions) > 1][:1]
        return replace(
            self.kept,
            examples=examples + varied,
            latents=found.latents,
            embeddings=self.kept.embeddings | found.embeddings,
        )
