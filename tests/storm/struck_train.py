"""`train`, in which the rank of STRIKE ("1:killed:in a step") is struck: for launchers."""

import os
import sys

from ppcoat.cli.main import run

if __name__ == "__main__":
    if os.environ.get("STRIKE"):
        from rank_strikes import Strike

        rank, how, where = os.environ["STRIKE"].split(":")
        if rank == os.environ["PADDLE_TRAINER_ID"]:
            Strike(int(rank), how, where).arm()
    sys.exit(run("train"))
