"""`import ppcoat`: its names, FLUX made known to ppdiffusers, and commands that import what they need."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import ppdiffusers
import pytest

import ppcoat

ROOT = Path(__file__).parents[1]
# A package that ends the process when it is imported.
REFUSES = "raise SystemExit('{name} was imported')"
MISSING = "raise ModuleNotFoundError(\"No module named 'ppdiffusers'\", name='ppdiffusers')"


@pytest.fixture
def python(tmp_path):
    """python(arguments, name=source) -> the finished process, in which packages of these names are that."""

    def call(*arguments, **packages):
        for name, source in packages.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(source, encoding="utf-8")
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            check=False,
        )

    return call


def test_every_name_is_the_same_for_programs_and_for_type_checkers():
    tree = ast.parse((ROOT / "ppcoat" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))
    typed = {(node.module.removeprefix("ppcoat."), alias.name) for node in block.body for alias in node.names}
    assert typed == {(module, name) for module, names in ppcoat._HOMES.items() for name in names}
    assert {name for _, name in typed} == set(ppcoat.__all__)


@pytest.mark.parametrize("name", ppcoat.__all__)
def test_a_name_is_imported_when_it_is_asked_for(name, monkeypatch):
    monkeypatch.delitem(vars(ppcoat), name, raising=False)
    assert name in dir(ppcoat)
    assert getattr(ppcoat, name).__name__ == name
    assert name in vars(ppcoat)  # the next time it is an attribute as any other


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'ppcoat' has no attribute 'FluxPipelin'"):
        ppcoat.FluxPipelin  # noqa: B018


def test_importing_it_makes_flux_known_to_ppdiffusers():
    """This process is no command, and imported it in tests/conftest.py."""
    assert ppdiffusers.FluxPipeline is ppcoat.FluxPipeline
    assert ppdiffusers.FluxTransformer2DModel is ppcoat.FluxTransformer2DModel
    assert hasattr(ppdiffusers.DiffusionPipeline.from_pretrained, "reads_flux_folders")


def test_help_imports_neither_paddle_nor_pydantic(python):
    refused = {name: REFUSES.format(name=name) for name in ("paddle", "ppdiffusers", "pydantic", "numpy")}
    done = python("-m", "ppcoat", "--help", **refused)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m ppcoat <command>")


HELP = """
import contextlib, io
from ppcoat.cli.main import COMMANDS, main
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    assert text.getvalue().startswith(f"usage: python -m ppcoat {name}"), name
"""


def test_help_and_flags_of_all_commands_do_not_import_paddle(python):
    refused = {name: REFUSES.format(name=name) for name in ("paddle", "ppdiffusers", "paddlenlp")}
    done = python("-c", HELP, **refused)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command", [["-m", "ppcoat", "plan"], [str(ROOT / "train_scripts" / "train_flux_lora.py")]]
)
def test_a_wrong_config_is_told_before_paddle_is_imported(command, python, tmp_path):
    file = tmp_path / "run" / "run.yaml"
    file.parent.mkdir()
    file.write_text("model: {name_or_path: m}\ndatasets: [{folder_path: d}]\ntrain: {stpes: 3}\n")
    done = python(*command, str(file), paddle=REFUSES.format(name="paddle"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"{file}:3: unknown key 'train.stpes'; the nearest known key is 'train.steps'" in done.stderr
    assert list(file.parent.iterdir()) == [file]  # nothing was written


def test_a_lora_file_is_inspected_without_the_models(python):
    file = ROOT / "tests" / "fixtures" / "adapters" / "split_bare.safetensors"
    done = python("-m", "ppcoat", "inspect", str(file), ppdiffusers=REFUSES.format(name="ppdiffusers"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "delta-W" in done.stdout


def test_to_import_it_imports_neither_paddle_nor_ppdiffusers(python):
    refused = {name: REFUSES.format(name=name) for name in ("paddle", "ppdiffusers", "paddlenlp")}
    assert python("-c", "import ppcoat", **refused).returncode == 0


@pytest.mark.parametrize(
    "first",
    [
        "import ppcoat, ppdiffusers",
        "import ppdiffusers, ppcoat",
        "import ppcoat, importlib.util\nimportlib.util.find_spec('ppdiffusers')\nimport ppdiffusers",
    ],
)
def test_ppdiffusers_is_told_of_flux_whichever_is_imported_first(first, python):
    """A stand-in for ppdiffusers, which takes seconds; it has a FLUX class of its own."""
    source = "class DiffusionPipeline:\n    @classmethod\n    def from_pretrained(cls, name): ...\n"
    source += "FluxFillPipeline = 'theirs'"
    check = "assert hasattr(ppdiffusers.DiffusionPipeline.from_pretrained, 'reads_flux_folders')\n"
    check += "print(ppdiffusers.FluxFillPipeline, hasattr(ppdiffusers, 'Nothing'))"
    done = python("-c", f"{first}\n{check}", ppdiffusers=source)
    assert (done.stdout, done.stderr) == ("theirs False\n", "")


@pytest.mark.parametrize(
    "arguments", [["-c", "import ppcoat\nppcoat.FluxPipeline"], ["-m", "ppcoat", "train", "x.yaml"]]
)
def test_a_package_that_is_missing_is_told_with_what_to_do(arguments, python):
    """pydantic and ppdiffusers are what a command on a config and a program want first."""
    done = python(*arguments, **dict.fromkeys(("paddle", "ppdiffusers", "pydantic"), MISSING))
    last = done.stderr.splitlines()[-1]
    assert "No module named 'ppdiffusers': ppcoat needs paddlepaddle or paddlepaddle-gpu" in last
    assert "requirements.txt" in last
    if arguments[0] == "-m":
        assert done.returncode == 2 and done.stderr.count("\n") == 1
