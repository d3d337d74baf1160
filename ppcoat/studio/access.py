"""Which files the page may read and write: those below the folders that it was started with, and no others.

Each path that comes from the page goes through `Roots.inside`, which follows links before it compares, so
that neither .. nor a link leads out. What is uploaded is checked by what it is, not by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ppcoat.atomic import whole_file
from ppcoat.config.flags import built_in_model
from ppcoat.errors import ConfigError, printable

UPLOADS = "studio_uploads"  # below the first root
_HEADER_BYTES = 100 << 20  # safetensors' own limit of its JSON
_LONGEST_NAME = 120
# First bytes -> endings of the pictures that are read here; RIFF is also sound and film, WEBP follows.
_PICTURES = {b"\x89PNG\r\n\x1a\n": (".png",), b"\xff\xd8\xff": (".jpg", ".jpeg"), b"RIFF": (".webp",)}


class Roots:
    """The folders of the page. Raises ConfigError for one that is not there."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        for folder in folders:
            if not Path(folder).is_dir():
                raise ConfigError(f"--root: came {printable(folder)}, wanted a folder that is there")
        self.folders = tuple(dict.fromkeys(Path(folder).resolve() for folder in folders))

    def inside(self, text: str | Path) -> Path:
        """The absolute path, links followed, of what the page names; a relative one is meant from the first
        root. It need not be there. Raises ConfigError for one outside of all roots."""
        named = str(text).strip()
        if not named:
            raise ConfigError("no path was given; choose a file or folder")
        try:
            path = (self.folders[0] / Path(named).expanduser()).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte; a circle of links; ~nobody
            raise ConfigError(f"{printable(named)[:200]} is no path ({error}); choose another") from None
        if not any(path.is_relative_to(root) for root in self.folders):
            shown = ", ".join(map(printable, self.folders))
            raise ConfigError(
                f"{printable(named)} lies outside of the studio's folders ({shown}); start it with --root to "
                "open another"
            )
        return path

    def argument(self, text: str) -> str:
        """What the page names, as an argument of a command that starts in the first root. Raises ConfigError
        as `inside` does."""
        shown = self.shown(self.inside(text))
        return f"./{shown}" if shown.startswith("-") else shown  # it is no flag

    def model_argument(self, text: str) -> str:
        """The same for a model: the built-in one keeps its name."""
        text = text.strip()
        return text if built_in_model(text) != text else self.argument(text)

    def model(self, text: str) -> Path:
        """As `inside`, for a model: the built-in one may be named, too."""
        built_in = built_in_model(text.strip())
        return Path(built_in) if built_in != text.strip() else self.inside(text)

    def holds(self, path: Path) -> bool:
        """Whether a file or folder that was found lies inside, links followed."""
        try:
            self.inside(path)
        except ConfigError:
            return False
        return True

    def shown(self, path: Path) -> str:
        """A path as the page shows it and takes it back: from the first root where it lies there."""
        first = self.folders[0]
        return str(path.relative_to(first)) if path.is_relative_to(first) else str(path)

    def listing(self, folder: Path, endings: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
        """Folders, and files of these endings, directly inside `folder`, by name; left out are hidden ones,
        links that lead out, and names that are no text. Raises ConfigError for one that cannot be read."""
        try:
            found = sorted(folder.iterdir(), key=lambda path: path.name.lower())
            found = [path for path in found if not path.name.startswith(".") and self.holds(path)]
            found = [path for path in found if is_text(path.name)]
            folders = [path for path in found if path.is_dir()]
        except OSError as error:
            raise ConfigError(f"{printable(folder)} cannot be read ({error.strerror})") from None
        return folders, [path for path in found if path.suffix.lower() in endings and path.is_file()]

    def store(self, name: str, content: bytes | Path, kind: str) -> Path:
        """Write an upload below the first root -> its path. content: its bytes, or a file that holds them.
        kind: "lora" or "picture", to which its content and ending are held. A name that is taken gets a
        number. Raises ConfigError for content of another kind."""
        name = _safe_name(name)
        start = _first_bytes(content)
        suffix = Path(name).suffix.lower()
        if kind == "lora" and not (suffix == ".safetensors" and _is_safetensors(start, content)):
            raise ConfigError(f"{name} is no safetensors file; choose a LoRA file (.safetensors)")
        if kind == "picture" and suffix not in _endings(start):
            raise ConfigError(f"{name} is no JPEG, PNG or WebP; choose a picture")
        folder = self.inside(self.folders[0] / UPLOADS)
        goal, number = folder / name, 2
        while goal.exists():
            goal, number = folder / f"{Path(name).stem}_{number}{suffix}", number + 1
        with whole_file(goal) as draft:
            if isinstance(content, Path):
                with open(content, "rb") as source, open(draft, "wb") as target:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)
            else:
                draft.write_bytes(content)
        return goal


def is_text(name: str) -> bool:
    """Whether a name can be sent to a browser: Linux allows any bytes."""
    return not any(0xD800 <= ord(mark) <= 0xDFFF for mark in name)


def _safe_name(name: str) -> str:
    """The last part of a name, with letters of any script, digits, dots, - and _ alone."""
    last = re.split(r"[/\\]", name)[-1]
    stem, dot, ending = re.sub(r"[^\w.-]+", "_", last).rpartition(".")
    return f"{(stem.strip('.') or 'upload')[:_LONGEST_NAME]}{dot}{ending[:20]}"


def _first_bytes(content: bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content[:16]
    with open(content, "rb") as file:
        return file.read(16)


def _endings(start: bytes) -> tuple[str, ...]:
    found = next((endings for first, endings in _PICTURES.items() if start.startswith(first)), ())
    return () if found == (".webp",) and start[8:12] != b"WEBP" else found


def _is_safetensors(start: bytes, content: bytes | Path) -> bool:
    """Whether there is the length of a JSON object, and that object."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 10 or length > _HEADER_BYTES or start[8:9] != b"{":
        return False
    if isinstance(content, Path):
        with open(content, "rb") as file:
            head = file.read(8 + length)[8:]
    else:
        head = content[8 : 8 + length]
    try:
        return len(head) == length and isinstance(json.loads(head), dict)
    except (ValueError, RecursionError):
        return False
