"""A folder that the page Data has open, shared by all pages that show it: what is in it, what is odd about
which picture, and its captions as they are now. Knows nothing of the page.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ppcoat.data.buckets import Size, crop_box
from ppcoat.data.caption_edits import CaptionEditor, CaptionFlags
from ppcoat.data.examples import Dataset, Example
from ppcoat.data.folder import FolderFlags, NoteKind, PictureNote, folder_dataset, picture_notes
from ppcoat.errors import ConfigError
from ppcoat.studio.access import Roots

_OPEN_FOLDERS = 8
_PATHS = ("folder", "control_path", "mask_path")  # of FolderFlags


@dataclass(frozen=True)
class Picture:
    """One picture of the folder. size: upright, in pixels; bucket: at which it is trained; crop: what is left
    of it then, as parts of its sides; references and mask: files beside it."""

    path: Path
    name: str
    size: Size
    bucket: Size
    crop: tuple[float, float, float, float]
    notes: tuple[PictureNote, ...] = ()
    references: tuple[Path, ...] = ()
    mask: Path | None = None


class OpenFolder:
    """The pictures below one folder. version: grows with each change, so that pages see that there is one.
    Every method may be called from any thread; `read`, `write` and `undo` take their time."""

    def __init__(self, flags: FolderFlags, roots: Roots) -> None:
        self.flags, self.version = flags, 0
        self.pictures: list[Picture] = []
        self.left_out: list[str] = []
        self.remarks: list[str] = []
        self._roots, self._lock = roots, threading.RLock()
        self._editor, self._seen = CaptionEditor((), flags.caption_ext), None

    @property
    def shown_flags(self) -> FolderFlags:
        """The flags as a command that starts in the first root takes them."""
        named = {name: getattr(self.flags, name) for name in _PATHS}
        return replace(
            self.flags, **{name: path and self._roots.argument(path) for name, path in named.items()}
        )

    def read(self, anew: bool = False) -> None:
        """Look at every picture, unless nothing has changed since. Raises ConfigError where no picture can be
        used."""
        with self._lock:
            seen = _fingerprint(Path(self.flags.folder), self.flags)
            if seen == self._seen and not anew:
                return
            dataset = self._inside(folder_dataset(self.flags))
            notes, folder = picture_notes(dataset), dataset.images.folder
            self._editor = CaptionEditor(dataset.images.items, self.flags.caption_ext, self._editor.steps)
            self.pictures = [_picture(dataset, example, notes) for example in dataset.examples]
            self.left_out = [
                f"{os.path.relpath(each.path, folder)}: {each.reason}" for each in dataset.images.bad
            ]
            self.remarks = list(dataset.images.notes)
            self._seen = seen
            self.version += 1

    def caption(self, picture: Picture) -> str:
        """The caption as it is written, empty where there is none. Halves of characters, which JSON can hold
        and no browser can be sent, are question marks."""
        return self._editor.captions.get(picture.path, "").encode("utf-8", "replace").decode()

    def counts(self) -> Counter[NoteKind]:
        """How many pictures have a note of each kind."""
        return Counter(kind for each in self.pictures for kind in {note.kind for note in self.notes(each)})

    def notes(self, picture: Picture) -> list[PictureNote]:
        """What is odd about it, with the captions as they are now."""
        gone = "no_caption" if self.caption(picture) else None
        return [note for note in picture.notes if note.kind != gone]

    def found(self, search: str, kind: NoteKind | None = None) -> list[Picture]:
        """The pictures whose caption or file name holds a text, and that have a note of this kind."""
        wanted = CaptionFlags(folder="", search=search)
        return [
            each
            for each in self.pictures
            if wanted.concerns(each.path, self.caption(each))
            and (kind is None or any(note.kind == kind for note in self.notes(each)))
        ]

    def would_change(self, change: CaptionFlags) -> int:
        """How many captions a change of many would change."""
        return len(self._editor.would_change(change))

    def write(self, new: Mapping[Path, str]) -> None:
        """Write captions as one step. Raises ConfigError as CaptionEditor.write does, and for a file that a
        link leads out of the roots."""
        with self._lock:
            for picture in new:
                if not self._roots.holds(self._editor.file_of(picture)):
                    raise ConfigError(f"the caption of {picture.name} is a link out of the studio's folders")
            try:
                self._editor.write(new)
            finally:
                self._changed()

    def write_all(self, change: CaptionFlags) -> int:
        """Write a change of many captions as one step -> how many."""
        with self._lock:
            new = self._editor.would_change(change)
            self.write(new)
            return len(new)

    def undo(self) -> int:
        """Take the last step back -> how many files; 0 where there is none. Raises ConfigError as
        CaptionEditor.undo does."""
        with self._lock:
            if not self._editor.steps:
                return 0
            files = self._editor.undo()
            self._changed()
            return len(files)

    @property
    def steps(self) -> int:
        """How many steps can be taken back."""
        return len(self._editor.steps)

    def _changed(self) -> None:
        self.version += 1
        self._seen = _fingerprint(Path(self.flags.folder), self.flags)

    def _inside(self, dataset: Dataset) -> Dataset:
        """Without what links lead to outside of the roots: it is not shown."""
        holds = self._roots.holds
        items = [
            item
            for item in dataset.images.items
            if holds(item.image_path) and (item.caption_file is None or holds(item.caption_file))
        ]
        outside = len(dataset.images.items) - len(items)
        if outside:
            note = f"{outside} pictures, or their captions, are links out of the studio's folders: left out"
            paths = {item.image_path for item in items}
            images = replace(dataset.images, items=items, notes=(*dataset.images.notes, note))
            examples = [each for each in dataset.examples if each.item.image_path in paths]
            dataset = replace(dataset, images=images, examples=examples)
        return dataset


class OpenFolders:
    """The folders that were looked at last, each once for all pages."""

    def __init__(self, roots: Roots) -> None:
        self._roots, self._lock = roots, threading.Lock()
        self._folders: OrderedDict[FolderFlags, OpenFolder] = OrderedDict()

    def of(self, flags: FolderFlags) -> OpenFolder:
        """The folder of these flags, whose paths become absolute. Raises ConfigError for one outside of the
        roots."""
        inside = self._roots.inside
        paths = {"folder": str(inside(flags.folder))}
        for name in _PATHS[1:]:
            text = getattr(flags, name)
            paths[name] = str(inside(text)) if text else None
        flags = replace(flags, **paths)
        with self._lock:
            folder = self._folders.setdefault(flags, OpenFolder(flags, self._roots))
            self._folders.move_to_end(flags)
            while len(self._folders) > _OPEN_FOLDERS:
                self._folders.popitem(last=False)
            return folder


def _picture(dataset: Dataset, example: Example, notes: Mapping[Path, list[PictureNote]]) -> Picture:
    item = example.item
    size = item.width, item.height
    return Picture(
        path=item.image_path,
        name=item.image_path.relative_to(dataset.images.folder).as_posix(),
        size=size,
        bucket=example.size,
        crop=crop_box(*size, example.size),
        notes=tuple(notes.get(item.image_path, ())),
        references=tuple(reference.path for reference, _ in example.references),
        mask=example.mask.path if example.mask else None,
    )


def _fingerprint(folder: Path, flags: FolderFlags) -> tuple:
    """Names, sizes and times of everything below the folder and those beside it: what changes when a file
    does."""
    found = []
    for top in (each for each in (folder, flags.control_path, flags.mask_path) if each):
        for parent, _, names in os.walk(top, followlinks=False):
            for name in names:
                try:
                    known = os.stat(os.path.join(parent, name))
                except OSError:
                    continue
                found.append((parent, name, known.st_size, known.st_mtime_ns))
    return tuple(sorted(found))
