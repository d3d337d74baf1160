"""All datasets of a run, found, checked and laid out as examples: a picture, its size, its captions.

    DatasetConfig -> scan_folder -> Dataset(items, examples) -> the report, the cache, the batches

A list of resolutions has become one dataset per resolution before (config/schema.py); flipped copies are
examples of their own here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ppcoat.config.schema import DatasetConfig, RunConfig
from ppcoat.data.buckets import Size, bucket_size
from ppcoat.data.captions import CaptionRules, caption_variants
from ppcoat.data.sources import ImageFolder, Item, scan_folder


@dataclass(frozen=True)
class Example:
    """One picture as it is trained. size: (width, height) in pixels; captions: final, a step draws one of
    them; repeats: times it is seen in an epoch."""

    item: Item
    size: Size
    captions: tuple[str, ...]
    repeats: int = 1
    flip_x: bool = False
    flip_y: bool = False
    is_reg: bool = False
    caption_dropout_rate: float = 0.0


@dataclass(frozen=True)
class Dataset:
    """One dataset of a run: its settings, what its folder holds, and the examples made of it."""

    config: DatasetConfig
    images: ImageFolder
    trigger_word: str | None
    examples: list[Example]


def scan_datasets(config: RunConfig) -> list[Dataset]:
    """Find and check all pictures of a run, in the order of its datasets.

    Raises ConfigError as scan_folder does. A folder that stands in several datasets with the same settings
    is read once.
    """
    scanned: dict[tuple, ImageFolder] = {}
    datasets = []
    for data in config.datasets:
        asked = data.folder_path, data.caption_ext, data.default_caption, data.skip_bad
        if asked not in scanned:
            scanned[asked] = scan_folder(*asked)
        trigger = data.trigger_word or config.trigger_word
        examples = _examples_of(scanned[asked].items, data, trigger, config.seed)
        datasets.append(Dataset(data, scanned[asked], trigger, examples))
    return datasets


def all_examples(datasets: Iterable[Dataset]) -> list[Example]:
    """The examples of all datasets, in order: what build_cache and ResumableBatches number from 0."""
    return [example for dataset in datasets for example in dataset.examples]


def _examples_of(items: list[Item], data: DatasetConfig, trigger: str | None, seed: int) -> list[Example]:
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
    # as in ai-toolkit, both together give four of each picture
    if data.flip_x:
        examples += [replace(example, flip_x=True) for example in examples]
    if data.flip_y:
        examples += [replace(example, flip_y=True) for example in examples]
    return examples
