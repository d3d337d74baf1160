"""Several machines: network namespaces of this one, with a launcher and one rank each. They train together,
with an output folder that they share and with one of their own each; a rank that is killed, and a line that
is cut, end both, and the same commands go on and end with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from counts import judge
from rank_strikes import parts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES, ADDRESSES = ("ppcoat_a", "ppcoat_b"), ("10.231.77.1", "10.231.77.2")
MASTER = f"{ADDRESSES[0]}:8090"


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two network namespaces, joined by one line, eth0 in each."""
    if not shutil.which("ip"):
        pytest.skip("needs ip of iproute2")
    remove = [("netns", "delete", name) for name in NAMES]
    for words in remove:
        ip(*words)
    first = ip("netns", "add", NAMES[0])
    if first.returncode:
        pytest.skip(f"no network namespaces here: {first.stderr.strip()}")
    ip("netns", "add", NAMES[1])
    line = ip(
        "link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1]
    )
    try:
        if line.returncode:
            pytest.skip(f"no veth here: {line.stderr.strip()}")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for each in ("lo", "eth0"):
                ip("-n", name, "link", "set", each, "up")
        yield NAMES
    finally:
        for words in remove:
            ip(*words)


class Cluster:
    """A run on two machines, again and again. own: each has an output folder of its own."""

    def __init__(self, folder, write_run, data, own):
        self.folder, self.launchers = folder, []
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
            command = ["ip", "netns", "exec", name, sys.executable, *launch, str(HERE / "struck_train.py"),
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
@pytest.mark.parametrize("own", [False, True], ids=["shared folder", "own folders"])
def test_two_machines_train_and_end_and_go_on_together(own, machines, tmp_path, write_run, drawings):
    drawings(tmp_path / "data", 6)
    expected, where = None, "own folders" if own else "a shared folder"
    for number, (strike, said) in enumerate(CASES):
        cluster = Cluster(tmp_path / f"case{number}", write_run, tmp_path / "data", own)
        began = time.monotonic()
        cluster.start(strike)
        codes = cluster.codes(150)
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
        right = right and None not in codes and 0 not in codes
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
