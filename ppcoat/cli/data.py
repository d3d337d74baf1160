"""Two commands on a folder of pictures and captions, before anything is trained.

    python -m ppcoat data report pictures --resolution 1024 --trigger_word sks
    python -m ppcoat data captions pictures --replace "a man" --by "[trigger]" --write

`report` prints what a run would print of it, and what is odd about which picture. `captions` changes captions
and tells what it changed, or without --write would change.
"""

from __future__ import annotations

import argparse

from ppcoat.config.flags import add_flags, from_flags
from ppcoat.data.caption_edits import CaptionEditor, CaptionFlags
from ppcoat.data.examples import data_report
from ppcoat.data.folder import FolderFlags, folder_dataset, picture_notes
from ppcoat.errors import ConfigError, check_whole, printable

WHY = {
    "no_caption": "no caption",
    "duplicate": "the same file as {}",
    "small": "small: {}",
    "cropped": "{} of it is cropped",
    "guessed": "its caption is not UTF-8, read by guess as {}",
    "other": "{}",
}
_SHOWN = 5  # changed captions


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, FolderFlags)


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, CaptionFlags)


def run_report(arguments: argparse.Namespace) -> None:
    dataset = folder_dataset(from_flags(FolderFlags, arguments))
    print(data_report([dataset]))
    root = dataset.images.folder
    for problem in dataset.images.bad:
        print(f"  left out: {printable(problem.path.relative_to(root))}: {printable(problem.reason)}")
    for path, notes in picture_notes(dataset).items():
        told = "; ".join(WHY[note.kind].format(printable(note.detail)) for note in notes)
        print(f"  {printable(path.relative_to(root))}: {told}")


def run_captions(arguments: argparse.Namespace) -> None:
    flags = from_flags(CaptionFlags, arguments)
    if not (flags.prepend or flags.append or flags.replace or flags.text is not None):
        raise ConfigError("nothing to do: give --prepend, --append, --replace or --text")
    check_whole("captions", flags.prepend, flags.append, flags.replace, flags.by, flags.text)
    dataset = folder_dataset(FolderFlags(folder=flags.folder, caption_ext=flags.caption_ext))
    editor = CaptionEditor(dataset.images.items, flags.caption_ext)
    new = editor.would_change(flags)
    for path, caption in list(new.items())[:_SHOWN]:
        print(f"{printable(path.name)}: {printable(editor.captions[path])} -> {printable(caption)}")
    if len(new) > _SHOWN:
        print(f"... and {len(new) - _SHOWN} more")
    if flags.write:
        editor.write(new)
    done = "changed" if flags.write else "would change (--write does it)"
    print(f"{len(new)} of {len(editor.captions)} captions {done}")
