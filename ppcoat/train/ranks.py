"""Data parallelism over a handful of parameters: which rank this is, and the few things ranks do together.

    python -m paddle.distributed.launch --nproc_per_node 2 train_scripts/train_flux_lora.py run.yaml

Each rank computes its slice of the global batch; the gradients of the trained parameters are averaged, and a
few numbers for the log; nothing else is exchanged. gloo on CPU, nccl on GPU. The frozen base is whole on
every rank: no sharding. Files go from the first rank to the others by a folder that is gone when they have
read them.

Two ranks with one picture each do what one rank with two does, up to rounding, where a picture does not see
its neighbours: without COAT, and with per-group scales. A per-tensor scale (coat.activation's default for
linear layers) is that of the pictures of one rank, so another split quantises a little differently.

Beside Paddle's process group the ranks hold one plain TCP connection each to rank 0 (rank_line.py). gloo
gives up after 30 seconds, and rank 0 may well take longer to encode a data set or to draw previews: ranks
meet over these connections before they exchange anything. And these tell at once that a rank has died, and
within a bound that one hangs, where nccl would wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import select
import shutil
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.paddle import load, save

from ppcoat.errors import ConfigError
from ppcoat.signals import held
from ppcoat.train.rank_line import (
    GREETING,
    LOST_EXIT,
    NOTICE_SECONDS,
    PACE_SECONDS,
    Line,
    Patience,
    greeting,
    keep_alive,
    say,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: asks an interface for its address
_RETRY_SECONDS = 0.1
_PIECE = 64 * 2**20  # bytes that go to the other ranks at once
_ALIKE = "start them all with the same settings, versions, model and pictures"
_SCRATCH = re.compile(r"^handover-[0-9a-f]{13}$")


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train together. Everything is free of cost where size is 1.

    All ranks must call the methods below in the same order. A rank that dies ends the others within about
    10 seconds (50 if its machine is lost), and one that shows no sign of work within the bound of `patience`,
    with one line and exit status 75: in a method below as SystemExit, elsewhere without more ado.
    """

    rank: int = 0
    size: int = 1
    _line: Line | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def current(device: str = "auto", patience: Patience = Patience()) -> Ranks:  # noqa: B008 (frozen)
        """From PADDLE_TRAINER_ID and PADDLE_TRAINERS_NUM, as paddle.distributed.launch sets them.

        Waits for all ranks and starts the process group where there is more than one. Call once, after the
        device is set and before long work. Raises ConfigError for numbers that make no sense, for a port of
        rank 0 that is in use, for ranks on different devices or versions, and for a config's `device` gpu:N
        with several ranks, which would all take the same GPU.
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
        kind = paddle.get_device().partition(":")[0]
        patience = replace(patience, computes_here=kind == "cpu")
        ranks = Ranks(rank, size, _connect(rank, size, patience))
        ranks.agree({"device": kind, "Paddle": paddle.__version__})
        ranks._join(kind)
        if rank == 0:
            print(f"{size} ranks: who shows no sign of work is waited for {patience.bound:g} s, no longer "
                  f"({patience.setting})")  # fmt: skip
        return ranks

    def _join(self, device: str) -> None:
        """Start the process group. Its store gets the port that the launcher chose for it, or another free
        one where that is taken."""
        import paddle.distributed as dist

        if device == "cpu":
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"  # a GPU wheel would take nccl for a run on CPU
            network = _interface_of(self._line.own_address)
            if network:  # gloo asks for this machine's name, which often means the loopback
                os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
        address = _store_address() if self.is_first else ""
        address = self._line.exchange(address)[0]
        name, _, port = address.rpartition(":")
        os.environ |= {"PADDLE_MASTER": address, "MASTER_ADDR": name, "MASTER_PORT": port}
        if self.rank:
            time.sleep(0.3)  # Paddle's store asks again only after 3 seconds
        what = f"the store of the process group, where rank 0 waits for all at {address}"
        with held(), self._line.transfer(what):  # it holds Python's lock: the keeper looks for SIGTERM
            dist.init_parallel_env()
        self.barrier()

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that prints, draws and saves."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when all ranks have come here, however long that takes while they show signs of work."""
        if self._line is not None:
            self._line.meet()

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises ConfigError, on all ranks, where `facts`, which JSON can hold, are not the same on all: it
        names what differs, with rank 0's value and that of the first rank that has another."""
        if self._line is None:
            return
        first, *others = map(json.loads, self._line.exchange(json.dumps(facts)))
        for rank, own in enumerate(others, start=1):
            names = [name for name in first | own if first.get(name) != own.get(name)]
            if names:
                told = [f"{name} is {first.get(name)!r} on rank 0 and {own.get(name)!r} on rank {rank}"
                        for name in names[:3]]  # fmt: skip
                more = [f"{len(names) - 3} more"] if len(names) > 3 else []
                self.close()  # they all meet this error
                raise ConfigError(f"the ranks do not start alike: {', '.join(told + more)}; {_ALIKE}")

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
            self._line.end()

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

    def hand_over(
        self, facts: Any, tensors: dict[str, dict[str, paddle.Tensor]]
    ) -> tuple[Any, dict[str, dict[str, paddle.Tensor]]]:
        """Rank 0's facts, which JSON can hold, and groups of tensors, any shape and dtype, on all ranks, bit
        for bit."""
        if self.size == 1:
            return facts, tensors
        facts, names = json.loads(self.from_first(json.dumps([facts, [*tensors]]).encode()))
        files = [self.from_first(save(tensors[name]) if self.is_first else b"") for name in names]
        return facts, {name: load(file) for name, file in zip(names, files, strict=True)}

    def from_first(self, content: bytes) -> bytes:
        """Rank 0's bytes, on all ranks; what the others give is not used."""
        if self.size == 1:
            return content
        length, found = int(self.gather([len(content)])[0, 0]), io.BytesIO()
        for start in range(0, length, _PIECE):
            piece = np.zeros(min(_PIECE, length - start), np.uint8)
            if self.is_first:
                piece[:] = np.frombuffer(content, np.uint8, len(piece), start)
            tensor = paddle.to_tensor(piece)
            self.broadcast([tensor])
            found.write(tensor.numpy().tobytes())
        return found.getvalue()

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
        if self._line is None:
            yield
            return
        with self._line.transfer():
            try:
                yield
            except (RuntimeError, OSError):  # gloo's and nccl's words for a peer that is dead or silent, too
                self._line.leave_if_lost()
                raise


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{variable}: came {text!r}, wanted a number; start with python -m paddle.distributed.launch"
        )
    return int(text)


def _first_endpoint() -> str:
    return os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]


def _interface_of(address: str) -> str | None:
    """Name of the network interface with this IPv4 address; None where that cannot be told."""
    if fcntl is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _store_address() -> str:
    """Where rank 0 can open the store of the process group now: at the launcher's address, or at another port
    where that one is taken, or is that of the ranks' own connections."""
    here, _, own = _first_endpoint().rpartition(":")
    host, _, wanted = os.environ.get("PADDLE_MASTER", "").rpartition(":")
    host = host or here
    for port in (int(wanted) if wanted.isdecimal() and wanted != own else 0, 0):
        with suppress(OSError), socket.create_server((host, port)) as server:
            return f"{host}:{server.getsockname()[1]}"
    raise ConfigError(f"rank 0 cannot listen at {host} (PADDLE_MASTER); give the launcher another --host")


def _connect(rank: int, size: int, patience: Patience) -> Line:
    """The line of this rank. Rank 0 returns at once; its first meeting waits for the others. Another waits
    for rank 0 to answer, and leaves with LOST_EXIT after the bound. Raises ConfigError where rank 0 cannot
    listen where the launcher placed it, or that is nowhere."""
    host, _, port = _first_endpoint().rpartition(":")
    if not (host and port.isdecimal() and int(port) < 65536):
        raise ConfigError(
            f"PADDLE_TRAINER_ENDPOINTS: came {_first_endpoint()!r} for rank 0, wanted host:port; start with "
            "python -m paddle.distributed.launch"
        )
    run = hashlib.sha256(os.environ["PADDLE_TRAINER_ENDPOINTS"].encode()).digest()[:16]
    if rank:
        line = _reach((host, int(port)), greeting(run, rank, size), patience)
        return Line(rank, size, line, run, patience)
    try:
        return Line(rank, size, socket.create_server((host, int(port)), backlog=size), run, patience)
    except OSError as error:
        busy = "another program uses that port: " if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(
            f"rank 0 cannot listen at {host}:{port} ({error.strerror}); {busy}start again, or give the "
            "launcher another --start_port or --host"
        ) from None


def _reach(address: tuple[str, int], words: bytes, patience: Patience) -> socket.socket:
    """A connection on which rank 0 has answered the greeting `words`."""
    where = f"rank 0, which does not answer at {address[0]}:{address[1]}"
    limit = f"{patience.bound:g} s ({patience.setting})"
    waited, noted, line = 0.0, False, None
    while waited < patience.bound:
        before, slot = time.monotonic(), min(PACE_SECONDS, patience.bound - waited)
        try:
            if line is None:
                line = socket.create_connection(address, timeout=slot)
                line.sendall(words)
            if select.select([line], [], [], slot)[0]:
                answer = line.recv(GREETING.size, socket.MSG_WAITALL)
                if answer[:24] == words[:24]:
                    return keep_alive(line)
                raise ConnectionError("a stranger, or rank 0 with its ranks complete")
        except OSError:
            if line is not None:
                line.close()
            line = None
            time.sleep(_RETRY_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped while it waited for {where}")
            raise
        waited += min(time.monotonic() - before, 2 * PACE_SECONDS)  # one that was stopped has not waited
        if waited >= NOTICE_SECONDS and not noted:
            noted = True
            say(f"waits for {where}, since {waited:.0f} s; ends after {limit}")
    say(f"waited {limit} for {where}; its log may say why; {patience.again}")
    raise SystemExit(LOST_EXIT)


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
