"""VAE latents and text embeddings, computed before training and returned in batches.

A TrainingCache is in main memory. With a store it is on disk too, and a later run reads its entries instead
of encoding again. The trainer calls only batch() and text(). Encoders are given as functions, so nothing here
depends on a model.

A WindowedCache is for more encoded pictures than memory can hold: at 1024 px a picture of FLUX takes 4.7 MB,
450,000 of them 2.1 TB. Each rank encodes its own share of the next batches (a window), trains on them, drops
them and encodes the next window. Pictures that the run does not see are never encoded. Windows are counted in
batches, so all ranks finish theirs at the same step and none waits for another's encoding in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from ppcoat.data.batches import ResumableBatches
from ppcoat.data.captions import dropped_captions
from ppcoat.data.colours import WHITE, is_flat, tell_of_flat
from ppcoat.data.content_keys import content_key
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example
from ppcoat.data.pairs import CutPicture, loss_weights
from ppcoat.errors import ConfigError
from ppcoat.finite import check_made
from ppcoat.progress import Progress

# pixels float32 [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w]: the VAE posterior's mean, shifted and scaled
EncodeImage = Callable[[paddle.Tensor], paddle.Tensor]
# the same, and masks uint8 [N, 1, H, W], 1 where a Fill model paints anew -> latents of what is left
EncodeMasked = Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor]
# N captions -> for each name in Encoders.text_names a tensor or list with one row per caption; rows may
# differ in length. FLUX: (prompt_embeds [N, T, D], pooled [N, P])
EncodeText = Callable[[list[str]], tuple[paddle.Tensor | list[paddle.Tensor], ...]]
Embedding = tuple[paddle.Tensor, ...]  # FLUX: prompt_embeds [T, D], pooled [P]

# Limits of one encoder call: captions (or pictures of one size), and pixels of all its pictures together.
ENCODED_AT_ONCE, ENCODED_PIXELS = 8, 1024 * 1024
CLASS = "class_"  # begins the names of a batch's tensors that are of class captions


@dataclass(frozen=True)
class Encoders:
    """The functions that encode pictures and captions, and the names of their results.

    image_identity: stands for the VAE, its weights and dtype in the keys of a store. text_identity: the same
    for the text encoders and the maximum number of tokens. text_names: names of a caption's tensors in a
    batch and on disk. masked: of a model that is given the masks (Fill); for others a mask weighs the loss.
    maker: name of a result, of pictures "latents" -> where the model that makes it lies, and that model.
    """

    image: EncodeImage
    text: EncodeText
    image_identity: str = ""
    text_identity: str = ""
    text_names: tuple[str, ...] = ("prompt_embeds", "pooled")
    masked: EncodeMasked | None = None
    maker: Callable[[str], tuple[object, paddle.nn.Layer]] | None = None

    def check(self, tensor: paddle.Tensor, name: str, what: str) -> None:
        """Raises ConfigError for a result, any shape, that is not finite. name: its name; what: of what."""
        check_made(tensor, what, self.maker and partial(self.maker, name))


@dataclass(frozen=True)
class TrainingCache:
    """Encoded pictures and captions in main memory, in the dtype of the encoders.

    latents: one tensor [C, h, w] per example. embeddings: caption -> its tensors in the order of text_names,
    FLUX's are prompt_embeds [T, D] and pooled [P]. reg_weight: loss weight of regularisation examples.
    beside: what goes with each example, by its name in a batch; empty where nothing does. Those are
    "reference_0", ...: latents of a reference; "loss_mask" float32 [h, w]: weights of the loss; and of a Fill
    model "masked_latents" and "mask" uint8 [1, H, W].
    """

    examples: list[Example]
    latents: list[paddle.Tensor]
    embeddings: dict[str, Embedding]
    reg_weight: float = 1.0
    text_names: tuple[str, ...] = ("prompt_embeds", "pooled")
    beside: list[dict[str, paddle.Tensor]] = field(default_factory=list)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> dict[str, paddle.Tensor | float]:
        """B example numbers of one bucket -> {"latents": [B, C, h, w], each of text_names: as `text` returns
        it, "loss_weight": float, and what goes with them}; with class captions also their tensors under
        "class_" and the name. Tensors are on the current device, in the dtype of the encoders. An example
        without a mask among others with one has a loss_mask of ones.

        rng decides which captions are dropped: it draws B numbers, and B more to choose variants if any
        example of the run has several captions.
        """
        chosen = [self.examples[i] for i in indices]
        rates = np.array([example.caption_dropout_rate for example in chosen])
        dropped = dropped_captions(len(chosen), rates, rng)
        picks = [0] * len(chosen)
        if any(len(example.captions) > 1 for example in self.examples):
            draws = rng.random(len(chosen))
            picks = [int(u * len(e.captions)) for e, u in zip(chosen, draws, strict=True)]

        def text(captions: Sequence[tuple[str, ...]], prefix: str = "") -> dict[str, paddle.Tensor]:
            each = zip(captions, picks, dropped, strict=True)
            tensors = self.text(["" if drop else several[pick] for several, pick, drop in each])
            return {prefix + name: tensor for name, tensor in zip(self.text_names, tensors, strict=True)}

        of_class = [example.class_captions for example in chosen]
        return {
            "latents": _stack([self.latents[i] for i in indices]),
            **text([example.captions for example in chosen]),
            **(text(of_class, CLASS) if of_class[0] else {}),
            **self._beside(indices),
            "loss_weight": self.reg_weight if chosen[0].is_reg else 1.0,
        }

    def _beside(self, indices: Sequence[int]) -> dict[str, paddle.Tensor]:
        rows = [self.beside[i] for i in indices] if self.beside else []
        names = dict.fromkeys(name for row in rows for name in row)
        ones = [paddle.ones(self.latents[i].shape[-2:]) for i in indices] if "loss_mask" in names else []
        rows = [{"loss_mask": one} | row for one, row in zip(ones, rows, strict=True)] if ones else rows
        return {name: _stack([row[name] for row in rows]) for name in names}

    def text(self, captions: Sequence[str]) -> Embedding:
        """B cached captions -> their tensors, stacked along a first axis B, on the current device. FLUX's are
        (prompt_embeds [B, T, D], pooled [B, P]). Shorter rows are padded with zeros at the end. Raises
        KeyError for a caption that is not cached."""
        rows = [self.embeddings[caption] for caption in captions]
        return tuple(_stack(list(column)) for column in zip(*rows, strict=True))


def build_cache(
    examples: Sequence[Example],
    encoders: Encoders,
    extra_captions: Iterable[str] = (),
    reg_weight: float = 1.0,
    batch_size: int = ENCODED_AT_ONCE,
    store: EmbeddingStore | None = None,
) -> TrainingCache:
    """Encode all examples, with one progress bar for pictures and one for captions.

    Equal captions are encoded once. The empty caption is added if any example may drop its caption;
    extra_captions (such as preview prompts) are encoded unchanged. batch_size: captions in one encoder call;
    for pictures see `pictures_at_once`. store: entries found there are not encoded again, new ones are put
    there. Raises ConfigError naming a picture or caption whose encoding is not finite.
    """
    blank = [""] if any(example.caption_dropout_rate > 0 for example in examples) else []
    captions = [caption for each in examples for caption in each.texts]
    latents, beside = _encoded_pictures(examples, encoders, batch_size, store)
    own = dict.fromkeys([*captions, *blank])
    # in calls of their own, so that other previews leave the bits of what is trained on as they are
    extra = dict.fromkeys(caption for caption in extra_captions if caption not in own)
    embeddings = _embeddings([list(own), list(extra)], encoders, batch_size, store)
    return TrainingCache(list(examples), latents, embeddings, reg_weight, encoders.text_names, beside)


def pictures_at_once(pixels: int, batch_size: int = ENCODED_AT_ONCE) -> int:
    """Number of pictures of `pixels` pixels each in one call of the VAE: at most batch_size, at most
    ENCODED_PIXELS in total, at least one. The VAE's memory grows with the pixels of a call."""
    return max(1, min(batch_size, ENCODED_PIXELS // pixels))


def _encoded_pictures(
    examples: Sequence[Example], encoders: Encoders, batch_size: int, store: EmbeddingStore | None
) -> tuple[list[paddle.Tensor], list[dict[str, paddle.Tensor]]]:
    """`latents` and `beside` of a TrainingCache."""
    named = [_pictures_of(example, encoders) for example in examples]
    pictures = [picture for each in named for picture in each.values()]
    latents = iter(_latents(pictures, encoders, batch_size, store))
    found = [{name: next(latents) for name in each} for each in named]
    for example, tensors in zip(examples, found, strict=True):
        if example.mask is None:
            continue
        flips = example.flip_x, example.flip_y
        if encoders.masked:
            hole = _pictures_of(example, encoders)["masked_latents"].hole_pixels()
            tensors["mask"] = paddle.to_tensor(hole, place="cpu")
        else:
            mask = example.mask.load(example.size, *flips)
            weights = loss_weights(mask, tensors["latents"].shape, example.mask_floor)
            tensors["loss_mask"] = paddle.to_tensor(weights, place="cpu")
    return [tensors.pop("latents") for tensors in found], found if any(found) else []


def _pictures_of(example: Example, encoders: Encoders) -> dict[str, CutPicture]:
    """All pictures of an example that are encoded, by the name of their latents."""
    item, flips, mask = example.item, (example.flip_x, example.flip_y), example.mask
    # its opacity is a mask, so that what lies below counts as any colour does
    background = None if mask and mask.from_alpha else WHITE
    own = CutPicture(item.image_path, example.size, *flips, background, item.notes)
    pictures = {"latents": own}
    for number, (each, size) in enumerate(example.references):
        pictures[f"reference_{number}"] = each.picture(size, *flips)
    if mask and encoders.masked:
        pictures["masked_latents"] = replace(own, hole=mask)
    return pictures


@paddle.no_grad()
def _latents(
    pictures: Sequence[CutPicture], encoders: Encoders, batch_size: int, store: EmbeddingStore | None
) -> list[paddle.Tensor]:
    keys = [picture.key(encoders.image_identity) for picture in pictures] if store else []
    latents = {i: found["latent"] for i, key in enumerate(keys) if (found := store.get(key)) is not None}
    sizes: dict[tuple[int, int, bool], list[int]] = {}
    for i, picture in enumerate(pictures):
        if i not in latents:
            sizes.setdefault((*picture.size, picture.hole is not None), []).append(i)
    flat: list[Path] = []
    with Progress(total=len(pictures), initial=len(latents), desc="encoding pictures", unit="file") as bar:
        for some in _calls(sizes, batch_size):
            encoded = _encode([pictures[i] for i in some], encoders, flat).cpu().unbind(0)
            for i, latent in zip(some, encoded, strict=True):
                encoders.check(latent, "latents", f"the VAE's latent of {pictures[i].path}")
                latents[i] = latent
                if store:
                    store.put(keys[i], {"latent": latent})
            bar.update(len(some))
    tell_of_flat(flat, len(pictures))
    return [latents[i] for i in range(len(pictures))]


def _encode(pictures: Sequence[CutPicture], encoders: Encoders, flat: list[Path]) -> paddle.Tensor:
    """Latents of pictures of one size, all with a hole or all without; those of one colour are added to
    `flat`."""
    each_one = [each.pixels() for each in pictures]
    flat += [each.path for each, own in zip(pictures, each_one, strict=True) if is_flat(own)]
    pixels = paddle.to_tensor(np.stack(each_one))
    if pictures[0].hole is None:
        return encoders.image(pixels)
    return encoders.masked(pixels, paddle.to_tensor(np.stack([each.hole_pixels() for each in pictures])))


@paddle.no_grad()
def _embeddings(
    groups: list[list[str]], encoders: Encoders, batch_size: int, store: EmbeddingStore | None
) -> dict[str, Embedding]:
    """Of captions, each once; no call has captions of two groups. Which are in a call does not depend on what
    the store has: beside longer captions one has other padding, and other last bits."""
    embeddings: dict[str, Embedding] = {}
    captions = [caption for group in groups for caption in group]
    keys = {caption: content_key("text", caption, encoders.text_identity) for caption in captions}
    for caption in captions if store else ():
        if (found := store.get(keys[caption])) is not None:
            embeddings[caption] = tuple(found[name] for name in encoders.text_names)
    with Progress(
        total=len(captions), initial=len(embeddings), desc="encoding captions", unit="caption"
    ) as bar:
        for some in (each for group in groups for each in _chunks(group, batch_size)):
            if not (missing := set(some) - embeddings.keys()):
                continue
            columns = [[row.cpu() for row in column] for column in encoders.text(list(some))]
            for caption, *row in zip(some, *columns, strict=True):
                named = dict(zip(encoders.text_names, row, strict=True))
                for name, tensor in named.items():
                    encoders.check(tensor, name, f"the {name} text embedding of {caption!r}")
                embeddings[caption] = tuple(row)
                if store:
                    store.put(keys[caption], named)
            bar.update(len(missing))
    return embeddings


def _calls(sizes: dict[tuple[int, int, bool], list[int]], batch_size: int) -> Iterable[Sequence[int]]:
    """{size and whether they have holes: numbers of such pictures} -> the numbers of each call of the VAE."""
    for (width, height, _), numbers in sizes.items():
        yield from _chunks(numbers, pictures_at_once(width * height, batch_size))


def _chunks(entries: Sequence, size: int) -> Iterable[Sequence]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _stack(rows: list[paddle.Tensor]) -> paddle.Tensor:
    """B rows -> [B, ...] on the current device; rows with a shorter first axis are padded with zeros
    there."""
    longest = max((row.shape[0] for row in rows if row.ndim), default=0)
    whole = [
        row
        if not row.ndim or row.shape[0] == longest
        else paddle.concat([row, paddle.zeros([longest - row.shape[0], *row.shape[1:]], row.dtype)])
        for row in rows
    ]
    return paddle.stack(whole).to(paddle.get_device())


@dataclass
class WindowedCache:
    """A cache with the methods of TrainingCache that encodes one window of batches after another.

    examples, batches: those of the whole run; `batches` must be the sampler that the trainer draws from, and
    returns global batches. encoders(): context manager that loads the encoders. length: batches in a window,
    a multiple of the batches of a step, so that no window begins inside a step. last: batches of the whole
    run. permanent: cache of the captions that are needed in every window (previews, and the empty caption if
    an example may drop its own). share: this rank's part of a global batch. store: as for build_cache.

    A resumed run has other windows than an uninterrupted one; both give the same numbers if the encoding of
    an entry does not depend on the other entries of the call.
    """

    examples: list[Example]
    batches: ResumableBatches
    encoders: Callable[[], AbstractContextManager[Encoders]]
    length: int
    last: int
    permanent: TrainingCache
    share: Callable[[Sequence], Sequence] = list
    store: EmbeddingStore | None = None
    _window: TrainingCache | None = field(default=None, init=False)
    _places: dict[int, int] = field(default_factory=dict, init=False)  # example number -> number in _window
    _numbers: range = field(default=range(0), init=False)  # of the batches of this window

    @property
    def pictures(self) -> int:
        """Number of pictures in the current window."""
        return len(self._places)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> dict[str, paddle.Tensor | float]:
        """As TrainingCache.batch, for the batch that `batches` returned last: "latents" float [B, C, h, w].

        Encodes the next window first if this batch is not in the current one. Only the rows of this rank are
        right: those of other ranks repeat one of its pictures, so that shapes and draws from rng are those of
        the global batch. Raises ConfigError as build_cache does.
        """
        number = self.batches.batches - 1
        if number not in self._numbers:
            self._look_ahead(number, indices)
        mine = list(self.share(indices))
        rows = [mine[0]] * len(indices)
        for row, index in zip(self.share(range(len(indices))), mine, strict=True):
            rows[row] = index
        return self._window.batch([self._places[i] for i in rows], rng)

    def text(self, captions: Sequence[str]) -> Embedding:
        """As TrainingCache.text ([B, T, D], [B, P] for FLUX), for the captions of `permanent`."""
        return self.permanent.text(captions)

    def _look_ahead(self, number: int, indices: Sequence[int]) -> None:
        """Drop this window and encode the one that begins with batch `number`, whose examples are
        `indices`."""
        self._window, self._places, self._numbers = None, {}, range(0)
        numbers = range(number, max(number + 1, min(number + self.length, self.last)))
        following = self.batches.ahead(len(numbers) - 1)
        wanted = list(dict.fromkeys(i for batch in [indices, *following] for i in self.share(batch)))
        self._window = self._encoded([self.examples[i] for i in wanted])
        self._places, self._numbers = {index: place for place, index in enumerate(wanted)}, numbers

    def _encoded(self, examples: list[Example]) -> TrainingCache:
        # the empty caption is in `permanent` already: without a dropout rate nothing encodes it again
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
        # TrainingCache draws numbers for variants if any of its examples has some, as the whole run does
        varied = [example for example in self.examples if len(example.captions) > 1][:1]
        return replace(
            self.permanent,
            examples=examples + varied,
            latents=found.latents,
            beside=found.beside,
            embeddings=self.permanent.embeddings | found.embeddings,
        )
