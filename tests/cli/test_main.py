"""The command table: what is printed where, and exit statuses."""

import importlib
import io
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from safetensors import SafetensorError

import ppcoat
from ppcoat.__main__ import Printed
from ppcoat.cli import flags
from ppcoat.cli.main import COMMANDS, Command, main, run
from ppcoat.config.base import BaseFormat
from ppcoat.config.training_sections import LoRAFormat
from ppcoat.lora.writing import FORMATS, LORA_DTYPES
from ppcoat.models.newbie.convert import WEIGHT_DTYPES
from ppcoat.nn.base_weight import BASES

ROOT = Path(__file__).parents[2]
BAD_CONFIG = """
name: shirts
model: {name_or_path: models/flux}
datasets: [{folder_path: photos}]
train: {stpes: 3}
"""


@pytest.fixture
def bad_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(BAD_CONFIG, encoding="utf-8")
    return file


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_names_every_command(argv, capsys):
    assert main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith("usage: python -m ppcoat <command>")
    for name, command in COMMANDS.items():
        assert name in shown.out and command.what in shown.out


def test_unknown_command_is_named_with_the_known_ones(capsys):
    assert main(["trian", "x.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "'trian', the nearest is 'train'" in shown.err and all(name in shown.err for name in COMMANDS)


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppcoat {ppcoat.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_flags(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m ppcoat {name}" in shown
    assert COMMANDS[name].what.split()[0] in shown
    written = " ".join(shown.split())  # defaults as one would type them, no folder of this machine
    assert str(ROOT) not in "".join(shown.split())
    assert not re.search(r"\(default: ([\[(]|None|False)", written)


def test_flags_offer_what_is_known_where_they_are_used():
    """They are read without Paddle, so they say it once more."""
    assert (get_args(LoRAFormat), get_args(flags.Dtype)) == (FORMATS, LORA_DTYPES)
    assert get_args(get_type_hints(flags.ConvertNewbieFlags)["dtype"]) == tuple(WEIGHT_DTYPES)
    assert get_args(BaseFormat) == tuple(BASES)


def test_a_missing_flag_exits_with_2(capsys):
    assert main(["generate", "--prompt", "x"]) == 2
    assert "--model" in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (
            "train-flux-lightning --data_path x --learning_rat 1",
            "arguments: --learning_rat 1; the nearest",
        ),
        (
            "train-flux-lightning --data_path x --no_visualdll",
            "arguments: --no-visualdll; the nearest flag is --no-visualdl; python",
        ),
        (
            "train run.yaml --dry",
            "--dry; the nearest flag is --dry_run; python -m ppcoat train --help",
        ),
        (
            "train run.yaml --learning_rat 1",
            "arguments: --learning_rat 1; --set a.b=c changes a key of the config, "
            "and the nearest known key is 'train.lr'; python -m ppcoat train --help",
        ),
        ("studio --prot 3", "--prot 3; the nearest flag is --port;"),  # not --root
        ("merge --model m --lor x --out y", "required: --lora, --output_dir"),
        ("train", "error: the following arguments are required: config; python -m ppcoat train --help"),
        ("generate --model m --seed a", "argument --seed: came 'a', wanted a whole number; python"),
        (
            "accuracy bases --step 3",
            "--step 3; the nearest flag is --steps; python -m ppcoat accuracy --help",
        ),
    ],
)
def test_the_beginning_of_a_flag_is_not_taken_for_it(command, answer, capsys, monkeypatch):
    """argparse would; a slip would then train, and a new flag would change what an old command means."""
    called = COMMANDS[command.split()[0]]
    monkeypatch.setattr(importlib.import_module(called.module), called.run, lambda _: pytest.fail("it ran"))
    assert main(command.split()) == 2
    assert answer in one_line(capsys)


def test_wrong_numbers_and_folders_are_told_before_paddle_is_imported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ppcoat.infer.generate", None)
    monkeypatch.setitem(sys.modules, "ppcoat.device", None)
    for given, answer in (("--prompt a --height 60", "height: came 60"), ("", "give either --prompt")):
        assert main(["generate", "--model", "m", *given.split()]) == 2
        assert answer in one_line(capsys)
    for command in (["train"], ["tune", "--budget", "1h"]):
        assert main([*command, str(ROOT / "configs" / "flux_lora_24gb.yaml")]) == 2
        assert "data folder datasets/clothing does not exist" in one_line(capsys)


def one_line(capsys):
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    assert shown.out == ""
    return shown.err


def test_train_answers_an_unknown_key_with_the_nearest(bad_config, capsys):
    assert main(["train", str(bad_config)]) == 2
    message = one_line(capsys)
    assert "train.stpes" in message and "train.steps" in message and "run.yaml:5" in message


def test_train_answers_a_wrong_override(bad_config, capsys):
    assert main(["train", str(bad_config), "--set", "train.steps"]) == 2
    assert "wanted section.key=value" in one_line(capsys)


def test_train_answers_a_missing_file(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in one_line(capsys)


def test_train_hands_overrides_and_file_on(bad_config, monkeypatch, tmp_path):
    """The later override wins, and the config is checked before anything else is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    bad_config.write_text(BAD_CONFIG.replace("stpes", "steps"), encoding="utf-8")
    seen = []
    monkeypatch.setattr("ppcoat.train.run.train_lora", seen.append)
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    flags = ["--set", "train.steps=7", "--set", "name=hats", "--set", "train.steps=8"]
    assert main(["train", str(bad_config), *flags]) == 0
    assert (seen[0].name, seen[0].train.steps, seen[0].data.folder_path) == ("hats", 8, "photos")


def test_generate_answers_a_missing_model_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    assert run("generate", ["--model", str(tmp_path / "none"), "--prompt", "a hat"]) == 2
    assert "none: models are not downloaded; download it there, or set --model" in one_line(capsys)


def test_generate_hands_every_flag_on(monkeypatch):
    seen = []
    monkeypatch.setattr("ppcoat.infer.generate.generate", seen.append)
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    flags = "--model m --prompt p q --path_to_lora l --lora_scale 0.5 --seed 3 --steps 4 --guidance_scale 2 "
    flags += "--height 64 --width 32 --num_images 2 --max_sequence_length 9 --device cpu --dtype float32 "
    flags += "--quantize fp4 --vram 12 --offload --cache_dir c"
    assert run("generate", [*flags.split(), "--output_dir", "o"]) == 0
    (drawing,) = seen
    assert vars(drawing) == {
        "model": "m",
        "prompt": ["p", "q"],
        "prompts": None,
        "output_dir": "o",
        "control_image": None,
        "path_to_lora": ["l"],
        "lora_scale": [0.5],
        "ignore_unknown": False,
        "seed": 3,
        "steps": 4,
        "guidance_scale": 2.0,
        "height": 64,
        "width": 32,
        "num_images": 2,
        "max_sequence_length": 9,
        "negative_prompt": "",
        "true_cfg_scale": 1.0,
        "text_encoders": None,
        "vae": None,
        "tokenizers": None,
        "image": None,
        "mask": None,
        "reference": None,
        "strength": None,
        "quantize": "fp4",
        "vram": 12.0,
        "offload": True,
        "cache_dir": "c",
        "device": "cpu",
        "dtype": "float32",
        **dict.fromkeys(("image", "mask", "strength", "reference")),
    }


def fake_command(monkeypatch, action):
    module = SimpleNamespace(add_arguments=lambda parser: None, run_command=action)
    monkeypatch.setitem(sys.modules, "a_command_of_this_test", module)
    monkeypatch.setitem(COMMANDS, "fake", Command("does what the test says", "a_command_of_this_test"))


def test_numbers_that_went_bad_exit_with_1(monkeypatch, capsys):
    def diverged(_):
        raise FloatingPointError("the loss is nan")

    fake_command(monkeypatch, diverged)
    assert run("fake", []) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_a_mistake_of_ours_is_not_taken_for_the_users(monkeypatch):
    """Only ConfigError is the user's: a plain ValueError keeps its traceback."""

    def broken(_):
        raise ValueError("inside")

    fake_command(monkeypatch, broken)
    with pytest.raises(ValueError, match="inside"):
        run("fake", [])


def test_every_script_runs_a_known_command():
    scripts = [*(ROOT / "train_scripts").glob("*.py"), *(ROOT / "inference").glob("*.py")]
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        name = text.split('__command__ = "')[1].split('"')[0]
        assert callable(getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].run))
        assert len(text.splitlines()) < 40, f"{script.name} holds logic"


def test_flags_may_have_dashes_and_values_keep_theirs(monkeypatch):
    seen = []
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--output_dir"),
        run_command=lambda arguments: seen.append(arguments.output_dir),
    )
    monkeypatch.setitem(sys.modules, "a_module", module)
    monkeypatch.setitem(COMMANDS, "a-command", Command("", "a_module"))
    for argv in (["--output-dir", "my-runs"], ["--output-dir=--a-b"], ["--output_dir=--a-b"]):
        assert main(["a-command", *argv]) == 0
    assert seen == ["my-runs", "--a-b", "--a-b"]


def test_a_missing_package_is_one_line_unless_it_is_our_own(monkeypatch, capsys):
    def fail(_):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    fake_command(monkeypatch, fail)
    missing = "visualdl"
    assert run("fake", []) == 2
    message = one_line(capsys)
    assert "No module named 'visualdl'" in message and "requirements.txt" in message
    missing = "ppcoat.nowhere"
    with pytest.raises(ModuleNotFoundError):
        run("fake", [])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/full/x"),
        OSError(28, "No space left on device"),  # of a file that was open
        SafetensorError("I/O error: no room"),
    ],
)
def test_what_cannot_be_written_is_one_line(monkeypatch, capsys, error):
    def fail(arguments):
        raise error

    module = SimpleNamespace(add_arguments=lambda parser: None, run_command=fail)
    monkeypatch.setitem(sys.modules, "a_module", module)
    monkeypatch.setitem(COMMANDS, "a-command", Command("", "a_module"))
    assert main(["a-command"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "check the path, its permissions and the room on the disk" in said


@pytest.mark.parametrize("error", [OSError("(External) CUDA error(2)"), OSError(111, "CUDA refused")])
def test_an_error_of_the_device_or_the_network_keeps_its_traceback(monkeypatch, error):
    def fail(arguments):
        raise error

    module = SimpleNamespace(add_arguments=lambda parser: None, run_command=fail)
    monkeypatch.setitem(sys.modules, "a_module", module)
    monkeypatch.setitem(COMMANDS, "a-command", Command("", "a_module"))
    with pytest.raises(OSError, match="CUDA"):
        main(["a-command"])


def test_what_cannot_be_printed_for_want_of_room_is_one_line(monkeypatch, capsys):
    module = SimpleNamespace(add_arguments=lambda parser: None, run_command=lambda _: print("a"))
    monkeypatch.setitem(sys.modules, "a_module", module)
    monkeypatch.setitem(COMMANDS, "a-command", Command("", "a_module"))
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["a-command"]) == 2
    assert capsys.readouterr().err == "error: what was to be printed: No space left on device\n"


def test_a_status_of_its_own_outlives_what_cannot_be_printed(monkeypatch):
    for code in (0, 143):  # of help, and of a run that SIGTERM has stopped
        fake_command(monkeypatch, lambda _, code=code: print("a") or sys.exit(code))
        with open("/dev/full", "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            if code:
                with pytest.raises(SystemExit, match="143"):
                    run("fake", [])
            else:
                assert run("fake", []) == 2


def test_characters_that_a_redirected_output_lacks_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    module = SimpleNamespace(
        add_arguments=lambda parser: None, run_command=lambda _: print("é 红 \U0001f457")
    )
    monkeypatch.setitem(sys.modules, "a_module", module)
    monkeypatch.setitem(COMMANDS, "a-command", Command("", "a_module"))
    assert main(["a-command"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().decode("cp1252").strip() == r"é \u7ea2 \U0001f457"


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    model = ROOT / "tests" / "fixtures" / "tiny_flux_fp32"
    (tmp_path / "file").touch()
    monkeypatch.setattr("ppcoat.infer.generate.FluxPipeline", None)  # its use would be another error
    argv = ["--model", str(model), "--prompt", "x", "--output_dir", str(tmp_path / "file" / "x")]
    assert main(["generate", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("a page\n\n  Out of memory error on GPU 0. Cannot allocate 9 GB\n\nmore"), "on GPU 0"),
        (MemoryError(), "out of memory (there is no more): give smaller sizes"),
        (OSError(24, "Too many open files"), "ulimit -a"),
        (ImportError("libcuda.so: cannot open", name="paddle", path="/x/libpaddle.so"), "requirements.txt"),
    ],
)
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, error, said):
    def fail(_):
        raise error

    fake_command(monkeypatch, fail)
    assert run("fake", []) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize(
    "command",
    ["quickstart --samples 0", "demo edit --samples -1", "pretrain-tiny-flux --output_dir x --pictures 0"],
)
def test_counts_without_sense_are_told_before_anything_is_trained(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert "wanted at least 1" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_told_with_the_way_out(monkeypatch, capsys):
    def fail(_):
        raise PermissionError(13, "Permission denied", os.path.expanduser("~/.paddlenlp"))

    fake_command(monkeypatch, fail)
    assert run("fake", []) == 2
    assert "PPNLP_HOME" in one_line(capsys)


def test_a_folder_that_is_gone_is_named(monkeypatch, capsys, tmp_path):
    fake_command(monkeypatch, lambda _: None)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("fake", []) == 2
    assert "the current folder: No such file" in one_line(capsys)


PRINTS = """
import os, sys
from contextlib import suppress
from ppcoat.cli import main
def run_command(arguments):
    with open("file", "w") as file:
        for number in (1, 2):
            with suppress(OSError):
                os.write(number, b"a library's")
        file.write("own")
    print("x" * 100_000), print("y" * 100_000, file=sys.stderr)
    open("end", "w")
sys.modules["m"] = sys.modules[__name__]
main.COMMANDS["fake"] = main.Command("", "m", flags=None)
from ppcoat.__main__ import start
sys.exit(start())
"""


@pytest.mark.parametrize(
    ("streams", "status"),
    [("<&- >&- 2>&-", 0), (">/dev/full 2>/dev/full", 2), (">/dev/full", 2), ("2>/dev/full", 0)],
)
def test_a_command_outlives_its_streams_and_they_get_into_no_file(tmp_path, streams, status):
    command = f'"{sys.executable}" -c "$CODE" fake {streams}'
    environment = os.environ | {"CODE": PRINTS, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True)
    assert ended.returncode == status and b"Traceback" not in ended.stderr
    assert (tmp_path / "file").read_text() == "own" and (tmp_path / "end").exists()


def test_a_stream_that_is_set_not_to_wait_is_waited_for():
    read, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(1 << 16))
    reader = threading.Timer(0.05, os.read, (read, 1 << 20))
    reader.start()
    assert Printed(write, "stdout").write(b"own") == 3
    reader.join()
    os.close(read), os.close(write)
