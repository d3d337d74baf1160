"""Ctrl+C, SIGTERM and SIGHUP at any moment: one line, 130, 143 or 129, nothing left, and the same command
goes through afterwards."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle

import pytest
from counts import judge
from safetensors.numpy import load_file, save_file
from strikes import NOISE, REPOSITORY, Strike

COMMAND = [sys.executable, "-m", "ppcoat"]
PROCESS = """
import os, signal, sys, time
from ppcoat import __main__, signals
signals.PATIENCE = 0.3
def work(command):
    signals.take()
    exec(sys.argv[1], globals())
    return 0
__main__._status_of = work
sys.exit(__main__.start())
"""
TRAIN = [*COMMAND, "train", "run.yaml", "--set", "train.steps=20", "--set", "save.save_every=5"]


@pytest.fixture
def strike(tmp_path, write_run, drawings):
    """strike(command) -> a Strike in a folder with a run.yaml and its pictures."""
    drawings(tmp_path / "data", 4)
    write_run(tmp_path, tmp_path / "data")
    return lambda command: Strike(command, tmp_path)


@pytest.fixture
def in_process(tmp_path):
    """in_process(code, number=...) -> the End of a process in which a command with PATIENCE 0.3 is this code,
    and which gets the signal when it prints "now"."""

    def ended(code, number=signal.SIGTERM):
        strike = Strike([sys.executable, "-c", PROCESS, code], tmp_path)
        process = strike.start()
        assert process.stdout.readline() == "now\n", process.stderr.read()
        return strike.send(process, number)

    return ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_the_first_moment_a_signal_is_one_line(strike, number):
    for seconds in (0, 0.05):
        ended = strike(TRAIN).at(number, seconds)
        judge("train, first moments", number.name, not ended.wrong, f"{seconds} s: {ended.wrong}")


HELD = """
import ctypes
libc = ctypes.CDLL(None)
with signals.held():
    libc.signal(15, libc._exit)  # as Paddle's, which speaks
    print("now", flush=True)
    time.sleep(5)
"""


def test_what_paddle_does_with_sigterm_while_it_is_imported_never_shows(in_process):
    ended = in_process(HELD)
    judge("another's handler", "SIGTERM", not ended.wrong, ended.wrong)
    code = HELD.replace("print", "0 and print").replace("time.sleep(5)", "pass")
    ended = in_process(code + "print('now', flush=True); time.sleep(5)")
    judge("another's handler", "SIGTERM", not ended.wrong, ended.wrong)


RESETS = """
import ctypes
ctypes.CDLL(None).signal(15, 0)  # as paddlenlp, through Paddle
if not {after}:
    print("now", flush=True)
    time.sleep(5)
"""


@pytest.mark.parametrize("after", [False, True], ids=["in it", "after it"])
def test_an_import_that_takes_handlers_away_does_not_take_ours(in_process, tmp_path, after):
    (tmp_path / "paddlenlp.py").write_text("import time" + RESETS.format(after=after))
    ended = in_process("import paddlenlp; print('now', flush=True); time.sleep(5)")
    judge("another's handler", "SIGTERM", not ended.wrong, ended.wrong)


EVERYTHING = """
import re, signal
import paddle, paddlenlp, ppdiffusers
caught = int(re.search("SigCgt:.(.*)", open("/proc/self/status").read())[1], 16)
print([caught >> number - 1 & 1 for number in signals.SIGNALS])
"""


@pytest.mark.slow
def test_no_library_takes_a_handler_away():
    told = subprocess.run([sys.executable, "-c", PROCESS, EVERYTHING], capture_output=True, text=True)
    assert told.stdout.splitlines()[-1:] == ["[1, 1, 1]"], told.stdout + told.stderr


STUCK = """
import hashlib, subprocess, sys
from ppcoat.atomic import whole_file
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with whole_file("result") as draft:
    draft.write_text("half")
    print("now", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)  # minutes, in C
"""


def test_code_in_c_that_does_not_return_is_left_within_a_bound(in_process, tmp_path):
    ended = in_process(STUCK)
    judge("stuck in C", "SIGTERM", not ended.wrong and ended.took < 20, f"{ended.took} s: {ended.wrong}")
    assert not (tmp_path / "result").exists()


LOST = """
class Slow:
    def __del__(self):
        print("now", flush=True)
        time.sleep(5)
slow = Slow()
del slow
time.sleep(5)
print("it was lost")
"""


def test_a_signal_that_python_would_drop_is_raised_again(in_process):
    ended = in_process(LOST, signal.SIGINT)
    judge("while an object is cleared away", "SIGINT", not ended.wrong, ended.wrong)
    assert "lost" not in ended.out


EXPECTED = """
noted = []
signals.expect(1)
signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
print("now", flush=True)
while not noted:
    time.sleep(0.01)
time.sleep(1)  # longer than PATIENCE
signal.signal(signal.SIGTERM, signals._act)
signals.finished(0)
os.kill(os.getpid(), signal.SIGTERM)
raise SystemExit(0)
"""


def test_who_takes_a_signal_has_time_and_one_after_the_end_changes_nothing(in_process):
    ended = in_process(EXPECTED)
    assert (ended.status, ended.err) == (0, "")


def test_what_is_ignored_from_the_start_stays_ignored():
    code = "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        told = subprocess.run(
            [sys.executable, "-c", PROCESS, code], capture_output=True, text=True, check=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told.stdout == "True\n"


def test_a_child_of_a_command_ends_in_silence(tmp_path):
    setup = "from ppcoat import signals\nsignals.take(quiet=True)\nprint('now', flush=True)\n"
    process = Strike([sys.executable, "-c", setup + "import time; time.sleep(9)"], tmp_path).start()
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)  # for the parent
    time.sleep(0.1)
    process.terminate()
    assert (process.wait(10), process.stderr.read()) == (143, "")


GONE = """
import os
from multiprocessing.reduction import ForkingPickler
from ppcoat import signals
reader, writer = os.pipe()
os.close(reader)
signals.child_main(writer, ForkingPickler.dumps((os.write, (b"facts",))))
"""


def test_a_child_whose_parent_lets_go_of_its_pipe_says_nothing():
    done = subprocess.run([sys.executable, "-c", GONE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


# name -> arguments, and what is removed before each start; each runs in a folder of its own with a run.yaml
# on the tiny FLUX, a run.toml on the tiny NewBie, their pictures, and `tuned`, a FLUX that differs a little
FIXTURES = REPOSITORY / "tests/fixtures"
FLUX, NEWBIE = str(FIXTURES / "tiny_flux_fp32"), str(FIXTURES / "tiny_newbie")
TINY = str(REPOSITORY / "ppcoat/assets/tiny_flux")
LORA = str(FIXTURES / "adapters/split_diffusers.safetensors")
SECOND = str(FIXTURES / "adapters/split_kohya.safetensors")
OUT = "out.safetensors"
DISTIL = ("--resolution 64 --lora_rank 2 --train_batch_size 2 --max_train_steps 4 --max_sequence_length 16 "
          "--num_euler_timesteps 20")  # fmt: skip
COMMANDS = {
    "inspect": (["inspect", LORA], []),
    "convert": (["convert", LORA, OUT, "--format", "kohya"], [OUT]),
    "lora resize": (["lora", "resize", LORA, OUT, "--rank", "2"], [OUT]),
    "lora combine": (["lora", "combine", LORA, SECOND, OUT], [OUT]),
    "lora extract": (["lora", "extract", FLUX, "tuned", OUT, "--rank", "2"], [OUT]),
    "merge": (["merge", "--model", FLUX, "--lora", LORA, "--output_dir", "merged"], ["merged"]),
    "merge-newbie": (["merge-newbie", "--base_model_path", NEWBIE, "--lora_path", f"{NEWBIE}/lora",
                      "--output_path", "merged"], ["merged"]),
    "convert-newbie": (["convert-newbie", "--checkpoint", f"{NEWBIE}/raw/consolidated.00-of-01.pth",
                        "--gemma3", f"{NEWBIE}/text_encoder", "--jina", f"{NEWBIE}/clip_model",
                        "--vae", NEWBIE, "--transformer_config", f"{NEWBIE}/transformer/config.json",
                        "--output", "made"],
                       ["made"]),
    "data report": (["data", "report", "data"], []),
    "data captions": (["data", "captions", "data", "--append", " in the sun", "--write"], []),
    "doctor": (["doctor"], []),
    "plan": (["plan", "run.yaml"], []),
    "generate": (["generate", "--model", TINY, "--prompt", "a hat", "--output_dir", "drawn"], ["drawn"]),
    "lightning": (["lightning", "--model", FLUX, "--path_to_lora", LORA, "--prompt", "a hat"], ["output"]),
    "evaluate": (["evaluate", "--model", TINY, "--samples", "20"], []),
    "train-newbie": (["train-newbie", "--config_file", "run.toml"], ["newbie"]),
    "train-flux-lightning": (["train-flux-lightning", "--data_path", "data", "--output_dir", "distilled",
                              "--pretrained_teacher_model", FLUX, *DISTIL.split()], ["distilled"]),
    "tune": (["tune", "run.yaml", "--budget", "20s", "--hold_out", "1", "--ranks", "2"], ["run"]),
    "benchmark": (["benchmark", "--num_steps", "3", "--num_layers", "1", "--hidden_size", "64"], []),
    "quickstart": (["quickstart", "--samples", "10"], ["output"]),
    "demo": (["demo", "edit", "--samples", "10"], ["output"]),
    "accuracy": (["accuracy"], []),
    "studio": (["studio", "--port", "7893"], []),
}  # fmt: skip
ENDLESS = ("quickstart", "demo", "accuracy", "studio", "tune")  # or so long that the last strike is the end
WORDS = re.compile(r"^(interrupted|terminated|stopped at step .*)$", re.MULTILINE)  # of a rank
FIRST, LATER, LAST = 0.2, 2.2, 8.0  # seconds, times, seconds: when they are struck
TOML = """[Model]
base_model_path = "{model}"
output_dir = "newbie"
output_name = "run"
train_data_dir = "data"
resolution = 64
num_epochs = 1
lora_rank = 2
lora_target_modules = ["attention.qkv"]
mixed_precision = "no"
lr_warmup_steps = 0
"""


def struck(name, folder):
    """At later and later moments, by Ctrl+C and SIGTERM in turns, until it is over before the signal."""
    arguments, made = COMMANDS[name]
    (folder / "run.toml").write_text(TOML.format(model=NEWBIE))
    command, seconds = Strike([*COMMAND, *arguments], folder), FIRST
    for number in cycle((signal.SIGINT, signal.SIGTERM)):
        remove(folder, made)
        ended = command.at(number, seconds)
        right = not ended.wrong and (not ended.before or ended.status == 0)
        judge(name, number.name, right, f"after {seconds:.2f} s: {ended.wrong} {ended.err[-300:]}")
        seconds *= LATER
        if ended.before or (name in ENDLESS and seconds > LAST):
            return


@pytest.mark.slow
def test_every_command_struck_at_any_moment_works_afterwards(tmp_path, write_run, drawings):
    folders = {name: tmp_path / name.replace(" ", "-") for name in COMMANDS}
    for folder in folders.values():
        folder.mkdir()
        drawings(folder / "data", 4)
        write_run(folder, folder / "data")
    write_tuned(folders["lora extract"] / "tuned")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(struck, folders, folders.values()))


def write_tuned(folder):
    shutil.copytree(FLUX, folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.0.attn.to_q.weight"] += 0.1
    save_file(tensors, file)


@pytest.mark.slow
def test_a_training_struck_at_any_moment_goes_on_afterwards(tmp_path, write_run, drawings):
    """15 moments from its start to its end for each signal, over a run that is taken up again and again."""

    def struck(number):
        folder = tmp_path / number.name
        folder.mkdir()
        drawings(folder / "data", 4)
        write_run(folder, folder / "data")
        train = Strike(TRAIN, folder)
        length = seconds_of(train)
        shutil.rmtree(folder / "run")
        for moment in range(15):
            ended = train.at(number, length * moment / 14)
            judge("train", number.name, not ended.wrong, f"moment {moment} of {length:.1f} s: {ended.wrong}")
        through = train.send(until_over(train), number)
        judge("train", "goes through", (through.status, through.before) == (0, True), through.err)
        assert (folder / "run/run.safetensors").exists()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(struck, (signal.SIGINT, signal.SIGTERM)))


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_struck_at_any_moment_say_it_in_their_logs(strike, number, group):
    """As `kill` does, to the launcher alone, which tells its ranks; or as a terminal or a scheduler does, to
    all at once, and the launcher repeats it. The launcher tells of Ctrl+C by SIGTERM; a log without a word is
    that of a rank whose interpreter was just starting. Once it trains, rank 0 speaks for all."""
    script = str(REPOSITORY / "train_scripts/train_flux_lora.py")
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "logs"]
    ranks = strike([*launch, script, *TRAIN[4:], "--set", "train.batch_size=2", "--set", "train.steps=2000"])
    for seconds in (3, 6, 12, 25):
        remove(ranks.folder, ["logs"])
        process = ranks.start()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        ended = ranks.send(process, number, group)
        logs = sorted(ranks.folder.glob("logs/workerlog.*"))
        said = [file.read_text("utf-8", "replace") for file in logs]
        noise = NOISE.search("".join(said))
        lines = [len(WORDS.findall(log)) for log in said]
        saved = "stopped at step" in "".join(said[:1])
        right = not (noise or ended.left) and all(
            count == 1 or not log or (rank > 0 and saved and count == 0)
            for rank, (count, log) in enumerate(zip(lines, said, strict=True))
        )
        told = f"{seconds} s: {ended.left} {lines} {[log[-900:] for log in said]}"
        judge(f"2 ranks, to the {'group' if group else 'launcher'}", number.name, right, told)


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_a_training_as_it_ends_other_programs(strike):
    command = " ".join([*TRAIN, "--dry_run"])  # which prints again when the reader has long gone
    shell = strike(["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"])
    process = shell.start()
    out, err = process.communicate(timeout=300)
    judge("train, its reader gone", "SIGPIPE", out.endswith("141\n") and not NOISE.search(err), out + err)


def seconds_of(command):
    began = time.monotonic()
    process = until_over(command)
    assert process.returncode == 0, process.stderr.read()
    return time.monotonic() - began


def until_over(command):
    process = command.start()
    process.wait(600)  # what these print fits into their pipes
    return process


def remove(folder, names):
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
