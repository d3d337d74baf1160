"""Captions changed: one picture's, or many at once; written whole or not at all, and taken back.

    python -m ppcoat data captions pictures --prepend "sks dress, " --write

A caption is written as plain text beside its picture, where it counts before tables and default captions;
these are never changed. What somebody else changed since it was read is not written over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ppcoat.atomic import whole_file
from ppcoat.config.flags import flag
from ppcoat.data.caption_files import MAX_CAPTION_BYTES, TABLE_SUFFIXES, normal
from ppcoat.data.encodings import decode
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError, printable


@dataclass(frozen=True, kw_only=True)
class CaptionFlags:
    """Settings of `data captions`, and of the page's changes."""

    folder: str = flag("folder of pictures and captions", positional=True, metavar="FOLDER")
    caption_ext: str = flag("ending of caption files", "txt")
    search: str = flag("only captions or file names that hold this text", "")
    prepend: str = flag("put this in front of captions that do not start with it", "")
    append: str = flag("put this behind captions that do not end with it", "")
    replace: str = flag("replace this text", "")
    by: str = flag("what takes its place (default: nothing)", "")
    text: str | None = flag("the whole new caption", None)
    write: bool = flag("write it; without this only tell what would change", False)

    def changed(self, caption: str) -> str:
        """The caption after replacing, prepending and appending, without outer white space."""
        caption = caption if self.text is None else self.text
        caption = caption.replace(self.replace, self.by) if self.replace else caption
        if not caption.startswith(self.prepend):
            caption = self.prepend + caption
        if not caption.endswith(self.append):
            caption += self.append
        return caption.strip()

    def concerns(self, picture: Path, caption: str) -> bool:
        """Whether the search finds a picture; capitals do not matter."""
        wanted = self.search.casefold()
        return wanted in caption.casefold() or wanted in picture.name.casefold()


@dataclass(frozen=True)
class _Step:
    """What was done together: for each file its bytes before (None: it was not there) and after."""

    files: dict[Path, tuple[bytes | None, bytes]]


class CaptionEditor:
    """The captions of pictures, by path, as they are now, and the steps that led there. caption_ext: ending
    of new caption files, without or with its dot."""

    def __init__(self, items: Iterable[Item], caption_ext: str, steps: Iterable[_Step] = ()) -> None:
        self._suffix = "." + caption_ext.removeprefix(".")
        self.captions: dict[Path, str] = {}
        self._files: dict[Path, Path] = {}
        self._read: dict[Path, str] = {}  # what each caption file holds, as far as we know
        self.steps = list(steps)
        for item in items:
            self.captions[item.image_path] = item.caption_raw
            file = self._files[item.image_path] = self._file_of(item)
            self._read[file] = item.caption_raw if item.caption_file == file else ""

    def file_of(self, picture: Path) -> Path:
        """Where the caption of a picture is written."""
        return self._files[picture]

    def would_change(self, flags: CaptionFlags) -> dict[Path, str]:
        """Picture -> new caption, of those that the search finds and whose caption would be another."""
        found = ((path, caption) for path, caption in self.captions.items() if flags.concerns(path, caption))
        new = {path: flags.changed(caption) for path, caption in found}
        return {path: caption for path, caption in new.items() if caption != self.captions[path]}

    def write(self, new: Mapping[Path, str]) -> None:
        """Write the captions of pictures as one step. Pictures that share a caption file share the new one.

        Raises ConfigError, before anything is written, for a caption that is too long, and for a file that
        holds another text than was read, or JSON; and where a file cannot be written, which leaves those
        before it written, as a step that can be taken back.
        """
        texts = {self._files[picture]: caption.strip() for picture, caption in new.items()}
        contents = {file: _encoded(text, file) for file, text in texts.items()}
        before = {file: self._checked(file) for file in texts}
        done: dict[Path, tuple[bytes | None, bytes]] = {}
        try:
            for file, content in contents.items():
                _put(file, content)
                done[file] = before[file], content
                self._know(file, content.decode())
        finally:
            if done:
                self.steps.append(_Step(done))

    def undo(self) -> list[Path]:
        """Take the last step back, byte for byte -> the caption files. Raises ConfigError, and changes
        nothing, where one of them was changed since."""
        step = self.steps[-1]
        for file, (_, after) in step.files.items():
            if _bytes_of(file) != after:
                raise ConfigError(f"{printable(file.name)} was changed since; nothing was taken back")
        for file, (before, _) in step.files.items():
            if before is None:
                file.unlink()
            else:
                _put(file, before)
            self._know(file, _text(before or b"", file))
        self.steps.pop()
        return list(step.files)

    def _know(self, file: Path, text: str) -> None:
        self._read[file] = text
        self.captions |= {picture: text for picture, own in self._files.items() if own == file}

    def _checked(self, file: Path) -> bytes | None:
        """What the file holds now, which must be the caption as it was read."""
        found = _bytes_of(file)
        text = _text(found or b"", file)
        if text == self._read[file] and file.suffix.lower() not in TABLE_SUFFIXES:
            return found
        if file.suffix.lower() in TABLE_SUFFIXES or text.startswith(("{", "[")):
            raise ConfigError(f"{printable(file.name)} holds more than a caption: change it in a text editor")
        self._know(file, text)
        raise ConfigError(
            f"{printable(file.name)} was changed since it was read, and is shown anew; nothing was written"
        )

    def _file_of(self, item: Item) -> Path:
        own, picture = item.caption_file, item.image_path
        beside = own is not None and own.parent == picture.parent and normal(own.stem) == normal(picture.stem)
        return own if beside else picture.with_suffix(self._suffix)


def _encoded(text: str, file: Path) -> bytes:
    content = text.encode("utf-8", "replace")  # half a character, as a browser may send it
    if len(content) > MAX_CAPTION_BYTES:
        raise ConfigError(
            f"the caption for {printable(file.name)} has {len(content)} bytes, wanted at most "
            f"{MAX_CAPTION_BYTES}; shorten it"
        )
    return content


def _text(content: bytes, file: Path) -> str:
    try:
        return decode(content)[0].strip()
    except UnicodeError:
        raise ConfigError(f"{printable(file.name)} is in no known encoding; save it as UTF-8") from None


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{printable(file.name)} cannot be read ({error.strerror})") from None


def _put(file: Path, content: bytes) -> None:
    try:
        with whole_file(file) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"{printable(file)} cannot be written ({error.strerror}); check its permissions and the disk"
        ) from None
