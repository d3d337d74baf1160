"""YAML or JSON file + `a.b=c` overrides -> validated RunConfig, and back to YAML.

A file has our own short form (sections at the left margin) or ai-toolkit's (job, config, process), see
ai_toolkit.py.

The YAML is a safe subset: scalars, lists and mappings. Numbers follow YAML 1.2 and `1e-4` is one (stock
PyYAML reads it as text); duplicate keys, tags and aliases are refused. `${NAME}` is an environment variable
(`$${` is a literal `${`) and `[name]` in any text is the name of the run. Every mistake becomes one line that
says where, what came and what was wanted.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ppcoat.config.ai_toolkit import drop_other_spellings, is_nested, translate, unnest, without_nesting
from ppcoat.config.explain import Location, Origins, settings_error
from ppcoat.config.schema import RunConfig, Section
from ppcoat.errors import ConfigError, check_whole, printable
from ppcoat.reading import MAX_LEVELS, TOO_DEEP, regular_bytes

MAX_CONFIG_BYTES, MAX_NODES = 1 << 20, 30_000
YAML_ENDINGS, JSON_ENDINGS = (".yaml", ".yml"), (".json", ".jsonc")
# sections that may be left out, or have no key: all of them commented out
OPTIONAL_SECTIONS = {
    name for name, field in RunConfig.model_fields.items() if isinstance(field.default, Section)
}
BACKSLASH = "a path with backslashes wants single quotes, or forward slashes"
# texts, comments and tabs of JSON
_JSON_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|\t', re.DOTALL)
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read and check a run's settings.

    path: a YAML or JSON file. overrides: "section.key=value" texts, applied in order, the value read as YAML;
    list entries by number ("datasets.0.folder_path=photos"). Relative paths stay relative to the
    current folder. In ai-toolkit's form an override may have or leave out the leading "config.process.0.".
    Logs one warning per key of ai-toolkit that makes no difference here. Raises ConfigError, one line, naming
    file and line (or the override), the key, what came and what was wanted; an unknown key is answered with
    the nearest known one.
    """
    text = read_config_text(Path(path), (*YAML_ENDINGS, *JSON_ENDINGS))
    return config_of_text(
        _as_yaml(text) if Path(path).suffix.lower() in JSON_ENDINGS else text, str(path), overrides
    )


def config_of_text(text: str, path: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The same from the text of a YAML file. path: what messages call it."""
    root = _parse(text, path)
    data = {} if root is None else _to_data(root, path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}:1: came a single value or list, wanted sections such as 'model:' and 'train:'"
        )
    origins = Origins(path, root)
    nested = is_nested(data)
    if nested:
        data = unnest(data, origins)
    for override in overrides:
        location = apply_override(data, override, nested)
        drop_other_spellings(data, location)
        origins.overrides[location] = override
    data = {key: value for key, value in data.items() if value is not None or key not in OPTIONAL_SECTIONS}
    data = translate(_fill_in_name(data, data.get("name")), nested, origins)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise settings_error(error, origins) from None


def dump_config(config: RunConfig) -> str:
    """The complete settings as YAML text that load_config reads back to an equal RunConfig."""
    return dump_data(config.model_dump(mode="json"))


def dump_data(data: dict) -> str:
    """Sections with keys as YAML text that load_config reads back."""
    return yaml.dump(data, Dumper=_ConfigDumper, sort_keys=False, allow_unicode=True, width=110)


def value_of_text(text: str) -> Any:
    """One value as it may stand in a config: a number, a list in brackets, true, a text. Raises ConfigError
    for what is not YAML."""
    node = _parse(text, "the value")
    return None if node is None else _to_data(node, "the value")


def read_config_text(path: Path, endings: tuple[str, ...]) -> str:
    """The text of a config file, UTF-8 with or without a byte order mark. endings: allowed, with their dot,
    in small letters; the file's may have capitals.

    Raises ConfigError for another ending, and for one that is not there, no regular file, larger than
    MAX_CONFIG_BYTES or not UTF-8.
    """
    if path.suffix.lower() not in endings:
        raise ConfigError(
            f"config file {path}: came the ending '{path.suffix}', wanted {' or '.join(endings)}; rename it, "
            "or check the path"
        )
    try:
        raw = regular_bytes(path, MAX_CONFIG_BYTES)
        text = raw.decode("utf-8-sig")
        if "\0" in text[:4]:  # UTF-16 of plain letters, without its mark
            raise UnicodeDecodeError("utf-8", raw, 0, 1, "a zero")
        return text
    except OSError as error:
        advice = "is this the right file?" if error.errno == errno.EFBIG else "check the path"
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; {advice}") from None
    except UnicodeDecodeError as error:
        utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]
        line = raw[: error.start].count(b"\n") + 1
        what = 'it is UTF-16 (Windows\' "Unicode")' if utf16 else f"line {line} is not UTF-8"
        raise ConfigError(
            f'config file {path}: {what}; save it as UTF-8: in the editor\'s "Save as", encoding UTF-8'
        ) from None


class _ConfigLoader(yaml.SafeLoader):
    """SafeLoader with our number rules, without tags, aliases and duplicate keys."""

    yaml_implicit_resolvers: dict = {}  # ours alone; filled below
    levels = nodes = 0  # around the node that is read, and read so far

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.nodes += 1
        if self.levels > MAX_LEVELS or self.nodes > MAX_NODES:
            what = TOO_DEEP if self.levels > MAX_LEVELS else f"more than {MAX_NODES} keys and values"
            raise ConfigError(f"{_line(self.name, event)}: {what}; wanted sections with keys")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(
                f"{_line(self.name, event)}: came a YAML alias or anchor, wanted the value written out"
            )
        if getattr(event, "tag", None):
            raise ConfigError(
                f"{_line(self.name, event)}: came the YAML tag {event.tag}, wanted a plain value"
            )
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        # before the type is resolved, so that `lr: ${LR}` is a number and a variable can never add structure
        event = self.peek_event()
        check_whole(_line(self.name, event), event.value)  # an escape: "\\ud800"
        event.value = _expand_variables(event.value, _line(self.name, event))
        return super().compose_scalar_node(anchor)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{_line(self.name, key)}: came a list or section as a key, wanted a word")
            if key.value in seen:
                raise ConfigError(f"{_line(self.name, key)}: the key '{key.value}' stands twice; remove one")
            seen.add(key.value)
        return node


class _ConfigDumper(yaml.SafeDumper):
    """Quotes whatever _ConfigLoader would not read back as text."""

    yaml_implicit_resolvers = _ConfigLoader.yaml_implicit_resolvers


_ConfigDumper.add_representer(str, lambda dumper, text: dumper.represent_str(text.replace("${", "$${")))
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "bool",
        r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
        list("tTfFyYnNoO"),
    ),
    # no octal, no base 60, no underscores; longer numbers become floats, which a whole-number key refuses
    ("int", r"[-+]?(0|[1-9][0-9]{0,18})", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _ConfigLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse(text: str, source: str) -> yaml.Node | None:
    try:
        loader = _ConfigLoader(text)
        loader.name = source
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        advice = (
            BACKSLASH
            if "escape" in str(error.problem)
            else _advice(text.splitlines()[max(0, line - 2) : line])
        )
        problem = str(error.problem).replace("\t", "\\t")
        raise ConfigError(f"{source}:{line}: this is not YAML: {problem}; {advice}") from None
    except yaml.YAMLError as error:  # an unprintable character: no mark, several lines
        raise ConfigError(f"{source}: this is not YAML: {' '.join(str(error).split())}; remove it") from None


def _advice(lines: list[str]) -> str:
    """What to look for in a line that is not YAML, and in the one before it, where the mistake may be."""
    near = "\n".join(lines)
    odd = next((mark for mark in near if not mark.isascii() and (mark.isspace() or mark in "：，“”‘’")), None)
    if odd is not None:
        return f"there is {odd!r}, a mark that only looks like one of YAML's: type it anew"
    if re.search(r"(?m)^ *\t", near):
        return "there is a tab: indent with spaces"
    if re.search(r"(?m)^[^#:]*\w:[^\s/\\]", near):
        return "a key wants a colon and a space before its value"
    if re.search(r":\s+[@%`*&!|>]", near):
        return "put the value in single quotes"
    return "check the indentation, colons, quotes and brackets there and in the line before"


def _as_yaml(text: str) -> str:
    """JSON as the YAML that it nearly is, line by line: without comments and tabs, and with texts whose
    escapes mean the same in both."""

    def part(match: re.Match) -> str:
        found = match.group()
        if not found.startswith('"'):
            return "\n" * found.count("\n") or " "
        try:
            return json.dumps(json.loads(found), ensure_ascii=False)
        except ValueError:
            return found  # YAML says what is wrong

    return _JSON_PARTS.sub(part, text)


def _to_data(node: yaml.Node, source: str) -> Any:
    """Node -> dict, list or scalar; mapping keys become text."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _to_data(value, source) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_to_data(value, source) for value in node.value]
    return _ConfigLoader("").construct_object(node)


def _line(source: str, event_or_node: yaml.Event | yaml.Node) -> str:
    is_one = source.startswith("--set ")
    return source if is_one else f"{source}:{event_or_node.start_mark.line + 1}"


def _expand_variables(text: str, where: str) -> str:
    def value_of(match: re.Match) -> str:
        if match.group(0) == "$${":
            return "${"
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"{where}: the environment variable ${{{name}}} is not set; export it or write its value"
            )
        return os.environ[name]

    return _VARIABLE.sub(value_of, text)


def _fill_in_name(value: Any, name: Any) -> Any:
    """Replace `[name]` in every text, as ai-toolkit does."""
    if isinstance(value, dict):
        return {key: _fill_in_name(inner, name) if key != "name" else inner for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill_in_name(inner, name) for inner in value]
    return value.replace("[name]", name) if isinstance(value, str) and isinstance(name, str) else value


def apply_override(data: dict, override: str, nested: bool = False) -> Location:
    """Put one "a.b=c" into data; returns its location ("a", "b"). nested: the file has ai-toolkit's form.
    Raises ConfigError for what is not of this form or leads nowhere."""
    source = f"--set {printable(override)}"
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"{source}: wanted section.key=value, for example train.steps=50")
    node = _parse(text, source)
    value = None if node is None else _to_data(node, source)
    dotted = without_nesting(dotted.strip()) if nested else dotted.strip()
    parts = [int(part) if part.isdecimal() and len(part) < 10 else part for part in dotted.split(".")]
    if len(parts) > MAX_LEVELS:
        raise ConfigError(f"{source}: {TOO_DEEP}; wanted section.key=value")
    here: Any = data
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        _check_step(here, part, source)
        new = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(here, list) and part == len(here):
            here.append(new)
        elif following is None or (isinstance(here, dict) and here.get(part) is None):
            here[part] = new
        here = here[part]
    return tuple(parts)


def _check_step(here: Any, part: str | int, source: str) -> None:
    """Refuse an override that goes through a plain value, a missing list entry or a list entry by name."""
    if isinstance(here, list):
        if not isinstance(part, int) or part > len(here):
            raise ConfigError(
                f"{source}: came '{part}' for a list of {len(here)} entries, wanted a number below that"
            )
    elif not isinstance(here, dict) or isinstance(part, int):
        raise ConfigError(f"{source}: '{part}' does not lead to a setting; wanted section.key=value")
