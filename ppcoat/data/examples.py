"""All datasets of a run, found, checked and laid out as examples: a picture, its size, its captions.

    DatasetConfig -> scan_folder -> Dataset(items, examples) -> the report, the cache, the batches

config/schema.py has already turned a list of resolutions into one dataset per resolution; here a flipped copy
becomes an example of its own. The report is plain text, made before any model is loaded: it shows what a run
will train on, in counts, captions, buckets and crops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ppcoat.config.schema import DatasetConfig, RunConfig, TrainConfig
from ppcoat.data.buckets import Size, bucket_size, crop_share
from ppcoat.data.captions import CaptionRules, caption_variants, class_caption, holds_trigger
from ppcoat.data.content_keys import file_digest
from ppcoat.data.pairs import Companions, Mask, Reference, aside, pair_lines, with_companions
from ppcoat.data.sources import ImageFolder, Item, scan_folder
from ppcoat.errors import printable

CROP_WARNING = 0.10  # of the picture
ENLARGE_WARNING = 1.1  # times the sides of the picture
_DATASET_ROWS, _PAIR_ROWS, _BUCKET_ROWS, _CAPTIONS, _NOTES = 5, 5, 8, 3, 4
_CAPTION_MARKS = 90


@dataclass(frozen=True)
class Example:
    """One picture as it is trained. size: (width, height) in pixels; captions: final ones, of which each step
    draws one; class_captions: what stands for each of them where the model's own output is preserved, none
    elsewhere; repeats: how often it is seen in an epoch. references, with the size of each, and mask: what
    goes with it; mask_floor: weight of the loss where the mask is black."""

    item: Item
    size: Size
    captions: tuple[str, ...]
    repeats: int = 1
    flip_x: bool = False
    flip_y: bool = False
    is_reg: bool = False
    caption_dropout_rate: float = 0.0
    class_captions: tuple[str, ...] = ()
    references: tuple[tuple[Reference, Size], ...] = ()
    mask: Mask | None = None
    mask_floor: float = 0.0

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions of both kinds."""
        return self.captions + self.class_captions

    @property
    def crop(self) -> float:
        """Part of the picture, 0..1, that is cut off."""
        return crop_share(self.item.width, self.item.height, self.size)

    @property
    def is_cropped(self) -> bool:
        """By more than CROP_WARNING, but for the rounding of floats."""
        return self.crop > CROP_WARNING + 0.0005

    @property
    def enlarged(self) -> float:
        """Times the sides of the picture."""
        return max(self.size[0] / self.item.width, self.size[1] / self.item.height)

    @property
    def is_small(self) -> bool:
        """Whether it is enlarged by more than what the rule "aspect" allows itself."""
        return self.enlarged > ENLARGE_WARNING

    @property
    def shape(self) -> tuple:
        """What pictures of one batch have in common: whether they are for regularisation, their size, and the
        sizes of their references."""
        return self.is_reg, self.size, tuple(size for _, size in self.references)


@dataclass(frozen=True)
class Dataset:
    """One dataset of a run: its settings, the contents of its folder, and the examples made of them.
    companions: what goes with its pictures, by path."""

    config: DatasetConfig
    images: ImageFolder
    trigger_word: str | None
    examples: list[Example]
    companions: dict[Path, Companions] = field(default_factory=dict)


def scan_datasets(config: RunConfig) -> list[Dataset]:
    """Find and check all pictures of a run, in the order of its datasets.

    Raises ConfigError as scan_folder and with_companions do. A folder that several datasets name with the
    same settings is read once.
    """
    scanned: dict[tuple, ImageFolder] = {}
    paired: dict[tuple, tuple[ImageFolder, dict[Path, Companions]]] = {}
    datasets = []
    for data in config.datasets:
        asked = data.folder_path, data.caption_ext, data.default_caption, data.skip_bad, aside(data)
        beside = *asked, data.control_path, data.control_transparent_color, data.alpha_mask, data.invert_mask
        if asked not in scanned:
            scanned[asked] = scan_folder(*asked)
        if beside not in paired:
            paired[beside] = with_companions(scanned[asked], data)
        images, companions = paired[beside]
        trigger = data.trigger_word or config.trigger_word
        examples = _examples_of(images.items, companions, data, trigger, config.seed)
        examples = [_with_class_captions(each, config.train, trigger) for each in examples]
        datasets.append(Dataset(data, images, trigger, examples, companions))
    return datasets


def all_examples(datasets: Iterable[Dataset]) -> list[Example]:
    """The examples of all datasets, in the order in which build_cache and ResumableBatches number them."""
    return [example for dataset in datasets for example in dataset.examples]


def _examples_of(
    items: list[Item],
    companions: dict[Path, Companions],
    data: DatasetConfig,
    trigger: str | None,
    seed: int,
) -> list[Example]:
    rules = CaptionRules(
        trigger_word=trigger,
        put_in_front=not data.is_reg,
        shuffle_tokens=data.shuffle_tokens,
        keep_tokens=data.keep_tokens,
        token_dropout_rate=data.token_dropout_rate,
        caption_variants=data.caption_variants,
    )
    (resolution,) = data.resolutions
    examples = [
        Example(
            item=item,
            size=bucket_size(item.width, item.height, resolution, data.bucket_rule, data.bucket_step),
            captions=caption_variants(item.caption_raw, rules, seed),
            repeats=data.num_repeats * item.repeats,
            is_reg=data.is_reg,
            caption_dropout_rate=data.caption_dropout_rate,
        )
        for item in items
    ]
    if companions:
        examples = [_with_its(companions[each.item.image_path], each, data) for each in examples]
    # as in ai-toolkit, both together give four of each picture
    if data.flip_x:
        examples += [replace(example, flip_x=True) for example in examples]
    if data.flip_y:
        examples += [replace(example, flip_y=True) for example in examples]
    return examples


def _with_class_captions(example: Example, train: TrainConfig, trigger: str | None) -> Example:
    if train.blank_prompt_preservation:
        return replace(example, class_captions=("",) * len(example.captions))
    if not train.diff_output_preservation:
        return example
    word = train.diff_output_preservation_class
    return replace(example, class_captions=tuple(class_caption(c, trigger, word) for c in example.captions))


def _with_its(companions: Companions, example: Example, data: DatasetConfig) -> Example:
    """The example with references, each at the size at which it is shown, and mask."""
    sizes = (
        example.size if data.full_size_control_images else each.own_size(data.resolutions[0])
        for each in companions.references
    )
    references = tuple(zip(companions.references, sizes, strict=True))
    return replace(example, references=references, mask=companions.mask, mask_floor=data.mask_min_value)


def data_report(datasets: Sequence[Dataset], at_once: int = 1) -> str:
    """At most 38 lines: pictures per dataset, what goes with them, bucket table, warnings of crops, small
    pictures and duplicates, notes on the folders, three final captions."""
    examples = all_examples(datasets)
    per_epoch = sum(example.repeats for example in examples)
    lines = [f"data: {_count(len(examples), 'picture')} to encode, {per_epoch} per epoch"]
    lines += _dataset_lines(datasets)
    lines += _bucket_table(examples)
    lines += _few_warning(examples, per_epoch, at_once)
    lines += _crop_warning(examples)
    lines += _small_warning(examples)
    lines += _duplicate_warning(examples)
    notes = dict.fromkeys(note for each in datasets for note in each.images.notes)
    lines += _shortened([f"  note: {printable(note)}" for note in notes], _NOTES, "note")
    lines += _captions(examples)
    return "\n".join(lines)


def _dataset_lines(datasets: Sequence[Dataset]) -> list[str]:
    """A line for each dataset, and below it what goes with its pictures, once for all sizes of a folder."""
    rows, beside = [], {}
    for each in datasets[:_DATASET_ROWS]:
        sizes = {example.item.image_path: example.size for example in each.examples}
        own = [(each.config.folder_path, line)
               for line in pair_lines(each.config, each.images.items, each.companions, sizes)]  # fmt: skip
        new = [key for key in own if key not in beside]
        beside |= dict.fromkeys(new)
        rows += [_dataset_line(each), *(line for _, line in new)]
    rows = _shortened(rows, _DATASET_ROWS + _PAIR_ROWS, "line")
    more = len(datasets) - _DATASET_ROWS
    return rows if more <= 0 else [*rows, f"  ... and {_count(more, 'more dataset')}"]


def _dataset_line(dataset: Dataset) -> str:
    data, items = dataset.config, dataset.images.items
    facts = [_count(len(items), "picture")]
    repeats = sorted({example.repeats for example in dataset.examples})
    if repeats != [1]:
        facts.append("each " + (f"{repeats[0]} to " if len(repeats) > 1 else "") + f"{repeats[-1]} times")
    facts += [f"copies by {key}" for key in ("flip_x", "flip_y") if getattr(data, key)]
    missing = sum(not item.has_caption for item in items)
    facts.append(f"{missing} without a caption of their own" if missing else "all with captions")
    if dataset.trigger_word:
        hits = sum(holds_trigger(item.caption_raw, dataset.trigger_word) for item in items)
        rest = "" if hits == len(items) or data.is_reg else ", put in front of the others"
        facts.append(f"trigger {dataset.trigger_word!r} written in {hits} of {len(items)}{rest}")
    if dataset.images.bad:
        facts.append(f"{_count(len(dataset.images.bad), 'bad file')} left out")
    kind = "regularisation: " if data.is_reg else ""
    return f"  {kind}{printable(data.folder_path)} at {data.resolutions[0]}: {', '.join(facts)}"


def _bucket_table(examples: list[Example]) -> list[str]:
    """One line per bucket, the fullest first: size, pictures, mean and largest share that is cropped."""
    buckets: dict[tuple[int, int], list[float]] = {}
    for example in examples:
        buckets.setdefault(example.size, []).append(example.crop)
    rows = [
        f"  {width:5d} x {height:<5d}{len(crops):9d}{np.mean(crops):10.1%}{max(crops):10.1%}"
        for (width, height), crops in sorted(buckets.items(), key=lambda each: (-len(each[1]), each[0]))
    ]
    return ["  width x height pictures mean crop     worst", *_shortened(rows, _BUCKET_ROWS, "bucket")]


def _few_warning(examples: list[Example], per_epoch: int, at_once: int) -> list[str]:
    if len({each.item.image_path for each in examples if not each.is_reg}) == 1:
        return ["  warning: one picture only: what is trained on it will draw that picture; take more"]
    if at_once <= per_epoch:
        return []
    return [f"  warning: {at_once} pictures at once, {per_epoch} in an epoch: some are there more than once"]


def _crop_warning(examples: list[Example]) -> list[str]:
    paths = {example.item.image_path for example in examples if example.is_cropped}
    if not paths:
        return []
    worst = max(examples, key=lambda example: example.crop)
    return [
        f"  warning: {_count(len(paths), 'picture')} will be cropped by more than {CROP_WARNING:.0%}, most "
        f"{_name(worst)} ({worst.crop:.0%}); a smaller bucket_step or a larger resolution crops less"
    ]


def _small_warning(examples: list[Example]) -> list[str]:
    small = {each.item.image_path: each for each in examples if each.is_small}
    if not small:
        return []
    worst = max(small.values(), key=lambda example: example.enlarged)
    item, (width, height) = worst.item, worst.size
    return [
        f"  warning: {_count(len(small), 'picture')} smaller than the size of training, most {_name(worst)} "
        f"({item.width} x {item.height} for {width} x {height}): enlarged; remove it or lower the resolution"
    ]


def duplicates(items: Iterable[Item]) -> dict[Path, list[Path]]:
    """Pictures whose files have the same bytes as others -> these others."""
    of_size: dict[int, set[Path]] = defaultdict(set)
    for item in items:
        of_size[item.file_bytes].add(item.image_path)
    equal: dict[str, list[Path]] = defaultdict(list)
    for size, paths in of_size.items():
        if size and len(paths) > 1:
            for path in sorted(paths):
                equal[file_digest(path)].append(path)
    return {path: [each for each in paths if each != path]
            for paths in equal.values() if len(paths) > 1 for path in paths}  # fmt: skip


def _duplicate_warning(examples: list[Example]) -> list[str]:
    twins = duplicates(example.item for example in examples if not example.is_reg)
    if not twins:
        return []
    path, others = next(iter(twins.items()))
    names = f"{printable(path.name)} and {printable(others[0].name)}"
    return [
        f"  warning: {_count(len(twins), 'picture')} are the same file as another, e.g. {names}: they count "
        "more than once; remove one, or say so by num_repeats"
    ]


def _captions(examples: list[Example]) -> list[str]:
    """Three final captions: of those whose encoding was guessed, else from the start, the middle, the end."""
    guessed = [place for place, each in enumerate(examples) if each.item.encoding != "utf-8"]
    places = dict.fromkeys([*guessed[:_CAPTIONS], 0, len(examples) // 2, len(examples) - 1])
    lines = []
    for place in list(places)[:_CAPTIONS]:
        example = examples[place]
        lines.append(f"  caption of {_name(example)}: {_shown(example.captions[0])}")
        if example.class_captions:
            lines[-1] += f"; preserved: {_shown(example.class_captions[0])}"
    return lines


def _shown(caption: str) -> str:
    caption = printable(caption)
    return (caption if len(caption) <= _CAPTION_MARKS else caption[: _CAPTION_MARKS - 3] + "...") or "(empty)"


def _name(example: Example) -> str:
    return printable(Path(example.item.image_path).name)


def _shortened(rows: list[str], most: int, what: str) -> list[str]:
    more = len(rows) - most
    return rows if more <= 0 else [*rows[:most], f"  ... and {_count(more, f'more {what}')}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
