"""Flags from the fields of a dataclass: how each kind is read, and the way back into the dataclass."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ppcoat.config.flags import TINY_FLUX, add_flags, arguments_of, flag, from_flags, set_flag
from ppcoat.errors import ConfigError


@dataclass(frozen=True)
class Case:
    file: Path = flag("what to read", positional=True, metavar="IN")
    count: int = flag("how many, 100% of them")
    kind: Literal["a", "b"] | None = flag("one of two", None)
    size: str = flag("size", "m", "shirt", choices=("s", "m"))
    seeds: list[int] = flag("seeds", [0, 1])
    again: bool = flag("once more", False)
    overrides: list[str] = set_flag()
    skip: int = flag("how many are left out", 0)
    model: str = flag("a model", TINY_FLUX)
    inner: int = 7


def parse(*given, names=()):
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, Case, *names)
    return parser, parser.parse_args(given)


def test_each_kind_of_field_is_read_as_its_type_says():
    given = "x.txt --count 3 --kind b --shirt s --seeds 4 5 --again --set a=1 --set b=2"
    case = from_flags(Case, parse(*given.split())[1])
    assert case == Case(Path("x.txt"), 3, "b", "s", [4, 5], True, ["a=1", "b=2"])


@pytest.mark.parametrize(
    "case",
    [
        Case(Path("x.txt"), 3),
        Case(Path("-x.txt"), 3, "b", "s", [4, 5], True, ["a=1", "b=-2"]),
        Case(Path("a b"), -3, None, "m", [7]),
    ],
)
def test_flags_become_the_arguments_that_are_read_as_them(case):
    assert from_flags(Case, parse(*arguments_of(case))[1]) == case
    assert len(arguments_of(Case(Path("x"), 1))) == 2


def test_defaults_are_those_of_the_fields_and_lists_are_not_shared():
    first, second = (from_flags(Case, parse("x.txt", "--count", "3")[1]) for _ in range(2))
    assert first == second == Case(Path("x.txt"), 3)
    first.overrides.append("a=1")
    assert second.overrides == Case(Path("x.txt"), 3).overrides == []


def test_fields_without_a_flag_keep_their_defaults_and_others_count_instead():
    _, arguments = parse("--count", "3", names=("count",))
    assert from_flags(Case, arguments, file="y", inner=8) == Case("y", 3, inner=8)


def test_the_help_tells_names_and_defaults():
    text = parse("x", "--count", "1")[0].format_help()
    assert "--count COUNT" in text and "how many, 100% of them" in text and "{s,m}" in text and "IN " in text
    for default in ("m", "0 1", "0", "tiny_flux"):
        assert f"(default: {default})" in text
    assert text.count("(default:") == 4, "none, false and an empty list are not told"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--count 1", "the following arguments are required: IN"),
        ("x", "the following arguments are required: --count"),
        ("x --count one", "argument --count: invalid int value: 'one'"),
        ("x --count 1 --kind c", "argument --kind: invalid choice"),
        ("x --count 1 --seeds", "argument --seeds: expected at least one argument"),
    ],
)
def test_wrong_flags_are_refused(given, words, capsys):
    with pytest.raises(SystemExit):
        parse(*given.split())
    assert words in capsys.readouterr().err


@dataclass(frozen=True)
class _Files:
    model: str = flag("a model", "")
    base: Path | None = flag("another model", None)
    lora: list[str] = flag("files", [])
    output: str | None = flag("results", None)


def _files(*given):
    parser = argparse.ArgumentParser()
    add_flags(parser, _Files)
    return from_flags(_Files, parser.parse_args(given))


def test_home_and_the_built_in_model_are_found_in_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    flags = _files("--model=tiny_flux", "--base=tiny_flux", "--lora", "~/a", "b~/c")
    assert (flags.model, flags.base, flags.lora) == (TINY_FLUX, Path(TINY_FLUX), ["/home/me/a", "b~/c"])
    assert _files("--base=~/a").base == Path("/home/me/a")
    (tmp_path / "tiny_flux").mkdir()
    assert _files("--model=tiny_flux").model == "tiny_flux"


def test_results_that_could_not_be_written_are_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; name another folder"):
        _files("--output", str(tmp_path / "file" / "x.json"))
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        _files("--output", str(tmp_path))
    _files("--output", str(tmp_path / "new" / "x.json"))
    assert not (tmp_path / "new").exists()
