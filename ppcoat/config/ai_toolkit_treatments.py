"""What may become of a key of ai-toolkit: honoured, read, warned about, refused, or idle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppcoat.config.ai_toolkit_values import Reader


@dataclass(frozen=True)
class Honour:
    """Taken as it is, under the name `to` in our schema ("": its own). null: None, an empty list and an empty
    text stand for the default."""

    to: str = ""
    null: bool = False


@dataclass(frozen=True)
class Read:
    """Taken in another form, see ai_toolkit_values.py. to: the setting that it is another spelling of."""

    read: Reader
    to: str = ""


@dataclass(frozen=True)
class Warn:
    """Accepted with a warning that says why it makes no difference here; values in `silent` need none: those
    that ask for nothing, and what ai-toolkit's web interface always writes."""

    why: str
    silent: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Refuse:
    """An error, because leaving it out would change the result; values in `neutral` ask for nothing."""

    advice: str
    neutral: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Idle:
    """Accepted in silence: it says something only where the key `switch` is on, which is dealt with there."""

    switch: str


Treatment = Honour | Read | Warn | Refuse | Idle
