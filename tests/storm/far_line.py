"""A long line between two machines: a TAP device in each network namespace, and a thread that carries the
frames from one to the other, late, and loses some. As netem does, which few kernels of containers have."""

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress

TUNSETIFF = 0x400454CA  # <linux/if_tun.h>
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
LONGEST_FRAME = 65536


class FarLine:
    """delay: seconds that each frame takes, either way. loss: share of the frames that do not arrive."""

    def __init__(self, names, delay=0.02, loss=0.01):
        """names: of the two namespaces; each gets a card eth0."""
        self.carried = self.lost = 0
        self._delay, self._loss, self._over = delay, loss, False
        self._ends = [_card(name) for name in names]
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self):
        self._over = True
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self):
        chance, late = random.Random(0), deque()
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        while not self._over:
            wait = min(0.1, max(0.0, late[0][0] - time.monotonic())) if late else 0.1
            for end in select.select(self._ends, [], [], wait)[0]:
                frame = os.read(end, LONGEST_FRAME)
                if chance.random() < self._loss:
                    self.lost += 1
                else:
                    late.append((time.monotonic() + self._delay, other[end], frame))
            while late and late[0][0] <= time.monotonic():
                _, end, frame = late.popleft()
                with suppress(OSError):  # its card is down
                    os.write(end, frame)
                    self.carried += 1


def _card(name):
    """A descriptor of the wire's end of a new eth0 in a namespace."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "netns", name, "name", "eth0"], check=True)
    return end
