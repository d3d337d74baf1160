"""What `pip install .` brings along: every room, the configs, what is needed to run, the command."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ppcoat.bench.quickstart import CONFIG
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


def test_the_command_is_a_function_that_returns_an_exit_status(capsys):
    module, _, name = PROJECT["project"]["scripts"]["ppcoat"].partition(":")
    assert getattr(importlib.import_module(module), name)(["--help"]) == 0


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
    names = zipfile.ZipFile(wheel).namelist()
    assert "ppcoat/configs/quickstart.yaml" in names and "ppcoat/assets/tiny_flux/model_index.json" in names
