"""The LoRA files of a run: <name>.safetensors at the end and <name>_000000250.safetensors at saved steps.

A format other than diffusers' has its name at the end: <name>_kohya.safetensors. Every file is written whole
or not at all and read back (ppcoat/lora/writing.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.host import is_running
from ppcoat.lora import LoRASummary, save_lora


@dataclass(frozen=True)
class LoRAFiles:
    """Writes the LoRA of `transformer` in every format of save.format, in save.dtype."""

    config: RunConfig
    transformer: paddle.nn.Layer

    def write(self, step: int, final: bool) -> list[tuple[Path, LoRASummary]]:
        """One file per format and what it holds. Files of steps beyond the newest
        save.max_step_saves_to_keep are removed afterwards, and drafts of killed processes; those of the end
        are always kept."""
        config = self.config
        stem = config.name if final else f"{config.name}_{step:09d}"
        written = []
        for file_format in config.save.format:
            ending = "" if file_format == "diffusers" else f"_{file_format}"
            path = config.run_dir / f"{stem}{ending}.safetensors"
            summary = save_lora(
                path,
                self.transformer,
                trigger_word=config.trigger_word or "",
                step=step,
                base_model=Path(config.model.name_or_path).name,
                dtype=config.save.dtype,
                file_format=file_format,
            )
            written.append((path, summary))
        self._remove_old(step)
        return written

    def _remove_old(self, step: int) -> None:
        """Only names that `write` gives; later steps belong to a history that was given up, and stay."""
        stem, ending = re.escape(self.config.name), r"(?:_kohya|_paddle)?\.safetensors"
        files = [(number, path) for number, path in self._named(rf"{stem}_([0-9]{{9}}){ending}")
                 if number <= step]  # fmt: skip
        kept = sorted({number for number, _ in files})[-self.config.save.max_step_saves_to_keep :]
        for number, path in files:
            if number not in kept:
                path.unlink()
        for process, draft in self._named(rf"\.{stem}(?:_[0-9]{{9}})?{ending}\.tmp-([0-9]+)"):
            if not is_running(process):
                draft.unlink()

    def _named(self, pattern: str) -> list[tuple[int, Path]]:
        """Files of the run whose name is `pattern`, each with the number in it."""
        found = [(re.fullmatch(pattern, path.name), path) for path in self.config.run_dir.iterdir()]
        return [(int(match[1]), path) for match, path in found if match]
