"""The connections that ranks hold beside Paddle's process group, and the watch over them: nobody waits for a
rank that is dead, or longer than a bound for one that shows no sign of work. Knows nothing of Paddle.

Rank 0 listens at the first of the launcher's endpoints; every other rank has one plain TCP connection to it.
Over it ranks meet before they exchange anything, exchange short texts, and send a beat now and then.

A beat is a sign of work, not of life: a thread sends it where the main thread waits for the others, or has
moved since the last one (rank_keeper.py). So a stopped process sends none, nor does one that hangs inside of
a call: a lock, a disk, a card, a network. A loop that never ends is taken for work.

Rank 0 judges the others, and they judge rank 0: who sent nothing for the bound while somebody waited for it
(or stood still itself) ends the run, and every rank says which it was. The bound counts the time that the
waiting process itself ran: a machine that sleeps, or a launcher stopped with all its ranks, ends nothing.

A process that is stopped, or hangs in a library that holds Python's lock (Paddle's store does), cannot end
itself. So every rank has a keeper (rank_keeper.py) that ends it.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ppcoat.train.rank_keeper import place_of_work, signs_of_work, start_keeper

LOST_EXIT = 75  # EX_TEMPFAIL of <sysexits.h>: the same command may well succeed the next time
_GRACE_SECONDS = 5.0  # for a rank to end by itself, with its own message, after another has died
NOTICE_SECONDS = 60.0  # of waiting, after which a line says for whom
PACE_SECONDS = 5.0  # between two beats; a bound has ten at least
_GREETING_SECONDS = 2.0
_MOST_OF_TEXT = 16 * 2**20
_KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 50_000))
GREETING = struct.Struct("<8s16sqq")  # magic, run, rank, size
_MAGIC = b"ppcoat-1"
_FRAME = struct.Struct("<cI")  # kind; a rank, or the length of the text that follows
_READY, _END, _BEAT, _TEXT, _DIED, _SILENT = b"r", b"e", b"b", b"t", b"d", b"s"
_AT_WORK, _ALL = 2**32 - 1, 2**32 - 2  # instead of a rank


@dataclass(frozen=True)
class Patience:
    """How long a rank is waited for while it shows no sign of work, in seconds, and what sets that; what to
    do when a run has ended for it."""

    bound: float = 600.0
    setting: str = "train.rank_timeout"
    again: str = "run the same command again"
    computes_here: bool = True  # and not on a card


class Line:
    """Rank 0's connections to all others, or another rank's one connection to rank 0.

    A thread reads them, beats and watches. A peer that closes its end without having said that the run is
    over is dead. A line on stderr says so at once, `meet` leaves with SystemExit(LOST_EXIT), and after a time
    of grace the process ends wherever its main thread stands.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        link: socket.socket,
        run: bytes = b"",
        patience: Patience = Patience(),  # noqa: B008 (frozen)
    ) -> None:
        """link: of rank 0 the socket that listens for the others, of another rank its connection. run: 16
        bytes that the ranks of one run share."""
        self._rank, self._size, self._run, self.patience = rank, size, run, patience
        others = range(1, size) if rank == 0 else [0]
        self._peers: dict[int, socket.socket] = {} if rank == 0 else {0: link}
        self._server = link if rank == 0 else None
        self._arrived = dict.fromkeys(others, 0)  # words of each peer that no meeting has used yet
        self._texts: dict[int, list[str]] = {each: [] for each in others}
        self._silence = dict.fromkeys(others, 0.0)  # seconds since a peer was heard
        self._doing = dict.fromkeys(others, _AT_WORK)  # for whom a peer waits
        self._waited: float | None = None  # seconds of the main thread's waiting; None: it is at work
        self._transfers = self._noted = self._ended = False
        self._lost: int | None = None
        self._missing: Callable[[], list[int]] | None = None
        self._signs, self._stood = 0, 0.0  # of work, and seconds without a new one
        self._unread = dict.fromkeys(others, b"")
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._pace = min(PACE_SECONDS, patience.bound / 10)
        self._keeper: int | None = start_keeper(rank, patience.bound, patience.setting, patience.again)
        self._selector = selectors.DefaultSelector()
        self._selector.register(link, selectors.EVENT_READ, 0)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def own_address(self) -> str:
        """This machine's address on the way to the others; once they have met."""
        return next(iter(self._peers.values())).getsockname()[0]

    def meet(self, word: bytes = _READY) -> None:
        """Wait for all ranks: the others report to rank 0, which answers when all have. Leaves with
        LOST_EXIT if one is dead, or silent for too long."""
        if self._rank:
            self._send(_FRAME.pack(word, 0))
        with self._waiting(lambda: [rank for rank, words in self._arrived.items() if not words]):
            for rank in self._arrived:
                self._arrived[rank] -= 1
            self._ended = word == _END
        if not self._rank:
            self._send(_FRAME.pack(word, 0))

    def end(self) -> None:
        """The last meeting: from here on it is no accident if a rank ends."""
        self.meet(_END)

    def exchange(self, text: str) -> list[str]:
        """A text of every rank, by rank, on all of them. Leaves as `meet` does."""
        if self._rank:
            self._send_text(text)
            with self._waiting(lambda: [0] * (len(self._texts[0]) < self._size)):
                found, self._texts[0] = self._texts[0][: self._size], self._texts[0][self._size :]
            return found
        with self._waiting(lambda: [rank for rank, texts in self._texts.items() if not texts]):
            found = [text, *(texts.pop(0) for texts in self._texts.values())]
        for each in found:
            self._send_text(each)
        return found

    @contextmanager
    def transfer(self, what: str = "an exchange of all ranks") -> Iterator[None]:
        """Context manager: the main thread is inside of the process group, which all ranks have entered.
        what: it does there, for the keeper's words."""
        self._tell_keeper(what)
        with self._changed:
            self._waited, self._noted, self._transfers = 0.0, False, True
        try:
            yield
        finally:
            with self._changed:
                self._waited, self._transfers = None, False
            self._tell_keeper("its own work")

    def leave_if_lost(self) -> None:
        """After an error of the process group: leave with LOST_EXIT if a rank is dead or silent, also if the
        news of it is still on its way: it comes from rank 0, which may take its time of grace first."""
        silent = [rank for rank, seconds in self._silence.items() if seconds > 2.5 * self._pace]
        if silent:
            self._lose(silent[0], _SILENT)
        with self._changed:
            if self._changed.wait_for(lambda: self._lost is not None, timeout=_GRACE_SECONDS + 2):
                raise SystemExit(LOST_EXIT)

    @contextmanager
    def _waiting(self, missing: Callable[[], list[int]]) -> Iterator[None]:
        """Context manager: nobody is missing any more, and this thread has the lock. missing: tells whom the
        main thread still waits for."""
        with self._changed:
            self._waited, self._noted, self._missing = 0.0, False, missing
            try:
                self._changed.wait_for(lambda: self._lost is not None or not missing())
                if self._lost is not None:
                    raise SystemExit(LOST_EXIT)
                yield
            except (KeyboardInterrupt, SystemExit):
                if self._lost is None:  # a signal
                    told = ", ".join(map(str, missing()))
                    say(f"rank {self._rank} was stopped while it waited for rank {told}")
                raise
            finally:
                self._waited = self._missing = None

    def _send(self, content: bytes) -> None:
        for rank, peer in list(self._peers.items()):
            try:
                with self._sending:
                    peer.sendall(content)
            except OSError:
                self._lose(rank, _DIED)
                raise SystemExit(LOST_EXIT) from None

    def _send_text(self, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        assert len(content) <= _MOST_OF_TEXT
        self._send(_FRAME.pack(_TEXT, len(content)) + content)

    def _watch(self) -> None:
        """The thread: hears at once, looks around at every pace."""
        before, alive = time.monotonic(), True
        while alive:
            for ready, _ in self._selector.select(max(0.0, before + self._pace - time.monotonic())):
                if ready.fileobj is self._server:
                    self._accept()
                elif not self._hear(ready.data, ready.fileobj):
                    alive = False
            now = time.monotonic()
            if now >= before + self._pace:
                self._look(min(now - before, 2 * self._pace))  # a process that was stopped has not waited
                before = now
            if self._lost is not None:
                time.sleep(_GRACE_SECONDS)
                os._exit(LOST_EXIT)  # the main thread may wait inside nccl, deaf to exceptions
        keeper, self._keeper = self._keeper, None
        os.close(keeper)

    def _accept(self) -> None:
        """A connection at rank 0's port: of a rank that was not there yet, or of a stranger."""
        line, _ = self._server.accept()
        with suppress(OSError):
            line.settimeout(_GREETING_SECONDS)
            came = line.recv(GREETING.size, socket.MSG_WAITALL)
            magic, run, rank, size = GREETING.unpack(came) if len(came) == GREETING.size else (b"",) * 4
            known = (magic, run, size) == (_MAGIC, self._run, self._size)
            if known and rank in self._arrived and rank not in self._peers:
                line.sendall(greeting(self._run, 0, self._size))
                self._silence[rank] = 0.0
                self._peers[rank] = keep_alive(line)
                self._selector.register(line, selectors.EVENT_READ, rank)
                if len(self._peers) == self._size - 1:
                    self._selector.unregister(self._server)
                    self._server.close()
                return
        line.close()

    def _hear(self, rank: int, line: socket.socket) -> bool:
        """Take in what a peer sent -> whether to listen on."""
        try:
            came = line.recv(65536)
        except OSError:  # reset, or no answer to the kernel's questions
            came = b""
        with self._changed:
            self._silence[rank] = 0.0
            content = self._unread[rank] + came
            while len(content) >= _FRAME.size:
                kind, number = _FRAME.unpack_from(content)
                end = _FRAME.size + (number if kind == _TEXT else 0)
                if len(content) < end:
                    break
                self._take(rank, kind, number, content[_FRAME.size : end])
                content = content[end:]
            self._unread[rank] = content
            self._changed.notify_all()
            if not came and self._ended:
                return False
        if not came:
            self._lose(rank, _DIED)
        return True

    def _take(self, rank: int, kind: bytes, number: int, text: bytes) -> None:
        if kind in (_READY, _END):
            self._arrived[rank] += 1
            # at once, not in meet: rank 0 may close right after its answer
            self._ended |= kind == _END and self._rank > 0
        elif kind == _TEXT:
            self._texts[rank].append(text.decode("utf-8", "surrogatepass"))
        elif kind in (_DIED, _SILENT):
            self._lose(number, kind)
        self._doing[rank] = number if kind == _BEAT else _AT_WORK

    def _look(self, passed: float) -> None:
        """What is due at a pace: a beat, a line about who is waited for, the end of waiting."""
        self._tell_keeper("")
        signs = signs_of_work(self.patience.computes_here)
        with self._changed:
            for rank in self._silence:
                self._silence[rank] += passed
            moved, self._signs = signs != self._signs, signs
            self._stood = 0.0 if moved or self._waited is not None else self._stood + passed
            self._waited = None if self._waited is None else self._waited + passed
            waited, transfers = self._waited, self._transfers
            missing = self._missing() if self._missing is not None else [*self._peers] if transfers else []
        waits_for = _ALL if transfers else missing[0] if missing else 0
        if waited is not None or moved:
            self._beat(_AT_WORK if waited is None else waits_for)
        if self._ended or self._lost is not None:
            return
        late = max(waited or 0.0, self._stood) >= self.patience.bound
        silent = self._silent(late, missing)
        if silent is not None:
            self._lose(silent, _SILENT)
        elif late and transfers:
            self._lose(_ALL, _SILENT)
        elif waited is not None and waited >= NOTICE_SECONDS and not self._noted:
            self._noted = True
            say(self._notice(waited, waits_for))

    def _silent(self, late: bool, missing: list[int]) -> int | None:
        """The first peer that ends the run by its silence. late: this rank has waited, or stood, for the
        bound."""
        for rank, silence in self._silence.items():
            # who has arrived waits, and so would beat; who waits for this one and has not arrived never will
            elsewhere = late and rank in missing and self._doing[rank] == self._rank
            if (silence >= self.patience.bound and (late or self._arrived[rank])) or elsewhere:
                return rank
        return None

    def _tell_keeper(self, what: str) -> None:
        """That this process runs, and what its main thread goes into."""
        if self._keeper is not None:
            with suppress(OSError):  # it has not read for long, or was killed
                os.write(self._keeper, what.encode() + b"\n")

    def _beat(self, waits_for: int) -> None:
        """Send a sign of work, which says for whom this rank waits."""
        beat = _FRAME.pack(_BEAT, waits_for)
        for peer in list(self._peers.values()):
            if self._sending.acquire(blocking=False):  # busy: a word is on its way, which says as much
                with suppress(OSError):  # a full buffer: the peer has not read for long
                    peer.send(beat, socket.MSG_DONTWAIT)
                self._sending.release()

    def _notice(self, waited: float, rank: int) -> str:
        """The line that a long wait is worth."""
        start = f"rank {self._rank} waits for "
        told = self._doing.get(rank, _AT_WORK)
        if rank == _ALL or told == _ALL:
            what = f"{start}an exchange of all ranks"
        elif told != _AT_WORK and told != self._rank:
            what = f"{start}rank {told}"  # rank 0 does
        elif rank not in self._peers:
            what = f"{start}rank {rank}, which has not come"
        elif self._silence[rank] > 2.5 * self._pace:
            what = f"{start}rank {rank}, of which there is no sign"
        else:
            return f"{start}rank {rank}, which is at work, since {waited:.0f} s"
        limit = f"{self.patience.bound:g} s without a sign of work end the run ({self.patience.setting})"
        return f"{what}, since {waited:.0f} s; {limit}"

    def _lose(self, rank: int, why: bytes) -> None:
        """Say why this rank ends, once, whichever thread notices first, and tell the others: at once, because
        a launcher may end this process before its time of grace is over."""
        with self._changed:
            if self._lost is not None:
                return
            self._lost = rank
            say(f"{self._reason(rank, why)}; {self.patience.again} to go on from the checkpoint")
            news = _FRAME.pack(why, rank)
            free = self._sending.acquire(timeout=1)
            for peer in self._peers.values() if self._rank == 0 or rank == 0 else ():
                with suppress(OSError):
                    peer.send(news, socket.MSG_DONTWAIT)
            if free:
                self._sending.release()
            self._changed.notify_all()

    def _reason(self, rank: int, why: bytes) -> str:
        bound, setting = f"{self.patience.bound:g} s", self.patience.setting
        if why == _DIED:
            return f"rank {rank} has died and so ends this one"
        if rank == _ALL:
            return f"an exchange of all ranks has not ended in {bound} ({setting}): look at the network"
        if rank == self._rank:
            where = place_of_work()
            return f"the others have waited {bound} for this rank, {rank}, and ended; it stood in {where}"
        if self._rank == 0 and rank not in self._peers:
            return f"waited {bound} for rank {rank}, which has not come ({setting}); its log may say why"
        return f"rank {rank} was waited for and showed no sign of work: {setting} is {bound}"


def greeting(run: bytes, rank: int, size: int) -> bytes:
    """What a rank says first, and rank 0 answers. run: 16 bytes that the ranks of one run share."""
    return GREETING.pack(_MAGIC, run, rank, size)


def keep_alive(line: socket.socket) -> socket.socket:
    """The same connection, of which the kernel finds out whether the peer is there: within 50 seconds."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        if hasattr(socket, option):  # names of Linux
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line


def say(text: str) -> None:
    """A line for the log of this rank. One on a full disk must not keep the process alive."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
