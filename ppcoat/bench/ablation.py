"""Which loss of FLUX-Lightning does what: a student distilled with each, one after another, and scored.

    consistency  ->  + adversarial  ->  + DMD  ->  + reflow  ->  all of them as the published code has them

The LoRA of every student gets the same number of steps; adversarial heads, if there are any, get as many
more. On a CPU two students train at the same time. All are compared with the same samples of the teacher. A
second call with the same flags uses the students that are finished.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppcoat.atomic import write_text
from ppcoat.bench.flags import AblationFlags
from ppcoat.bench.parallel_jobs import PARALLEL_JOBS, Job, batched, run_parallel
from ppcoat.config.flags import from_flags
from ppcoat.config.lightning import lightning_config
from ppcoat.device import tune_host
from ppcoat.distill.flux_lightning import train_flux_lightning
from ppcoat.errors import ConfigError
from ppcoat.infer.garment_scores import SampleScores, compare_students
from ppcoat.reading import read_json

SHARED: dict[str, Any] = {
    "resolution": 64, "guidance_scale": 1.5, "train_batch_size": 16, "lora_rank": 64,
    "num_euler_timesteps": 20, "use_distill_loss": True, "loss_type": "l2", "learning_rate": 2e-3,
    "lr_scheduler": "cosine", "lr_warmup_steps": 25, "saving_policy": "none", "validation_steps": 0,
}  # fmt: skip
ADVERSARIAL = {"adv_weight": 0.02, "adv_lr": 1e-3}
DMD = ADVERSARIAL | {"use_dmd_loss": True, "dmd_weight": 0.01}
REFLOW = DMD | {"apply_reflow_loss": True, "reflow_loss_weight": 0.01}
STUDENTS: dict[str, dict[str, Any]] = {
    "consistency": {"adv_weight": 0.0},
    "+ adversarial": ADVERSARIAL,
    "+ DMD": DMD,
    "+ reflow": REFLOW,
    "all, --compat reference": REFLOW | {"compat": "reference"},
}


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(AblationFlags, arguments)
    for name in ("lora_steps", "samples"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    tune_host()
    folder = Path(flags.output_dir)
    files: dict[str, Path] = {}
    for names in batched(STUDENTS, PARALLEL_JOBS):
        jobs = [
            Job(f"student: {name}", _distilled, (flags, folder, name),
                folder / f"{run_name(flags, name)}.log")
            for name in names
        ]  # fmt: skip
        files |= dict(zip(names, run_parallel(jobs), strict=True))
    scores, _ = compare_students(flags.model, files, flags.samples, batch_size=50)
    content = {"settings": asdict(flags), "scores": [asdict(row) for row in scores]}
    write_text(folder / "ablation.json", json.dumps(content, indent=2) + "\n")
    print(ablation_table(scores))


def _distilled(flags: AblationFlags, folder: Path, name: str) -> Path:
    """The LoRA file of one student, which is trained if the file is missing. Raises ConfigError if the folder
    has students with other settings."""
    losses = SHARED | STUDENTS[name]
    steps = flags.lora_steps * (2 if losses["adv_weight"] else 1)
    run = run_name(flags, name)
    config = lightning_config(
        losses
        | {
            "data_path": flags.data_path,
            "pretrained_teacher_model": flags.model,
            "output_dir": str(folder),
            "tracker_project_name": run,
            "lr_warmup_steps": min(losses["lr_warmup_steps"], flags.lora_steps // 10),
            "max_train_steps": steps,
            "checkpointing_steps": steps,
            "seed": flags.seed,
        }
    )
    file, settings = folder / run / f"{run}.safetensors", folder / run / "ablation.json"
    wanted = config.model_dump(mode="json")
    if file.exists() and settings.exists():
        if read_json(settings, f"{folder} holds no whole student: remove it") != wanted:
            raise ConfigError(f"{folder} has students of other settings: remove it, or choose another")
        return file
    file = train_flux_lightning(config).lora_file
    write_text(settings, json.dumps(wanted))
    return file


def run_name(flags: AblationFlags, name: str) -> str:
    """Name of the run, and of the folder, of one student."""
    return f"student{list(STUDENTS).index(name)}-{flags.lora_steps}-{flags.seed}"


def ablation_table(scores: list[SampleScores]) -> str:
    """One row for each set of samples; the last column is its distance divided by the teacher's at few
    steps."""
    few = next(row for row in scores if row.frechet)
    lines = [f"{'':34s}{'kind':>8s}{'colour':>8s}{'pattern':>9s}{'Frechet':>9s}{'share':>7s}"]
    for row in scores:
        facts = f"{row.kind:8.1%}{row.colour:8.1%}{row.pattern:9.1%}"
        line = f"{f'{row.who}, {row.steps} steps':34s}{facts}"
        lines.append(line + (f"{row.frechet:9.2f}{row.frechet / few.frechet:7.2f}" if row.frechet else ""))
    return "\n".join(lines)
