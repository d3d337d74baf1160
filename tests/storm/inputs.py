"""What an input of the storm of reading is, and the damages that all kinds share.

    KINDS["adapters"][i](rng, folder) -> Input, whose files lie in `folder`

A mutator states what is right where it can be known: the exit status, and what a success prints. The rest
must end in a success or in one line. The kinds are in read_*.py.
"""

import json
import os
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIGS = Path(__file__).parents[2] / "configs"
TINY_FLUX = Path(__file__).parents[2] / "ppcoat" / "assets" / "tiny_flux"
RIGHT, REFUSED = frozenset({0}), frozenset({2})
EITHER = RIGHT | REFUSED


@dataclass(frozen=True)
class Input:
    """argv: of `command`, which is in COMMANDS or a stand-in. told: what was done, for messages. statuses:
    exit statuses that are right. calm: arguments whose status and output are this input's, too; may_refuse:
    unless it is refused. outputs: what a success may print; both without the names of folders."""

    told: str
    command: str
    argv: list[str]
    statuses: frozenset[int] = EITHER
    calm: list[str] | None = None
    outputs: Collection[str] | None = None
    may_refuse: bool = False


Mutator = Callable[[random.Random, Path], Input]
KINDS: dict[str, list[Mutator]] = {}


def of_kind(kind: str):
    def put(mutator: Mutator) -> Mutator:
        KINDS.setdefault(kind, []).append(mutator)
        return mutator

    return put


DIGITS, DEEP, OBJECTS = "@digits@", "@deep@", "@objects@"
ODD = [None, True, False, -1, 0, 1, 7, 1.5, -1e-30, 1e308, 2**31, 2**63, 2**64, 10**30,
    float("nan"), float("inf"), "", " ", "x", "-1", "1e999", "nan", "\0", "\ud800", "../../x",
    "/dev/zero", "x" * 100_000, "漢" * 300, [], [[]], [None], {}, {"a": {"a": 1}}, [0] * 3000,
    DIGITS, DEEP, OBJECTS]  # fmt: skip


def as_json(value) -> bytes:
    """JSON, also of what Python's own writer would not write: integers of 5,000 digits, 100,000 brackets."""
    text = json.dumps(value)
    for mark, raw in ((DIGITS, "9" * 5000), (DEEP, "[" * 10**5 + "]" * 10**5), (OBJECTS, '{"a":' * 3000)):
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a value of JSON."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in pairs for each in [(*path, key), *places(inner, (*path, key))]]


def replaced(rng: random.Random, value, odd=None):
    """A copy in which one place holds an odd value or is gone -> it, and what was done."""
    value = json.loads(json.dumps(value))
    path = rng.choice(places(value))
    here = value
    for part in path[:-1]:
        here = here[part]
    name = "/".join(map(str, path))
    if odd is None and rng.random() < 0.1:
        del here[path[-1]]
        return value, f"without {name}"
    odd = rng.choice(ODD) if odd is None else odd
    here[path[-1]] = odd
    return value, f"{name} = {str(odd)[:30]!r}"


def damaged(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Bytes as disks and downloads leave them."""
    place, what = rng.randrange(max(1, len(content))), rng.randrange(8) if content else 1
    if what == 0:
        return content[:place], f"cut at {place}"
    if what == 1:
        return b"", "empty"
    if what == 2:
        return content + rng.randbytes(rng.randrange(1, 50)), "bytes added"
    if what == 3:
        return bytes(len(content)), "zeros"
    if what == 4:
        return rng.randbytes(min(len(content), 4000)), "random bytes"
    if what == 5:
        return content[place:] + content[:place], f"turned by {place}"
    many = bytearray(content)
    for _ in range(1 if what == 6 else 20):
        many[rng.randrange(len(many))] ^= 1 << rng.randrange(8)
    return bytes(many), "bits flipped"


def no_file(rng: random.Random, path: Path) -> str:
    """Something in the place of a file that is none, or that never ends."""
    what = rng.choice(["fifo", "folder", "loop", "nowhere", "zero", "random"])
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "nowhere": "nothing"}.get(what, f"/dev/{what}"))
    return f"{path.name} is a {what}"
