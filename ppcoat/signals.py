"""How a command ends when it is told to: Ctrl+C, SIGTERM, a terminal that closes. Status 128 + the signal's
number, one line on stderr, no traceback.

`take` comes before everything else of the process, so this file imports little. From then on:

- while modules are being imported the process ends where it stands: nothing is under way, and an exception in
  there may get lost, or come out of a C++ module as another one;
- else the main thread gets `Ended`, and what is under way tidies up after itself;
- where it has not come back after PATIENCE seconds, or at a second signal, `leave` tidies up what is in
  `unfinished`, ends the children and then the process. A thread sees to that: Python's handlers wait for the
  end of an operator in C++, but the signal is written to a pipe at once;
- a signal after the end of the command changes nothing any more.

Training takes the first signal itself (FinishStepOnSignal in train/run_state.py). What is ignored when the
process starts stays ignored: SIGHUP under nohup, SIGINT of background jobs.
"""

from __future__ import annotations

import _thread
import atexit
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, ModuleType
    from typing import Any

PATIENCE = 10.0  # seconds
_CHILDREN_SECONDS = 1.0  # for children to end by themselves
_SAID = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}
SIGNALS = {getattr(signal, name): text for name, text in _SAID.items() if hasattr(signal, name)}
_TERM = [signal.SIGTERM]  # the one for which Paddle has a handler
_HAS_MASKS = hasattr(signal, "pthread_sigmask")

# What `leave` still does of tidying up, under a key of its owner, who takes it out when it is done.
unfinished: dict[Any, Callable[[], object]] = {}


class Ended(KeyboardInterrupt):
    """Raised in the main thread by a signal."""


class _State:
    """Of the one process. came: the signal that ends it, 0 for none. expected: how many more signals are for
    somebody else. status: that of the command, once it is over. is_quiet: a child, which says nothing."""

    came = 0
    expected = 0.0
    status: int | None = None
    is_quiet = is_held = again = has_said = False
    leaving = _thread.allocate_lock()
    pipe: tuple[int, int] | None = None


def take(quiet: bool = False) -> None:
    """Take the signals of this process. A second call changes nothing. quiet: it is a child of a command,
    which gets Ctrl+C as well and ends its children: ignore that, and end at once and silently."""
    if _State.pipe is not None or getattr(signal.getsignal(signal.SIGTERM), "__name__", "") == _act.__name__:
        return
    _State.is_quiet = quiet
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_IGN if quiet and number == signal.SIGINT else _act)
    atexit.register(_ignore)  # the first, so that it is called last: Python then lets go of its handlers
    if not _HAS_MASKS:  # Windows
        return
    sys.unraisablehook = _again_if_lost
    _State.pipe = os.pipe()
    for end in _State.pipe:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_State.pipe[1], warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the thread inherits that: what is held comes to none
    _thread.start_new_thread(_look_out, (_State.pipe[0],))
    for name in ("paddle", "paddlenlp"):  # one sets handlers in C++, the other takes away all that are there
        sys.meta_path.insert(0, LoadedInside(name, held))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held since before in a child


def finished(status: int) -> int:
    """The command is over, with this status, or with that of the signal that ended it: that is said, and
    what it started is ended. Returns the status."""
    if _State.came:
        status = 128 + _State.came
        _say(_State.came)
        _end_children(kill=False)
    _State.status = status
    return status


def was_said() -> None:
    """What ends the process has been told, in other words: a signal that is repeated says nothing more."""
    _State.has_said = True


def came() -> bool:
    """Whether a signal is ending this process."""
    return bool(_State.came)


def expect(count: float) -> None:
    """The next `count` signals are somebody else's, who lets the process go on as long as it likes."""
    _State.expected = count


def leave(number: int) -> None:
    """End this process at once: with the line, without drafts and children, whatever its main thread does."""
    if not _State.leaving.acquire(blocking=False):
        return  # another thread is at it
    if _State.status is not None:
        os._exit(_State.status)
    _say(_State.came or number)
    for tidy_up in list(unfinished.values()):
        _try(tidy_up)
    _try(lambda: _end_children(kill=True))
    finalize = getattr(sys.modules.get("weakref"), "finalize", None)
    _try(getattr(finalize, "_exitfunc", int))  # temporary folders
    os._exit(128 + (_State.came or number))


class held:
    """Context manager: somebody changes the handler of SIGTERM in here, as Paddle does, behind Python's back.
    The signal waits; afterwards the handlers are those that Python knows. One inside another does nothing."""

    def __enter__(self) -> None:
        self._is_outermost = not _State.is_held
        if _HAS_MASKS and self._is_outermost:
            signal.pthread_sigmask(signal.SIG_BLOCK, _TERM)
            _State.is_held = True
            if _State.pipe is not None:
                os.write(_State.pipe[1], b"\0")  # the thread looks whether one is waiting

    def __exit__(self, *error: object) -> None:
        if _HAS_MASKS and self._is_outermost:
            handler = signal.getsignal(signal.SIGTERM)
            if handler is not None and _is_main_thread():
                signal.signal(signal.SIGTERM, handler)
            _State.is_held = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)


class LoadedInside:
    """A finder of sys.meta_path: it finds the module `name` as the other finders do, and has it loaded inside
    the context manager that `context()` gives."""

    def __init__(self, name: str, context: Callable[[], Any]) -> None:
        self.name, self._context = name, context

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        spec = next(filter(None, (each.find_spec(name, path, target) for each in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_inside(module: ModuleType) -> None:
                with self._context():
                    load(module)

            spec.loader.exec_module = load_inside
        return spec


class started_with_signals_held:
    """Context manager: a process that is started in here gets no signal before it has called `take`."""

    def __enter__(self) -> None:
        if _HAS_MASKS:
            self._before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def __exit__(self, *error: object) -> None:
        if _HAS_MASKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def child_main(pipe: Any, pickled: bytes) -> None:
    """Main function of a child process: takes its signals, then imports what its work needs, and does it.
    pickled: function and arguments, as the parent's ForkingPickler gave them."""
    take(quiet=True)
    from multiprocessing.reduction import ForkingPickler

    function, arguments = ForkingPickler.loads(pickled)
    try:
        function(pipe, *arguments)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the parent is ending, and lets go of its pipes before its children


def _act(number: int, frame: FrameType | None) -> None:
    if _State.again:
        _State.again = False
        raise Ended
    if _State.came or _State.is_quiet or _State.status is not None or _is_importing(frame):
        leave(number)
    _State.came = number
    raise Ended


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _again_if_lost(lost: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised while it clears away an object: the thread has it raised once more."""
    if isinstance(lost.exc_value, Ended):
        _State.again = True
        os.write(_State.pipe[1], b"\0")
    else:
        sys.__unraisablehook__(lost)


def _look_out(pipe: int) -> None:
    """The thread: waits for signals, and for the end of the patience with the main thread."""
    number, deadline = 0, None
    while True:
        wait = 0.05 if _State.is_held else None if deadline is None else max(0.0, deadline - time.monotonic())
        if select.select([pipe], [], [], wait)[0]:
            for byte in os.read(pipe, 64):
                if byte in SIGNALS and _State.expected > 0:
                    _State.expected -= 1
                elif byte in SIGNALS and deadline is None:
                    number, deadline = byte, time.monotonic() + PATIENCE
        if _State.again:
            time.sleep(0.05)  # until the main thread is out of there
            _thread.interrupt_main(_State.came)
        if _State.is_held and signal.SIGTERM in signal.sigpending():
            leave(signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            leave(number)


def _say(number: int) -> None:
    """The line, once. Straight to the file: another thread may be in the midst of writing to sys.stderr."""
    if not (_State.is_quiet or _State.has_said):
        _State.has_said = True
        over_a_bar = "\n" if os.isatty(2) else ""
        _try(lambda: os.write(2, f"{over_a_bar}{SIGNALS[number]}\n".encode()))


def _end_children(kill: bool) -> None:
    """SIGTERM to each child that is there and has no session of its own, as the studio's runs have; kill: and
    SIGKILL after a moment."""
    deadline = time.monotonic() + _CHILDREN_SECONDS
    for pid in _children():
        os.kill(pid, signal.SIGTERM)
    while kill and _children() and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in _children() if kill else ():
        os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
            except OSError:  # it is gone
                continue
            if int(parent) == os.getpid() and int(session) == os.getsid(0) and state != b"Z":
                found.append(int(entry))
    return found


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_main_thread() -> bool:
    threading = sys.modules.get("threading")
    return threading is None or threading.main_thread() is threading.current_thread()


def _try(tidy_up: Callable[[], object]) -> None:
    try:  # noqa: SIM105 contextlib would have to be imported
        tidy_up()
    except Exception:
        pass
