"""One signal to one process at one moment, and what is left behind.

strike = Strike([sys.executable, "-m", "ppcoat", "train", "run.yaml"], folder)
ended = strike.at(signal.SIGTERM, 0.5)       0.5 s after it has taken its signals
ended.wrong                                  "" or what is wrong with how it ended
"""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BOUND = 60  # seconds for a struck process, on a busy machine
LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# What Python, Paddle's handler and its launcher say of a signal, and what an exception leaves.
NOISE = re.compile(r"Traceback|Exception ignored|KeyboardInterrupt|Fatal Python|C\+\+ Traceback|FatalError"
                   r"|LAUNCH INFO .*error|SystemExit|core dumped|\*\*\* Aborted|Error:")  # fmt: skip
STOPPED = re.compile(r"^stopped at step \d+; ", re.MULTILINE)
DRAFTS = (".*.tmp-*", ".lock", "handover-*")


@dataclass(frozen=True)
class End:
    """How a process ended. took: seconds from the signal. before: it was over before the signal came."""

    number: int
    status: int
    out: str
    err: str
    took: float
    left: list[str]
    before: bool = False

    @property
    def wrong(self) -> str:
        said = self.out + self.err
        line = re.findall(rf"^{LINES[self.number]}$", self.err, re.MULTILINE)
        stopped = STOPPED.findall(said)
        if self.left:
            return f"left {self.left}"
        if NOISE.search(said):
            return f"noise: {said[-1500:]}"
        if self.status == 0 and not line:
            return ""  # it was through
        if self.status != 128 + self.number:
            return f"status {self.status}: {said[-1500:]}"
        return "" if len(line) + len(stopped) == 1 else f"{len(line)} lines: {said[-1500:]}"


@dataclass
class Strike:
    """A command, which is started anew for each signal. It gets a folder for temporary files of its own."""

    command: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen:
        temporary = self.folder / "temporary"
        temporary.mkdir(exist_ok=True)
        # NiceGUI serves another way where it sees pytest
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**ours, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
                       "TMPDIR": str(temporary), **self.environment}  # fmt: skip
        return subprocess.Popen(
            self.command, cwd=self.folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=usual_signals,
        )  # fmt: skip

    def at(self, number: int, seconds: float, group: bool = False) -> End:
        """group: to all processes of the group, as a terminal does for Ctrl+C."""
        process = self.start()
        until_taken(process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return self.send(process, number, group)

    def send(self, process: subprocess.Popen, number: int, group: bool = False) -> End:
        before, began = process.poll() is not None, time.monotonic()
        if not before:
            os.killpg(process.pid, number) if group else process.send_signal(number)
        out, err = process.communicate(timeout=BOUND)
        took = time.monotonic() - began
        return End(number, process.returncode, out, err, took, self.left(), before)

    def left(self) -> list[str]:
        """Processes that began in the folder, drafts, locks and temporary files that are still there."""
        deadline = time.monotonic() + 5
        while (there := processes_in(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in processes_in(self.folder):
            os.kill(pid, signal.SIGKILL)
        files = [path for form in DRAFTS for path in self.folder.rglob(form)]
        return there + [str(path) for path in [*files, *(self.folder / "temporary").iterdir()]]


def usual_signals() -> None:
    """Tests may run in the background, where shells let SIGINT be ignored."""
    for number in LINES:
        signal.signal(number, signal.SIG_DFL)


def until_taken(process: subprocess.Popen) -> None:
    """Return when the process has a handler for SIGTERM, or has ended."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        if caught is None or int(caught[1], 16) & bit:
            return
        time.sleep(0.001)


def processes_in(folder: Path) -> list[int]:
    """Processes whose working folder it is, in whatever session; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
    return found
