"""What a run will train on, as plain text, before any model is loaded: counts, captions, buckets, crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppcoat.config.explain import printable
from ppcoat.data.buckets import crop_share
from ppcoat.data.captions import holds_trigger
from ppcoat.data.examples import Dataset, Example, all_examples

CROP_WARNING = 0.10  # of the picture
_DATASET_ROWS, _BUCKET_ROWS, _CAPTIONS = 5, 8, 3
_CAPTION_MARKS = 90


def data_report(datasets: Sequence[Dataset]) -> str:
    """At most 25 lines: pictures per dataset, bucket table, crop warning, three final captions."""
    examples = all_examples(datasets)
    per_epoch = sum(example.repeats for example in examples)
    lines = [f"data: {_count(len(examples), 'picture')} to encode, {per_epoch} per epoch"]
    lines += _shortened([_dataset_line(each) for each in datasets], _DATASET_ROWS, "dataset")
    lines += _bucket_table(examples)
    lines += _crop_warning(examples)
    lines += _captions(examples)
    return "\n".join(lines)


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
    """One line per bucket, the fullest first: size, pictures, what the crop costs."""
    buckets: dict[tuple[int, int], list[float]] = {}
    for example in examples:
        buckets.setdefault(example.size, []).append(_crop(example))
    rows = [
        f"  {width:5d} x {height:<5d}{len(crops):9d}{np.mean(crops):10.1%}{max(crops):10.1%}"
        for (width, height), crops in sorted(buckets.items(), key=lambda each: (-len(each[1]), each[0]))
    ]
    return ["  width x height pictures mean crop     worst", *_shortened(rows, _BUCKET_ROWS, "bucket")]


def _crop_warning(examples: list[Example]) -> list[str]:
    paths = {example.item.image_path for example in examples if _crop(example) > CROP_WARNING}
    if not paths:
        return []
    worst = max(examples, key=_crop)
    return [
        f"  warning: {_count(len(paths), 'picture')} will be cropped by more than {CROP_WARNING:.0%}, most "
        f"{_name(worst)} ({_crop(worst):.0%}); a smaller bucket_step or a larger resolution crops less"
    ]


def _captions(examples: list[Example]) -> list[str]:
    """Three final captions, from the start, the middle and the end."""
    places = dict.fromkeys([0, len(examples) // 2, len(examples) - 1])
    lines = []
    for place in list(places)[:_CAPTIONS]:
        caption = printable(examples[place].captions[0])
        caption = caption if len(caption) <= _CAPTION_MARKS else caption[: _CAPTION_MARKS - 3] + "..."
        lines.append(f"  caption of {_name(examples[place])}: {caption or '(empty)'}")
    return lines


def _crop(example: Example) -> float:
    return crop_share(example.item.width, example.item.height, example.size)


def _name(example: Example) -> str:
    return printable(Path(example.item.image_path).name)


def _shortened(rows: list[str], most: int, what: str) -> list[str]:
    more = len(rows) - most
    return rows if more <= 0 else [*rows[:most], f"  ... and {_count(more, f'more {what}')}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
