"""The adapter files of a NewBie run: the folder of the run at the end, <run>_step_<step> at saved steps.

<output_dir>/<name>/adapter_model.safetensors, adapter_config.json     for the original's tools and PEFT
<output_dir>/<name>/<name>.safetensors                                 for ComfyUI
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.host import is_running
from ppcoat.lora import LoRASummary, save_comfyui, save_peft
from ppcoat.lora.peft import CONFIG, WEIGHTS


@dataclass(frozen=True)
class NewbieFiles:
    """Writes the adapter of `transformer`, in save.dtype."""

    config: RunConfig
    transformer: paddle.nn.Layer

    def write(self, step: int, final: bool) -> list[tuple[Path, LoRASummary]]:
        """Both forms and what they hold. Folders of steps beyond the newest save.max_step_saves_to_keep are
        removed afterwards, and drafts of killed processes; the files of the end are always kept."""
        config, dtype = self.config, self.config.save.dtype
        folder = config.run_dir if final else self._folder_of(step)
        targets, dropout = config.network.targets or (), config.network.dropout
        summary = save_peft(folder, self.transformer, targets, dropout, dtype)
        alone = folder / f"{config.name}.safetensors"
        written = [(folder / WEIGHTS, summary), (alone, save_comfyui(alone, self.transformer, dtype))]
        self._remove_old(step)
        return written

    def _folder_of(self, step: int) -> Path:
        return self.config.run_dir.with_name(f"{self.config.name}_step_{step}")

    def _remove_old(self, step: int) -> None:
        """Only files that `write` makes; later steps belong to a history that was given up, and stay."""
        name, files = re.escape(self.config.name), (WEIGHTS, CONFIG, f"{self.config.name}.safetensors")
        found = [re.fullmatch(rf"{name}_step_([0-9]+)", path.name)
                 for path in self.config.run_dir.parent.iterdir() if path.is_dir()]  # fmt: skip
        steps = sorted(int(match[1]) for match in found if match)
        for folder in (self.config.run_dir, *map(self._folder_of, steps)):
            for file in files:
                for draft in folder.glob(f".{glob.escape(file)}.tmp-*"):
                    process = draft.name.rpartition("-")[2]
                    if process.isdecimal() and not is_running(int(process)):
                        draft.unlink()
        history = [number for number in steps if number <= step]
        for old in history[: -self.config.save.max_step_saves_to_keep]:
            folder = self._folder_of(old)
            for file in files:
                (folder / file).unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
