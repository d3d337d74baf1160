"""Data parallelism over a handful of parameters: which rank this is, and the few things ranks do together.

    python -m paddle.distributed.launch --nproc_per_node 2 train_scripts/train_flux_lora.py run.yaml

Each rank computes its slice of the global batch; the gradients of the trained parameters are averaged, and a
few numbers for the log; nothing else is exchanged. gloo on CPU, nccl on GPU. The frozen base is whole on
every rank: no sharding. Files go from the first rank to the others by a folder that is gone when they have
read them.

Two ranks with one picture each do what one rank with two does, up to rounding, where a picture does not see
its neighbours: without COAT, and with per-group scales. A per-tensor scale (coat.activation's default for
linear layers) is that of the pictures of one rank, so another split quantises a little differently.

Beside Paddle's process group the ranks hold one plain TCP connection each to rank 0, for two reasons. gloo
gives up after 30 seconds, and rank 0 may well take longer to encode a data set or to draw previews: ranks
meet over these connections, without a limit, before they exchange anything. And a connection tells at once
that the process behind it has died, where nccl would wait for it.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.train.run_state import AGAIN

LOST_EXIT = 75  # EX_TEMPFAIL of <sysexits.h>: the same command may well succeed the next time
_GRACE_SECONDS = 5.0  # for a rank to end by itself, with its own message, after another has died
_GREETING_SECONDS = 60.0
_KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))  # a lost machine: 50 seconds
_GREETING = struct.Struct("<qq")  # token, rank
_READY, _END = b"r", b"e"
_SCRATCH = re.compile(r"^handover-[0-9a-f]{13}$")


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train together. Everything is free of cost where size is 1.

    All ranks must call the methods below in the same order. A rank that dies ends the others within about
    10 seconds (50 if its machine is lost), with one line and exit status 75: in a method below as SystemExit,
    elsewhere without more ado.
    """

    rank: int = 0
    size: int = 1
    _line: _Line | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def current(device: str = "auto", again: str = AGAIN) -> Ranks:
        """From PADDLE_TRAINER_ID and PADDLE_TRAINERS_NUM, as paddle.distributed.launch sets them.

        Starts the process group where there is more than one rank. Call once, after the device is set and
        before long work. again: what to do when a rank has died. Raises ConfigError for numbers that make no
        sense, and for a config's `device` gpu:N with several ranks, which would all take the same GPU.
        """
        rank, size = _number("PADDLE_TRAINER_ID", 0), _number("PADDLE_TRAINERS_NUM", 1)
        if not 0 <= rank < size:
            raise ConfigError(
                f"PADDLE_TRAINER_ID={rank} with PADDLE_TRAINERS_NUM={size}: wanted 0 <= id < number; "
                "start with python -m paddle.distributed.launch, or unset both"
            )
        if size == 1:
            return Ranks()
        if ":" in device:
            raise ConfigError(
                f"device: came {device} with {size} ranks, wanted gpu or auto: each rank gets a GPU of its "
                "own; choose them with --gpus of paddle.distributed.launch"
            )
        import paddle.distributed as dist

        if paddle.get_device() == "cpu":
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"  # a GPU wheel would take nccl for a run on CPU
        dist.init_parallel_env()
        return Ranks(rank, size, _connect(rank, size, again))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints, draws and saves."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when all ranks have come here, however long that takes."""
        if self._line is not None:
            self._line.meet(_READY)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Context manager: rank 0 runs the block while the others wait; when it is done, they run it."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def close(self) -> None:
        """The run is over: wait for all ranks; from here on it is no accident if one ends.

        Call after the last save, also before leaving for a signal or an error that all ranks meet. Not after
        any other error: a rank that ends without this counts as dead.
        """
        if self._line is not None:
            self._line.meet(_END)

    def share(self, batch: Sequence) -> Sequence:
        """This rank's consecutive part, 1/size, of a global list, array or tensor (along its first axis).

        Raises ConfigError where the parts would not be equal: means over ranks would then weigh wrongly.
        """
        if len(batch) % self.size:
            raise ConfigError(
                f"a batch of {len(batch)} cannot be shared by {self.size} ranks; "
                f"use a batch of a multiple of {self.size}, or start other ranks"
            )
        if self.size == 1:
            return batch
        part = len(batch) // self.size
        return batch[self.rank * part : (self.rank + 1) * part]

    @paddle.no_grad()
    def average_gradients(self, parameters: Iterable[paddle.Tensor]) -> None:
        """Replace each gradient, any shape and dtype, by its mean over all ranks: one all_reduce of a flat
        buffer.

        A parameter without gradient counts as zeros, and has a gradient afterwards. NaN and inf of one rank
        reach all of them. Does nothing for one rank.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        pieces = [
            paddle.zeros([p.size]) if p.grad is None else p.grad.reshape([-1]).astype("float32")
            for p in parameters
        ]
        mean = self.sum(paddle.concat(pieces)) / self.size
        for parameter, piece in zip(parameters, mean.split([p.size for p in parameters]), strict=True):
            gradient = piece.reshape(parameter.shape).astype(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                paddle.assign(gradient, output=parameter.grad)

    @paddle.no_grad()
    def broadcast(self, parameters: Iterable[paddle.Tensor]) -> None:
        """Give every rank the values that rank 0 has, bit for bit; any shape, but shapes and dtypes
        must be the same."""
        if self.size == 1:
            return
        import paddle.distributed as dist

        with self._exchange():
            for parameter in parameters:
                dist.broadcast(parameter, src=0)

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """As many numbers from every rank -> float64 [size, n], exact and the same on all; NaN and inf stay
        where they are."""
        table = np.zeros([self.size, len(values)])
        table[self.rank] = values
        return table if self.size == 1 else self.sum(paddle.to_tensor(table)).numpy()

    def sum(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """`tensor`, to which those of the other ranks have been added; any shape and dtype, the same on
        all."""
        if self.size > 1:
            import paddle.distributed as dist

            with self._exchange():
                dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Context manager: within it something goes over the process group; only with several ranks."""
        self.barrier()  # gloo's 30 seconds then cover the transfer only
        try:
            yield
        except (RuntimeError, OSError):  # gloo's and nccl's words for a peer that has died meanwhile, too
            if self._line is not None:
                self._line.leave_if_lost()
            raise


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{variable}: came {text!r}, wanted a number; start with python -m paddle.distributed.launch"
        )
    return int(text)


class _Line:
    """Rank 0's connections to all others, or another rank's one connection to rank 0.

    A thread reads them. A peer that closes its end without having said _END is dead: one line says so at
    once, `meet` leaves with SystemExit, and after a time of grace the process ends wherever its main thread
    stands.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], again: str = AGAIN) -> None:
        self._is_first, self._peers, self._again = rank == 0, peers, again
        self._arrived = dict.fromkeys(peers, 0)  # words of each peer that no meeting has used yet
        self._lost: int | None = None
        self._ended = False
        self._changed = threading.Condition()
        for peer in peers.values():
            _keep_alive(peer)
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def meet(self, word: bytes) -> None:
        """Wait for all ranks: the others report to rank 0, which answers when all have. Leaves with
        LOST_EXIT if one is dead."""
        if not self._is_first:
            self._send(word)
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or all(self._arrived.values()))
            if self._lost is not None:
                raise SystemExit(LOST_EXIT)
            for rank in self._arrived:
                self._arrived[rank] -= 1
            self._ended = word == _END
        if self._is_first:
            self._send(word)

    def leave_if_lost(self) -> None:
        """Leave with LOST_EXIT if a rank is dead, also if the news of it is still on its way: another's death
        comes from rank 0, which may take its time of grace first."""
        with self._changed:
            if self._changed.wait_for(lambda: self._lost is not None, timeout=_GRACE_SECONDS + 2):
                raise SystemExit(LOST_EXIT)

    def _send(self, word: bytes) -> None:
        for rank, peer in self._peers.items():
            try:
                peer.sendall(word)
            except OSError:
                self._lose(rank)
                raise SystemExit(LOST_EXIT) from None

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while True:
                for ready, _ in selector.select():
                    words = _receive(ready.fileobj)
                    with self._changed:
                        if not words and self._ended:
                            return
                        self._arrived[ready.data] += len(words)
                        # at once, not in meet: rank 0 may close right after its answer
                        self._ended |= words.endswith(_END) and not self._is_first
                        self._changed.notify_all()
                    if not words:
                        self._lose(ready.data)
                        time.sleep(_GRACE_SECONDS)
                        os._exit(LOST_EXIT)  # the main thread may wait inside nccl, deaf to exceptions

    def _lose(self, rank: int) -> None:
        """Say that a rank is dead, once, whichever thread notices first: at once, because a launcher may end
        this process before its time of grace is over."""
        with self._changed:
            if self._lost is not None:
                return
            with suppress(OSError):  # a log on a full disk must not keep this process alive
                print(
                    f"rank {rank} has died and so ends this one; {self._again} to go on from the checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
            self._lost = rank
            self._changed.notify_all()


def _connect(rank: int, size: int, again: str) -> _Line:
    """Rank 0 listens where the launcher placed it and tells the port, with a token that strangers lack, over
    the process group."""
    import paddle.distributed as dist

    host = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0].rpartition(":")[0]
    news = paddle.zeros([2], dtype="int64")
    if rank == 0:
        with socket.create_server((host, 0), backlog=size) as server:
            token = secrets.randbits(62)
            paddle.assign(paddle.to_tensor([server.getsockname()[1], token], dtype="int64"), output=news)
            dist.broadcast(news, src=0)
            return _Line(0, _accept(server, token, size), again)
    dist.broadcast(news, src=0)
    port, token = news.tolist()
    line = socket.create_connection((host, port), timeout=_GREETING_SECONDS)
    line.sendall(_GREETING.pack(token, rank))
    return _Line(rank, {0: line}, again)


def _accept(server: socket.socket, token: int, size: int) -> dict[int, socket.socket]:
    peers: dict[int, socket.socket] = {}
    server.settimeout(_GREETING_SECONDS)
    while len(peers) < size - 1:
        line, _ = server.accept()
        line.settimeout(_GREETING_SECONDS)
        greeting = line.recv(_GREETING.size, socket.MSG_WAITALL)
        came, rank = _GREETING.unpack(greeting) if len(greeting) == _GREETING.size else (None, 0)
        if came == token and 0 < rank < size and rank not in peers:
            peers[rank] = line
        else:
            line.close()
    return peers


def _keep_alive(line: socket.socket) -> None:
    """Let the kernel ask a silent peer whether it is there; no data is sent for long stretches."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # names of Linux
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(64)
    except OSError:  # reset, or no answer to the kernel's questions
        return b""


@contextmanager
def rank_scratch(parent: Path, ranks: Ranks) -> Iterator[Path | None]:
    """Context manager: all ranks have the path of one folder in `parent`, which nobody has used before; None
    where there is one rank only.

    The folder is not made here, and is removed when all ranks have left the block. A rank whose machine does
    not share `parent` gets the same path and sees only what it writes there itself. What killed runs left in
    `parent` is removed at the start.
    """
    # a name of 52 random bits, which a float64 carries: an entry of a killed run can never be taken for ours
    token = int(ranks.gather([secrets.randbits(52)])[0, 0])
    folder = parent / f"handover-{token:013x}"
    for path in parent.iterdir() if parent.is_dir() else ():
        if _SCRATCH.match(path.name) and path != folder:
            shutil.rmtree(path, ignore_errors=True)  # other ranks of this machine do the same
    try:
        yield folder if ranks.size > 1 else None
        ranks.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
