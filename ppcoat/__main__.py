"""python -m ppcoat <command>, and the way in of the scripts: signals are taken before all else."""

import sys

from ppcoat import signals


def start(command: str | None = None) -> int:
    """Run a command with the flags of this process -> exit status. command: None: its name comes first among
    the flags."""
    try:
        return signals.finished(_status_of(command))
    except BaseException:
        if not signals.came():
            raise
        return signals.finished(0)


def _status_of(command: str | None) -> int:
    signals.take()
    from ppcoat.cli import main as table

    try:
        return table.main() if command is None else table.run(command)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        raise


if __name__ == "__main__":
    sys.exit(start())
