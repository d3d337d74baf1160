"""Does COAT train as well as float32? Quickstart's LoRA under every saving policy, with several seeds.

    one set of drawings  ->  per seed: AdamW and ordinary activations, then FP8 states with each policy  ->
    final loss and motif rate beside those of float32

On a CPU two runs train in parallel; each prints to a log in the output folder. The results of finished runs
are written to parity.json there, and a second call with the same settings runs only those that are missing.
With another number of --samples it draws again without training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ppcoat.atomic import write_text
from ppcoat.bench.flags import ParityFlags
from ppcoat.bench.parallel_jobs import PARALLEL_JOBS, Job, batched, run_parallel
from ppcoat.bench.quickstart import (
    draw_data,
    draw_prompts,
    final_loss,
    loaded,
    motif_rate,
    remove_earlier,
)
from ppcoat.config.flags import from_flags
from ppcoat.config.load import JSON_ENDINGS, YAML_ENDINGS, load_config, read_config_text
from ppcoat.config.schema import RunConfig
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError, printable
from ppcoat.infer.garment_scores import held_out_garments
from ppcoat.nn.policy import POLICIES
from ppcoat.reading import json_value, regular_bytes
from ppcoat.train.run import train_lora

FLOAT32 = "float32"
MAX_RESULTS_BYTES = 16 << 20
WANTED_LOSS, WANTED_RATE = 0.01, 0.05  # greatest difference from float32


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(ParityFlags, arguments)
    tune_host()
    for name in ("steps", "samples"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    folder = Path(flags.output_dir)
    settings = {
        "config": read_config_text(Path(flags.config), (*YAML_ENDINGS, *JSON_ENDINGS)),
        "overrides": flags.overrides,
        "steps": flags.steps,
    }
    results = earlier_results(folder / "parity.json", settings)
    missing = {}
    for seed in flags.seeds:
        for policy in (FLOAT32, *POLICIES[1:]):
            if results.get(f"{policy}/{seed}", {}).get("samples") != flags.samples:
                missing[f"{policy}/{seed}"] = run_config(flags, policy, seed)
    if missing and not results:
        draw_data(next(iter(missing.values())))
    for keys in batched(missing, PARALLEL_JOBS):
        jobs = [Job(key, _measured_run, (missing[key], results.get(key, {}), flags.samples),
                    folder / f"{missing[key].name}.log") for key in keys]  # fmt: skip
        results |= dict(zip(keys, run_parallel(jobs, missing[keys[0]].device), strict=True))
        content = {"settings": settings, "results": results}
        write_text(folder / "parity.json", json.dumps(content, indent=2) + "\n")
    print(parity_table(results, flags.seeds))


def earlier_results(file: Path, settings: dict) -> dict[str, dict]:
    """Results that an earlier call wrote. Raises ConfigError if it had other settings."""
    try:
        content = json_value(regular_bytes(file, MAX_RESULTS_BYTES))
        known, results = content["settings"], dict(content["results"])
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is damaged ({printable(error)}): remove it") from None
    if known != settings:
        raise ConfigError(f"{file} has results of other settings: remove it, or choose another --output_dir")
    return results


def run_config(flags: ParityFlags, policy: str, seed: int) -> RunConfig:
    """The settings of one run; float32 is COAT off."""
    coat = ["coat.enabled=false"] if policy == FLOAT32 else [f"coat.activation.policy={policy}"]
    run = [
        f"name={policy.replace('+', '_')}_{seed}",
        f"output_dir={flags.output_dir}",
        f"datasets.0.folder_path={Path(flags.output_dir) / 'data'}",
        f"train.steps={flags.steps}",
        f"seed={seed}",
        "sample.sample_every=0",
    ]
    return load_config(flags.config, [*flags.overrides, *run, *coat])


def _measured_run(config: RunConfig, found: dict, samples: int) -> dict[str, float]:
    """The results `found` of an earlier call, or of `trained` if there are none, with the motif rate."""
    found = found or trained(config)
    return found | {"motif": rate_of(config, samples), "samples": samples}


def trained(config: RunConfig) -> dict[str, float]:
    """Train a run from the start -> loss (mean of the last 50 steps), kept_mib (saved for backward), seconds.

    A checkpoint without results is removed, because it does not contain the losses of its steps.
    """
    remove_earlier(config.run_dir, "config.yaml")
    result = train_lora(config)
    return {
        "loss": final_loss(result),
        "kept_mib": result.bytes_kept / 2**20,
        "seconds": result.seconds,
    }


def rate_of(config: RunConfig, samples: int) -> float:
    """Share of pictures with the motif, drawn with the LoRA of a finished run."""
    pipeline = loaded(config)
    pipeline.load_lora_weights(config.run_dir / f"{config.name}.safetensors")
    prompts = [f"{config.trigger_word} {garment.caption}" for garment in held_out_garments(samples)]
    return motif_rate(draw_prompts(pipeline, prompts, config))


def parity_table(results: dict[str, dict], seeds: list[int]) -> str:
    """One row per policy: means over the seeds, and the difference from float32 that is furthest from 0."""
    lines = [f"{'':26s}{'loss':>8s}{'worst':>9s}{'motif':>8s}{'worst':>8s}{'mean':>8s}{'kept MiB':>10s}"]
    for policy in (FLOAT32, *POLICIES[1:]):
        runs, exact = ([results[f"{p}/{seed}"] for seed in seeds] for p in (policy, FLOAT32))
        losses = [run["loss"] / other["loss"] - 1 for run, other in zip(runs, exact, strict=True)]
        rates = [run["motif"] - other["motif"] for run, other in zip(runs, exact, strict=True)]
        row = f"{policy:26s}{np.mean([run['loss'] for run in runs]):8.4f}{100 * furthest(losses):+8.2f}%"
        row += f"{np.mean([run['motif'] for run in runs]):8.1%}{100 * furthest(rates):+8.1f}"
        lines.append(f"{row}{100 * np.mean(rates):+8.1f}{np.mean([run['kept_mib'] for run in runs]):10.2f}")
    lines.append(
        f"{len(seeds)} seeds; losses wanted within {WANTED_LOSS:.0%} of float32, motif rates within "
    )
    lines[-1] += f"{100 * WANTED_RATE:.0f} points"
    return "\n".join(lines)


def furthest(differences: list[float]) -> float:
    """The one furthest from zero."""
    return max(differences, key=abs)
