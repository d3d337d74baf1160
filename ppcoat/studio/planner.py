"""The memory plan while somebody types: one process that has imported Paddle and the memory models is asked
line by line, so that the page stays quick and its own process without Paddle.

    python -m ppcoat.studio.planner     {"values": {...}, "vram": 24} -> {"total": ..., "phases": [...], ...}

It ends when the studio does, and after ten minutes in which nobody asked; the next question starts another.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
from pathlib import Path
from typing import Any

from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError, printable
from ppcoat.studio.commands import child_environment
from ppcoat.studio.form import Values, form_config

_IDLE_SECONDS = 600
_ANSWER_SECONDS = 180.0
_MAX_ANSWER = 1 << 20
# What a plan may change, as the form calls it.
_SETTINGS = ("model.quantize", "model.blocks_to_swap", "model.stream_encoders", "train.batch_size",
             "train.gradient_accumulation", "train.gradient_checkpointing", "coat.activation.policy",
             "coat.memory.checkpoint_blocks")  # fmt: skip


class Planner:
    """The studio's end. cwd: the folder that relative paths in a form are meant from."""

    def __init__(self, cwd: Path) -> None:
        self._cwd, self._turn = cwd, asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def plan(self, values: Values, vram_gb: float | None) -> dict[str, Any]:
        """What `answer` says of a form. Raises ConfigError for what cannot be planned."""
        question = json.dumps({"values": values, "vram": vram_gb})
        async with self._turn:
            try:
                process = await self._started()
                process.stdin.write(question.encode() + b"\n")
                await process.stdin.drain()
                line = await asyncio.wait_for(process.stdout.readline(), _ANSWER_SECONDS)
                found = json.loads(line)
            except (OSError, ValueError, asyncio.TimeoutError) as error:
                self.close()
                raise ConfigError(f"the plan did not answer ({type(error).__name__}); try again") from None
        if "error" in found:
            raise ConfigError(found["error"])
        return found

    async def start(self) -> None:
        """Begin to import what a plan needs, before somebody asks for one."""
        async with self._turn:
            await self._started()

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "ppcoat.studio.planner",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, cwd=self._cwd, env=child_environment(), limit=_MAX_ANSWER,
            )  # fmt: skip
        return self._process


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The plan of a form: bytes by phase and component, seconds of an update (None: on a CPU, of which there
    is no model of the time), whether it fits, and the settings that would. Raises ConfigError."""
    from ppcoat.plan import GB
    from ppcoat.plan.settings import plan, plan_for_card, planned_for_gpu, with_settings
    from ppcoat.train.run import MODEL_SPECS

    config, vram_gb = form_config(question["values"]), question["vram"]
    memory_model = MODEL_SPECS[config.model.family].memory_model
    given = plan(config, memory_model) if vram_gb is None else plan_for_card(config, memory_model, vram_gb)
    on_gpu = planned_for_gpu(config, vram_gb)
    found = {
        "phases": [{"name": phase.name, "parts": phase.parts} for phase in given.phases],
        "total": given.total,
        "peak": given.peak.name,
        "settings": str(given.settings),
        "facts": given.facts,
        "seconds": given.seconds if on_gpu else None,
        "fits": None if vram_gb is None else given.total <= vram_gb * GB,
    }
    if found["fits"] is False:
        try:
            best = plan(config, memory_model, vram_gb)
        except ConfigError as error:  # nothing fits
            return found | {"nothing": printable(str(error))}
        old, new = _chosen(config), _chosen(with_settings(config, best.settings))
        changes = {key: new[key] for key in _SETTINGS if new[key] != old[key]}
        seconds = best.seconds if on_gpu else None
        found["best"] = {"total": best.total, "seconds": seconds, "changes": changes}
    return found


def _chosen(config: RunConfig) -> Values:
    """The settings that a plan may change."""
    found = {}
    for key in _SETTINGS:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    return found


def _serve() -> None:
    """Answer each line of standard input. Only answers go to standard output: what libraries print does
    not."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0] and (line := sys.stdin.readline()):
            try:
                found = answer(json.loads(line))
            except ConfigError as error:
                found = {"error": printable(str(error))}
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
