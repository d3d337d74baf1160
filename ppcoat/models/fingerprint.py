"""What stands for the contents of a model: a sha256 over every byte of its weights and every setting, so that
one changed number is found.

A tensor counts by its name, shape and bytes. Where it lies does not: a model that was moved, renamed or cut
into other shards has the same fingerprint, and so has a single file with the weights of a folder. Reading
34 GB takes a while, so Fingerprints keeps what it found in a file, beside what the system says of the files
(size, times, inode), and reads again only what has changed by that. `folder_identity` reads pieces only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ppcoat.atomic import is_disk_error, write_text
from ppcoat.errors import ConfigError
from ppcoat.models.tensor_files import (
    Component,
    FilePart,
    TensorInfo,
    in_file_order,
    tensor_infos,
    with_progress,
)
from ppcoat.reading import FileState, json_value, read_json, regular_bytes

THREADS = 4  # hashing does not hold Python's lock
_CHUNK, _PIECE = 1 << 22, 1 << 20  # bytes at a time, and of a sample
_MAX_BYTES = 16 << 20  # of what was found before
_ENTRY = {"files", "sha256"}
# Files of a component folder beside its weights that say how it computes or reads text.
_SETTINGS = (".json", ".txt", ".model")
_CONFIGS = ("config.json", "scheduler_config.json")
# Keys of these that say how it was written.
_OF_WRITER = ("architectures", "dtype", "torch_dtype", "transformers_version")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprints:
    """Those that were found before are in `file` (JSON), which is made where it is not there."""

    file: Path

    def of(self, components: Mapping[str, Component]) -> dict[str, str]:
        """{name: fingerprint, 64 hex digits} of components by name; tensors of any shape and dtype.

        Raises ConfigError for files that cannot be read, as `tensor_infos` does.
        """
        known, found = self._known(), {}
        for name, component in components.items():
            began, before = time.time_ns(), known.get(name)
            states = [(file.name, FileState.of(file)) for file in _files(component)]
            files = [[name, *state] for name, state in states]
            if not (isinstance(before, dict) and before.keys() == _ENTRY and before["files"] == files):
                before = {"files": files, "sha256": _fingerprint(component)}
                if all(state.is_settled(began) for _, state in states):
                    known[name] = before
            found[name] = before["sha256"]
        self._keep(known)
        return found

    def _known(self) -> dict:
        try:
            known = json_value(regular_bytes(self.file, _MAX_BYTES))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self, known: dict) -> None:
        if not known or known == self._known():
            return
        try:
            write_text(self.file, json.dumps(known, indent=1))
        except OSError as error:
            if not is_disk_error(error):
                raise
            _log.warning("%s cannot be written (%s): the model is read again next time", self.file, error)


def folder_identity(*folders: Path, times: bool = False) -> str:
    """sha256 (64 hex digits) of the files in model folders, independent of where the folders are; a file may
    stand for a folder, and its name does not count.

    Hashes each file's name, its size and three pieces of 1 MiB (start, middle, end), so that the 10 GB of
    text encoders need not be read. Files that differ only in other places get the same identity, but with
    `times` only where they were also written at the same moment; `Fingerprints` reads all.
    """
    digest = hashlib.sha256()
    for folder in folders:
        is_file = folder.is_file()
        for path in [folder] if is_file else sorted(path for path in folder.rglob("*") if path.is_file()):
            size, written = path.stat().st_size, path.stat().st_mtime_ns
            name = "" if is_file else f"{folder.name}/{path.relative_to(folder).as_posix()}"
            digest.update((f"{name} {size} {written}\n" if times else f"{name} {size}\n").encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, size - _PIECE):
                    file.seek(max(0, start))
                    digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _fingerprint(component: Component) -> str:
    infos, whole = _tensors(component), hashlib.sha256()
    for name, content in _settings(component):
        whole.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    pool = ThreadPoolExecutor(THREADS)
    try:
        # map takes all at once: the progress is that of what comes out
        found = pool.map(_digest, [info for _, info in in_file_order(infos)])
        digests = {name: next(found) for name, _ in with_progress(infos, "checking")}
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl+C does not wait for the rest
    for name, info in sorted(infos.items()):
        what = info.shape, info.dtype, info.stored, info.scale, info.torch_layout
        whole.update(f"{name} {what} {digests[name]}\n".encode())
    return whole.hexdigest()


def _tensors(component: Component) -> dict[str, TensorInfo]:
    """Those of a component; none of a tokenizer."""
    if isinstance(component, FilePart) or any(Path(component).glob("*.safetensors*")):
        return tensor_infos(component)
    return {}


def _files(component: Component) -> list[Path]:
    """All files that a fingerprint is made of."""
    own = [] if isinstance(component, FilePart) else _beside(Path(component))
    return sorted({*own, *(info.file for info in _tensors(component).values())})


def _beside(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in _SETTINGS and not file.name.startswith(".") and file.is_file()
    )


def _settings(component: Component) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what is no tensor; of a config only what computes."""
    if isinstance(component, FilePart):
        yield _CONFIGS[0], _of_config(component.config)
        return
    for file in _beside(Path(component)):
        if file.name in _CONFIGS:
            yield file.name, _of_config(read_json(file))
        elif not file.name.endswith(".index.json"):
            yield file.name, file.read_bytes()


def _of_config(config: dict) -> bytes:
    plain = {key: value for key, value in config.items() if key[:1] != "_" and key not in _OF_WRITER}
    return json.dumps(plain, sort_keys=True).encode()


def _digest(info: TensorInfo) -> str:
    """sha256 of a tensor's bytes, any shape and dtype, in the order of its rows."""
    digest, count = hashlib.sha256(), info.shape[0] if info.shape else 1
    info = info if info.shape else info._replace(shape=[1])
    with open(info.file, "rb", buffering=0) as file:
        for first, last in ((info.first_row, count), (0, info.first_row)):
            begin, end = (info.rows(row, row).start for row in (first, last))
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(_CHUNK, end - begin))
                if not chunk:
                    raise ConfigError(f"{info.file} was cut off while it was read: fetch it again")
                digest.update(chunk)
                begin += len(chunk)
    return digest.hexdigest()
