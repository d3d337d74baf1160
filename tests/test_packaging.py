"""What `pip install .` brings along: every room, the configs, what is needed to run, the command."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ppcoat
from ppcoat.bench.flags import CONFIG
from ppcoat.config.load import load_config

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_room_is_packaged_and_the_configs_too():
    rooms = {".".join(file.relative_to(ROOT).parts[:-1]) for file in (ROOT / "ppcoat").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == rooms | {"ppcoat.configs"}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"ppcoat.configs": "configs"}


def test_dependencies_are_those_of_requirements_txt():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    needed = {line for line in lines if re.match("[a-z]", line)}
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    assert needed == {*project["dependencies"], *extras["test"], *extras["studio"]}


def test_the_extras_are_what_the_makefile_and_the_docs_name():
    extras = PROJECT["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"PADDLE ?= {extras['cpu'][0]}\n" in makefile
    assert "|".join(sorted(extras)) == "cpu|studio|test"
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    for name, version in (("paddlepaddle", extras["cpu"][0]), ("NiceGUI", extras["studio"][0])):
        assert f"{name} {version.partition('==')[2]}" in page


def test_the_version_stands_in_one_place_and_the_package_is_typed():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ppcoat.__version__"}
    assert f"## {ppcoat.__version__}" in (ROOT / "docs" / "CHANGELOG.md").read_text("utf-8")
    assert (ROOT / "ppcoat" / "py.typed").is_file()


def test_types_are_checked_in_all_files():
    """No file is left out, and calls are checked."""
    settings = PROJECT["tool"]["mypy"]
    assert settings["packages"] == ["ppcoat"] and "exclude" not in settings
    assert not any(name.startswith("ppcoat") for each in settings["overrides"] for name in each["module"])
    assert not {"name-defined", "call-arg", "operator", "index"} & set(settings["disable_error_code"])


def test_an_image_says_which_index_paddle_comes_from():
    """It has no default, and every folder that an image copies is there."""
    for file in (ROOT / "docker").iterdir():
        text = file.read_text("utf-8")
        copied = [name for line in re.findall("^COPY (.+)", text, re.M) for name in line.split()[:-1]]
        assert copied and all((ROOT / name).exists() for name in copied)
    assert "ARG PADDLE_INDEX\n" in (ROOT / "docker" / "Dockerfile.gpu").read_text("utf-8")


def test_the_command_is_a_function_that_returns_an_exit_status():
    module, _, name = PROJECT["project"]["scripts"]["ppcoat"].partition(":")
    code = f"import sys; from {module} import {name}; sys.exit({name}())"  # it takes the process' signals
    said = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, f"ppcoat {ppcoat.__version__}\n")


def test_the_built_in_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ppcoat/assets/tiny_flux", "tiny_flux"):
        found = Path(load_config(CONFIG, [f"model.name_or_path={name}"]).model.name_or_path)
        assert (found / "model_index.json").is_file()
    (tmp_path / "tiny_flux").mkdir()  # one's own folder comes first
    assert load_config(CONFIG, ["model.name_or_path=tiny_flux"]).model.name_or_path == "tiny_flux"


@pytest.mark.slow
def test_a_wheel_holds_configs_and_assets(tmp_path):
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    command = [sys.executable, "-m", "pip", "wheel", *options, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {"configs/quickstart.yaml", "assets/tiny_flux/model_index.json", "py.typed"}
    assert {f"ppcoat/{name}" for name in wanted} <= {*zipfile.ZipFile(wheel).namelist()}
