"""Ranks of one small run as processes, one of which is struck: stopped, killed, hung, or met by an error."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import paddle.distributed

from ppcoat.cli.main import run
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.errors import ConfigError
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.train import checkpoint, rank_line
from ppcoat.train import run as train_run
from ppcoat.train.trainer import Trainer

CONTEXT = multiprocessing.get_context("fork")  # a fork has Paddle imported already
GRACE = 0.5


def no_gpu(*_):
    raise ConfigError("device: came gpu, and Paddle sees none")


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")


def hang(*_):
    threading.Event().wait()


def cut_line(*_):
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


def sent(number):
    return lambda *_: os.kill(os.getpid(), number)


HOW = {"stopped": sent(signal.SIGSTOP), "killed": sent(signal.SIGKILL), "hangs": hang,
       "line cut": cut_line, "full disk": full_disk, "no GPU": no_gpu}  # fmt: skip
# Where a rank is struck: what it calls there, and at which call of it. (A rank waits from its first call on.)
WHERE = {
    "before it joins": (train_run.Ranks, "current", 1),
    "on its device": (train_run, "set_device", 1),
    "in the store": (paddle.distributed, "init_parallel_env", 1),
    "encoding": (FluxPipeline, "encode_prompt", 1),
    "waiting for encoding": (train_run, "rank_scratch", 1),
    "storing an encoding": (EmbeddingStore, "put", 1),
    "before the first step": (Trainer, "train_step", 1),
    "in a step": (Trainer, "_update", 3),
    "in a transfer": (paddle.distributed, "all_reduce", 12),
    "in a save": (checkpoint, "write_text", 1),
}


@dataclass(frozen=True)
class Strike:
    rank: int
    how: str
    where: str

    def arm(self):
        """In the process of the rank."""
        owner, name, wanted = WHERE[self.where]
        kept, calls = getattr(owner, name), []

        def struck(*arguments, **named):
            calls.append(name)
            if len(calls) == wanted and self.where.startswith("waiting"):
                threading.Timer(0.3, HOW[self.how]).start()
            elif len(calls) == wanted:
                HOW[self.how]()
            return kept(*arguments, **named)

        setattr(owner, name, staticmethod(struck) if name == "current" else struck)


@dataclass
class Run:
    """A run on `size` ranks, again and again; its logs are folder/log.RANK. of_rank: more flags of a rank."""

    file: Path
    size: int = 2
    bound: float = 4.0
    of_rank: dict[int, list[str]] = field(default_factory=dict)
    processes: list = field(default_factory=list)

    def start(self, strike=None, before=lambda rank: None):
        """before(rank): in the process of a rank, first of all."""
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            store, ours = (each.getsockname()[1] for each in (one, other))
        environment = {
            "PADDLE_TRAINERS_NUM": str(self.size),
            "PADDLE_MASTER": f"127.0.0.1:{store}",
            "PADDLE_TRAINER_ENDPOINTS": ",".join([f"127.0.0.1:{ours}", *["127.0.0.1:1"] * (self.size - 1)]),
            "PADDLE_CURRENT_ENDPOINT": "127.0.0.1:1",
        }

        def work(rank):
            os.environ.update(environment, PADDLE_TRAINER_ID=str(rank))
            rank_line._GRACE_SECONDS = GRACE
            descriptor = os.open(self.log(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            before(rank)
            if strike is not None and strike.rank == rank:
                strike.arm()
            flags = [f"train.rank_timeout={self.bound}", *self.of_rank.get(rank, ())]
            sys.exit(run("train", [str(self.file), *(word for flag in flags for word in ("--set", flag))]))

        self.processes = [CONTEXT.Process(target=work, args=(rank,)) for rank in range(self.size)]
        for process in self.processes:
            process.start()
        return self

    def codes(self, seconds, of=None):
        """Exit codes; None for who still runs after so many seconds in all."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            if of is None or rank in of:
                process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wake(self, rank):
        with suppress(ProcessLookupError):  # its keeper has ended it
            os.kill(self.processes[rank].pid, signal.SIGCONT)

    def end(self):
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def log(self, rank):
        return self.file.parent / f"log.{rank}"

    def said(self, rank):
        return self.log(rank).read_text(errors="replace")

    def result(self):
        """Of the LoRA file and of the last checkpoint's tensors: header and bytes."""
        folder = self.file.parent / "run"
        last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
        return [parts(path) for path in (folder / "run.safetensors", *sorted(last.glob("*.safetensors")))]


def parts(file):
    """Header and tensors' bytes of a safetensors file, whose metadata come in any order."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
