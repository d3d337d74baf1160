"""Which version of an FP8 operation runs: the Paddle reference, a Triton kernel or an op of Paddle's own.

    @backend.op                       # on the reference: callers keep calling quantize(x, ...)
    def quantize(x, fmt, group_size=None): ...

The faster versions of an op are functions of the same signature in the modules that MODULES names. On a GPU
the first version of ORDER that passes its check is taken; tensors elsewhere go to the reference. A check runs
on first use, on the small inputs of truth.py; the reason for every fallback is logged once. A kernel is
built anew for another dtype or another kind of shape, so building can fail later, too: from then on the op
runs in its next version. CUDA's own errors are raised: after them nothing more may work on the card.
PPCOAT_BACKEND=reference|triton|paddle and `use(name)` force one; an op that was never written in it runs its
reference.

Nothing is imported before it is needed, neither Triton nor Paddle.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ppcoat.errors import ConfigError

_log = logging.getLogger(__name__)

VARIABLE = "PPCOAT_BACKEND"
REFERENCE = "reference"
ORDER = ("triton", "paddle", REFERENCE)  # the first that works is taken
MODULES = {  # version -> op -> module in this package; a function of another name stands behind a dot
    "triton": {
        "quantize": "quantize_triton",
        "dequantize": "quantize_triton",
        "quantize_with_residual": "quantize_triton",
        "dequantize_with_residual": "quantize_triton",
        "dequantize_blocks": "quantize_triton",
        "dequantize_fp4": "four_bit_triton",
        "dequantize_nf4": "four_bit_triton",
        "log_encode": "log_codes_triton",
        "log_decode": "log_codes_triton",
        "signed_log_encode": "log_codes_triton",
        "signed_log_decode": "log_codes_triton",
        "adamw_step": "adamw_triton",
        "modulated_norm": "norm_triton",
        "modulated_norm_grad": "norm_triton",
        "rms_norm": "norm_triton",
        "rms_norm_grad": "norm_triton",
        "rms_norm_rotated": "norm_triton",
        "rms_norm_rotated_grad": "norm_triton",
        "gelu": "pointwise_triton",
        "gelu_grad": "pointwise_triton",
        "silu": "pointwise_triton",
        "silu_grad": "pointwise_triton",
        "gated_residual": "pointwise_triton",
        "dropout": "pointwise_triton",
        "scaled_matmul": "matmul_triton",
    },
    "paddle": {
        "quantize": "quantize.quantize_by_paddle",
        "dequantize": "quantize.dequantize_by_paddle",
        "scaled_matmul": "matmul.scaled_matmul_by_paddle",
    },
}
INSTALL_TRITON = "pip install triton==3.5.0"
OPS: dict[str, Op] = {}  # every op by name, filled by the decorator `op`

_forced: ContextVar[str | None] = ContextVar("ppcoat_backend", default=None)


class Unsuited(ConfigError):
    """Raised by a faster version for an input that it does not take: the next version gets the call."""


@dataclass(frozen=True)
class Verdict:
    """What is known of one version of an op. error: the largest error of its self-check in units of what is
    allowed (1.0 passes), None if it did not run; reason: why it is not used, empty if it can be; absent: no
    such version was ever written."""

    error: float | None
    reason: str
    absent: bool = False

    @property
    def usable(self) -> bool:
        return not self.reason


class Op:
    """One operation and its versions. Calling it runs the one chosen for the place of its first argument, a
    Paddle tensor."""

    def __init__(self, reference: Callable) -> None:
        functools.update_wrapper(self, reference)
        self.name, self.reference = reference.__name__, reference
        self._verdicts: dict[str, Verdict] = {}
        self._functions: dict[str, Callable] = {}  # those of `version`, looked up once
        self._said: set[str] = set()  # reasons already logged

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = forced()
        if wanted == REFERENCE or not (wanted or _on_gpu(x)):
            return self.reference(x, *args, **kwargs)
        for version in (wanted,) if wanted else ORDER[:-1]:
            if not self._may_use(version, wanted):
                continue
            try:
                return self.version(version)(x, *args, **kwargs)
            except Unsuited as error:
                if wanted:
                    raise
                self._say(version, Verdict(None, str(error)))
            except failures() as failure:
                if not _while_building(failure):
                    raise
                self._verdicts[version] = Verdict(None, _told(failure))
                self._may_use(version, wanted)
        return self.reference(x, *args, **kwargs)

    def version(self, name: str) -> Callable | None:
        """The function behind a name of ORDER, unchecked; None if there is none. Raises ImportError where
        Triton is not installed, and on a GPU where it cannot build."""
        if name == REFERENCE:
            return self.reference
        if name not in self._functions and self.name in MODULES[name]:
            if name == "triton" and _gpu_is_current() and (trouble := _triton_trouble()):
                raise ImportError(trouble)
            module, _, function = MODULES[name][self.name].partition(".")
            module = importlib.import_module(f".{module}", __package__)
            self._functions[name] = getattr(module, function or self.name)
        return self._functions.get(name)

    def verdict(self, name: str) -> Verdict:
        """Whether a version may run on Paddle's current device; checked on first use."""
        if name not in self._verdicts:
            self._verdicts[name] = self._check(name)
        return self._verdicts[name]

    def _check(self, name: str) -> Verdict:
        if name == REFERENCE:
            return Verdict(0.0, "")
        if self.name not in MODULES[name]:
            return Verdict(None, f"there is no {name} version of it", absent=True)
        reason = unavailable(name)
        if reason:
            return Verdict(None, reason)
        try:
            candidate = self.version(name)
            with use(REFERENCE):
                error = self.check(candidate)
        except failures() as failure:
            return Verdict(None, _told(failure))
        if not error <= 1.0:  # true for NaN
            return Verdict(error, f"its results are wrong: error {error:.3g}, allowed 1")
        return Verdict(error, "")

    def check(self, candidate: Callable) -> float:
        """Largest error of a version of this op, in units of what is allowed; NaN fails, too."""
        return importlib.import_module(".truth", __package__).largest_error(self.name, candidate)

    def _may_use(self, name: str, wanted: str | None) -> bool:
        verdict = self.verdict(name)
        if verdict.usable:
            return True
        if wanted and not verdict.absent:
            raise ConfigError(
                f"backend {name} was asked for, but {self.name} cannot run in it: {verdict.reason}; "
                f"unset {VARIABLE}"
            )
        self._say(name, verdict)
        return False

    def _say(self, version: str, verdict: Verdict) -> None:
        """Log a reason once; one for which no op at all runs in this version once for all ops."""
        if verdict.reason in self._said:
            return
        self._said.add(verdict.reason)
        if verdict.reason == unavailable(version):
            _say_of_all(version, verdict.reason)
        else:
            level = logging.DEBUG if verdict.absent else logging.WARNING
            _log.log(level, "%s does not run in %s: %s", self.name, version, verdict.reason)


def op(reference: Callable) -> Op:
    """Decorator: make a reference the op that callers see; `.reference` is the plain function."""
    made = Op(reference)
    assert made.name not in OPS, f"two ops are called {made.name}"
    OPS[made.name] = made
    return made


@contextmanager
def use(name: str) -> Iterator[None]:
    """Context manager: within it every op runs in the version `name`, one of ORDER. Raises ConfigError for
    another name."""
    token = _forced.set(_known(name, "backend.use"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The version that `use` or PPCOAT_BACKEND asks for. Raises ConfigError for an unknown one."""
    name = _forced.get() or os.environ.get(VARIABLE, "")
    return _known(name, VARIABLE) if name else None


def check_forced() -> None:
    """Raises ConfigError where `use` or PPCOAT_BACKEND asks for a version in which no op can run on Paddle's
    current device: so a run can say so before it starts."""
    wanted = forced()
    if wanted and (reason := unavailable(wanted)):
        raise ConfigError(f"backend {wanted} was asked for, but {reason}; unset {VARIABLE}")


def _on_gpu(x: Any) -> bool:
    """Whether a Paddle tensor lies on a GPU. While a static graph is traced tensors have no place, and the
    graph holds Paddle's own ops only."""
    import paddle

    return paddle.in_dynamic_mode() and x.place.is_gpu_place()


def unavailable(name: str) -> str:
    """Why no op at all can run in this version on the present machine; empty if it can. On a GPU Triton is
    made ready for its first kernel."""
    if name == REFERENCE:
        return ""
    if not _gpu_is_current():
        return f"this is {_current_device()}, and it needs an NVIDIA GPU"
    return _triton_trouble() if name == "triton" else ""


def remedy(name: str) -> str:
    """What a user can do where a version is not used."""
    if name == "triton" and not _has_triton():
        return f"on an NVIDIA GPU: {INSTALL_TRITON}"
    return "it takes an NVIDIA GPU of sm_80 (Triton) or sm_89 (Paddle's FP8 ops) or later"


def build_trouble(capability: int) -> str:
    """Why no kernel can be built here for a card of this capability (90 for sm_90), found by building a small
    one; empty if it can. Needs no card."""
    if not _has_triton():
        return f"Triton is not installed ({INSTALL_TRITON})"
    try:
        _driver().trial_build(capability)
    except failures() as failure:
        return _told(failure)
    return ""


@functools.cache
def _triton_trouble() -> str:
    """Why Triton can run no kernel on the current card, empty if it can. Gives it its driver, once a
    process."""
    if not _has_triton():
        return f"Triton is not installed ({INSTALL_TRITON})"
    try:
        _driver().connect()
    except failures() as failure:
        return _told(failure)
    return ""


@functools.cache
def _say_of_all(version: str, reason: str) -> None:
    _log.warning("no op runs in %s: %s", version, reason)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _driver() -> Any:
    return importlib.import_module(".driver_triton", __package__)


def _current_device() -> str:
    import paddle

    return paddle.get_device()


def _gpu_is_current() -> bool:
    return _current_device().startswith("gpu")


def _known(name: str, source: str) -> str:
    if name not in ORDER:
        raise ConfigError(f"{source}: unknown backend {name!r}; use one of {', '.join(ORDER)}")
    return name


def _told(failure: Exception) -> str:
    """One line for a user of why a version does not work here: a lacking compiler with what to install, else
    the end of the message, where compilers say what is wrong; below it ptxas's has how it was called."""
    compiling = isinstance(failure, subprocess.CalledProcessError | FileNotFoundError | PermissionError)
    compiling = compiling or "C compiler" in str(failure)
    if compiling and _has_triton() and (missing := _driver().what_is_missing()):
        return f"Triton builds a launcher for each kernel in C, but {missing}"
    if isinstance(failure, subprocess.CalledProcessError):
        # its message is a line of some hundred characters, and the program itself has written why
        return (
            f"building it failed: {failure.cmd[0]} ended with status {failure.returncode}, see what it wrote"
        )
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("Repro command", "`ptxas` stderr"))]
    return f"it failed with {type(failure).__name__}: {lines[-1] if lines else 'no message'}"


def _while_building(failure: Exception) -> bool:
    """Whether Triton raised it before a launch, so that another version can take the call (a version that
    writes into its arguments launches once). Triton names CUDA's own errors, after which nothing more may
    work on the card; errors of Paddle and mistakes of ours do not come from Triton."""
    frames = traceback.walk_tb(failure.__traceback__)
    in_triton = any(f.f_globals.get("__name__", "").partition(".")[0] == "triton" for f, _ in frames)
    return in_triton and not str(failure).startswith("Triton Error [CUDA]")


def failures() -> tuple[type[Exception], ...]:
    """What a version may raise that does not work here: in compiling, in loading, in launching."""
    kinds = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError, AssertionError)
    kinds += (subprocess.SubprocessError,)
    return (*kinds, importlib.import_module("triton.errors").TritonError) if _has_triton() else kinds
