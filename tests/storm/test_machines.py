"""Several machines: network namespaces of this one, with a launcher and one rank each. They train together,
with an output folder that they share and with one of their own each, over a short line and over a long one
that loses packets. A rank that is killed, and a line that is cut, end both; the same commands go on and end
with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from counts import judge
from far_line import FarLine
from rank_strikes import parts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES, ADDRESSES = ("ppcoat_a", "ppcoat_b"), ("10.231.77.1", "10.231.77.2")
STRUCK = str(HERE / "struck_train.py")
MASTER = f"{ADDRESSES[0]}:8090"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def ranks_in(name):
    """Processes of the namespace that are ranks, not launchers."""
    words = [Path(f"/proc/{pid}/cmdline") for pid in ip("netns", "pids", name).stdout.split()]
    words = [file.read_bytes().split(b"\0") for file in words if file.exists()]
    return [each for each in words if STRUCK.encode() in each and b"paddle.distributed.launch" not in each]


@pytest.fixture
def machines(far):
    """Two network namespaces, joined by one line, eth0 in each."""
    if not shutil.which("ip"):
        pytest.skip("needs ip of iproute2")
    remove = [("netns", "delete", name) for name in NAMES]
    for words in remove:
        ip(*words)
    line = None
    try:
        for name in NAMES:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        line = join(far)
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for each in ("lo", "eth0"):
                ip("-n", name, "link", "set", each, "up")
        yield line
    finally:
        if line is not None:
            line.close()
        for words in remove:
            ip(*words)


def join(far):
    """The long line, or None: the short one is a pair of cards of the kernel's own."""
    if far:
        if not os.access("/dev/net/tun", os.W_OK):
            pytest.skip("no TAP devices here")
        return FarLine(NAMES)
    words = ["link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0"]
    made = ip(*words, "netns", NAMES[1])
    if made.returncode:
        pytest.skip(f"no veth here: {made.stderr.strip()}")
    return None


class Cluster:
    """A run on two machines, again and again. own: each has an output folder of its own."""

    def __init__(self, folder, write_run, data, own):
        self.folder, self.launchers, self.left = folder, [], []
        folder.mkdir()
        train = {"steps": 4, "batch_size": 1, "lr": 1e-2, "rank_timeout": 15}
        self.files = []
        for number in range(2):
            place = folder / (f"own{number}" if own else "shared")
            place.mkdir(exist_ok=True)
            file = write_run(place, data, train=train, coat={"optimizer": {"block_size": 16}},
                             save={"save_every": 2})  # fmt: skip
            self.files.append(file)

    def start(self, strike=""):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}
        environment |= {"PYTHONPATH": f"{ROOT}:{HERE}", "STRIKE": strike, "OMP_NUM_THREADS": "1"}
        shutil.rmtree(self.folder / "log", ignore_errors=True)
        self.launchers = []
        for number, name in enumerate(NAMES):
            launch = ["-m", "paddle.distributed.launch", "--master", MASTER, "--nnodes", "2",
                      "--rank", str(number), "--nproc_per_node", "1", "--host", ADDRESSES[number],
                      "--log_dir", str(self.folder / "log" / str(number))]  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, *launch, STRUCK,
                       str(self.files[number])]  # fmt: skip
            with open(self.folder / f"launcher.{number}", "w") as output:
                process = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=output,
                                           stderr=output, start_new_session=True)  # fmt: skip
            self.launchers.append(process)

    def codes(self, seconds):
        """Exit codes of the launchers; None for who had to be ended."""
        end = time.monotonic() + seconds
        for process in self.launchers:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        codes = [process.poll() for process in self.launchers]
        self.left = [ranks_in(name) for name in NAMES]
        for process in self.launchers:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return codes

    def said(self, rank):
        files = sorted((self.folder / "log" / str(rank)).glob("*workerlog*"))
        return "".join(file.read_text(errors="replace") for file in files)

    def result(self):
        folder = self.files[0].parent / "run"
        last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
        return [parts(path) for path in (folder / "run.safetensors", *sorted(last.glob("*.safetensors")))]


CASES = [  # strike, of whom each rank says that it was waited for or died
    ("", None),
    ("1:killed:in a step", ("rank 1 has died", None)),
    ("1:line cut:in a step", ("rank 1 ", "rank 0 ")),
    ("0:line cut:encoding", ("rank 1 ", "rank 0 ")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "far"),
    [(False, False), (True, False), (True, True)],
    ids=["shared folder", "own folders", "own folders, far"],
)
def test_two_machines_train_and_end_and_go_on_together(own, far, machines, tmp_path, write_run, drawings):
    drawings(tmp_path / "data", 6)
    expected, where = None, "own folders" if own else "a shared folder"
    where += ", a long line that loses packets" if far else ""
    for number, (strike, said) in enumerate(CASES):
        cluster = Cluster(tmp_path / f"case{number}", write_run, tmp_path / "data", own)
        began = time.monotonic()
        cluster.start(strike)
        codes = cluster.codes(120)
        left = cluster.left
        seconds, heard = time.monotonic() - began, [cluster.said(0), cluster.said(1)]
        if not strike:
            judge(
                f"two machines, {where}",
                "train",
                codes == [0, 0],
                f"{codes} {heard[0][-900:]}{heard[1][-900:]}",
            )
            expected = cluster.result() if codes == [0, 0] else None
            continue
        right = all(words is None or f"{words}" in told for words, told in zip(said, heard, strict=True))
        # where the line is cut Paddle's launcher may wait for its own master; the ranks may not
        right = right and 0 not in codes and not any(left) and ("cut" in strike or None not in codes)
        judge(f"two machines, {where}", "ends, says for whom", right,
              f"{strike}: {codes} {heard[0][-600:]} | {heard[1][-600:]}")  # fmt: skip
        for name in NAMES:
            ip("-n", name, "link", "set", "eth0", "up")
        cluster.start()
        again = cluster.codes(150)
        equal = again == [0, 0] and cluster.result() == expected
        judge(f"two machines, {where}", "resumes bit-equal", equal,
              f"{strike}: {again} {cluster.said(0)[-600:]} | {cluster.said(1)[-600:]}")  # fmt: skip
        last = [[line for line in told.splitlines() if "rank" in line][-1:] for told in heard]
        print(
            f"{where}, {strike}: {seconds:.0f} s, {codes}, {last}, resumed {again} equal {equal}", flush=True
        )
    assert machines is None or machines.lost
