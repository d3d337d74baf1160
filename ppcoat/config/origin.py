"""Where the settings of a run were written: line of the file or override, and the name they have there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import yaml

Location = tuple[str | int, ...]  # keys and list numbers from the outermost section inwards
_Value = TypeVar("_Value")


@dataclass
class Origins:
    """The way back from a setting to the place where its user wrote it.

    path and root: the file and its YAML node. moved: location without ai-toolkit's nesting -> location in the
    file. overrides: location -> the override that set it. spelled: location in our schema -> location as
    written. In all three the longest known beginning of a location counts.
    """

    path: str
    root: yaml.Node | None
    moved: dict[Location, Location] = field(default_factory=dict)
    overrides: dict[Location, str] = field(default_factory=dict)
    spelled: dict[Location, Location] = field(default_factory=dict)

    def as_written(self, location: Location) -> Location:
        """The user's name of a setting of our schema."""
        start, spelling = _longest_start(self.spelled, location, ())
        return spelling + location[len(start) :]

    def where(self, location: Location) -> str:
        """Override, or file and line, of a setting under the user's name."""
        start, override = _longest_start(self.overrides, location, None)
        if override is not None:
            return f"--set {override}"
        start, place = _longest_start(self.moved, location, ())
        return f"{self.path}:{line_of(self.root, place + location[len(start) :])}"


def dotted(location: Location) -> str:
    """("datasets", 0, "resolution") -> "datasets.0.resolution"."""
    return ".".join(map(str, location))


def line_of(root: yaml.Node | None, location: Location) -> int:
    """Line number (from 1) of the deepest node on the way to location that the file has."""
    line, node = 1, root
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _longest_start(
    table: dict[Location, _Value], location: Location, default: _Value
) -> tuple[Location, _Value]:
    for end in range(len(location), -1, -1):
        if location[:end] in table:
            return location[:end], table[location[:end]]
    return (), default
