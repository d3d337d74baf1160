"""A folder by which the first rank hands files to the others; it is gone when they have read them."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppcoat.train.ranks import Ranks

_NAME = re.compile(r"^handover-[0-9a-f]{13}$")


@contextmanager
def handover_folder(parent: Path, ranks: Ranks) -> Iterator[Path | None]:
    """Within it, all ranks have the path of one folder in `parent`, which nobody has used before; None where
    there is one rank only.

    The folder is not made here, and is removed when all ranks have left the block. A rank whose machine does
    not share `parent` gets the same path and sees only what it writes there itself. What killed runs left in
    `parent` is removed at the start.
    """
    # a name of 52 random bits, which a float64 carries: an entry of a killed run can never be taken for ours
    token = int(ranks.gather([secrets.randbits(52)])[0, 0])
    folder = parent / f"handover-{token:013x}"
    for path in parent.iterdir() if parent.is_dir() else ():
        if _NAME.match(path.name) and path != folder:
            shutil.rmtree(path, ignore_errors=True)  # other ranks of this machine do the same
    try:
        yield folder if ranks.size > 1 else None
        ranks.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
