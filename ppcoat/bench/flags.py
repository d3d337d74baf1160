"""Flags and cases of the commands here, whose own modules take seconds to import: help is quick."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ppcoat.bench.kernels import KernelFlags
from ppcoat.config.base import BaseFormat
from ppcoat.config.flags import CONFIGS, TINY_FLUX, add_flags, flag, set_flag
from ppcoat.errors import ConfigError
from ppcoat.nn.policy import check_policy

if TYPE_CHECKING:
    from ppcoat.config.schema import RunConfig

CONFIG = CONFIGS / "quickstart.yaml"
TEACHER = "/".join(Path(TINY_FLUX).parts[-3:])  # as the repository sees it: students' settings name it
HEAD_DIM = 64
TEXT_WIDTH, POOLED_WIDTH, LATENT_CHANNELS = 4096, 768, 16  # of FLUX.1: T5-XXL, CLIP-L, autoencoder
PIXELS = 128  # side of the picture of `benchmark full_size`
DEMOS = {  # name -> module and class
    "edit": ("ppcoat.bench.demo_editing", "Edit"),
    "try_on": ("ppcoat.bench.demo_editing", "TryOn"),
    "inpaint": ("ppcoat.bench.demo_pictures", "Inpaint"),
    "style": ("ppcoat.bench.demo_pictures", "Style"),
    "preserve": ("ppcoat.bench.demo_preserve", "Preserve"),
}


@dataclass(frozen=True)
class QuickstartFlags:
    """Settings of `quickstart`."""

    config: str = flag(
        "config of the run (default: configs/quickstart.yaml)", str(CONFIG), shows_default=False
    )
    samples: int = flag("pictures drawn for each rate", 100)
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class DemoFlags:
    """Settings of `demo`."""

    name: str = flag(f"what to show: {', '.join(DEMOS)}", positional=True, choices=DEMOS, metavar="name")
    samples: int = flag("pictures per measured rate", 100)
    output_dir: str = flag("folder for data, run and sheets of all demonstrations", "output/demo")
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class ParityFlags:
    """Settings of `parity`. config: the file; what the runs differ in is set on top of it."""

    config: str = flag(
        "config of the runs (default: configs/quickstart.yaml)", str(CONFIG), shows_default=False
    )
    steps: int = flag("steps of each run", 400)
    seeds: list[int] = flag("seeds of the runs", [0, 1, 2])
    samples: int = flag("pictures per motif rate", 600)
    output_dir: str = flag("folder for runs and results", "output/parity")
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class AblationFlags:
    """Settings of `ablation`."""

    data_path: str = flag("folder of pictures with captions")
    model: str = flag("teacher: a FLUX folder", TEACHER)
    output_dir: str = flag("folder for runs and results", "output/ablation")
    lora_steps: int = flag("steps of each LoRA", 250)
    samples: int = flag("pictures per score", 1000)
    seed: int = flag("seed of the trainings", 0)


@dataclass(frozen=True)
class FirstlightFlags:
    """Settings of `firstlight`."""

    output: str = flag("JSON file to write", "firstlight.json")
    small: bool = flag("tiny sizes, to try the command itself; always so on a CPU", False)


@dataclass(frozen=True)
class BenchmarkCase:
    """One variant to measure. Sizes of the model and of a batch, what is trained, and how.

    hidden_size: head_dim per head. num_layers: a third double blocks, the rest single blocks. tokens: image
    tokens, one for 16 x 16 pixels. fp8_states: FP8AdamW instead of AdamW. policy: what is saved for backward.
    full_training: all parameters are trained instead of a LoRA of `rank`. Raises ConfigError for a wrong
    value.
    """

    hidden_size: int = flag("width of the model, a multiple of 64", 1024)
    num_layers: int = flag("blocks: a third double, the rest single", 8)
    batch_size: int = flag("pictures in a step", 4)
    tokens: int = flag("image tokens; 256 are a picture of 256 x 256 pixels, 4096 one of 1024 x 1024", 256)
    text_tokens: int = flag("text tokens", 64)
    rank: int = flag("rank of the LoRA", 16)
    fp8_states: bool = False
    policy: str = "none"
    gradient_checkpointing: bool = False
    head_dim: int = HEAD_DIM
    full_training: bool = flag("train all parameters, not a LoRA", False)
    seed: int = flag("seed of weights and data", 0)
    device: str = flag("auto, cpu, gpu or gpu:N", "auto")

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "batch_size", "tokens", "text_tokens", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.head_dim:
            nearest = self.head_dim * max(1, round(self.hidden_size / self.head_dim))
            raise ConfigError(
                f"hidden_size must be a multiple of {self.head_dim} (channels per head), got "
                f"{self.hidden_size}; the nearest is {nearest}"
            )
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if check_policy(self.policy) not in ("none", "coat") and self.full_training:
            raise ConfigError(
                f"policy {self.policy!r} rebuilds what a frozen block needs; with full_training use 'coat'"
            )

    @property
    def blocks(self) -> tuple[int, int]:
        """Double and single blocks; FLUX.1 has 19 and 38."""
        double = round(self.num_layers / 3)
        return double, self.num_layers - double

    @property
    def settings(self) -> dict:
        """Of the FluxTransformer2DModel."""
        double, single = self.blocks
        return {
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.hidden_size // self.head_dim,
            "joint_attention_dim": TEXT_WIDTH,
            "pooled_projection_dim": POOLED_WIDTH,
            "axes_dims_rope": (self.head_dim // 8, *(7 * self.head_dim // 16,) * 2),  # as FLUX.1 divides 128
        }

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens, as near to a square as `tokens` can be split."""
        rows = next(n for n in range(math.isqrt(self.tokens), 0, -1) if self.tokens % n == 0)
        return rows, self.tokens // rows

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height in pixels of a picture of `tokens` tokens."""
        from ppcoat.models.pictures import TOKEN_SIDE

        rows, columns = self.token_grid
        return columns * TOKEN_SIDE, rows * TOKEN_SIDE


@dataclass(frozen=True)
class BenchmarkFlags:
    """Settings of the command beside those of a BenchmarkCase. Raises ConfigError for numbers out of range,
    and for flags that contradict each other."""

    num_steps: int = flag("steps of each variant", 50)
    memory_budget_gb: float | None = flag("also find the largest batch within so many GB (1e9 bytes)", None)
    use_fp8_activation: bool = flag("save activations in FP8, too, not only optimizer states", False)
    policy: str | None = flag("saving policy of these activations (default: coat)", None)
    output: str = flag("JSON file to write, with the plot beside it as .png", "benchmark_results.json")

    def __post_init__(self) -> None:
        if self.policy is not None and not self.use_fp8_activation:
            raise ConfigError(f"--policy {self.policy} has no effect alone: add --use_fp8_activation")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")
        budget = self.memory_budget_gb
        if budget is not None and not 0 < budget < math.inf:
            raise ConfigError(f"memory_budget_gb must be a positive number, got {budget}")


def flux_dev() -> dict:
    """FLUX.1-dev's settings."""
    from ppcoat.plan.model import FLUX_DEV

    return dict(FLUX_DEV)


@dataclass(frozen=True)
class FullSizeCase:
    """Settings of the command. settings: of the FluxTransformer2DModel, by default FLUX.1-dev's. Raises
    ConfigError for a number out of range."""

    folder: Path = flag(
        "folder for the weights: 31 GB must be free there, 36 GB for a base of 8 bits",
        Path("output/full_size"),
        shows_default=False,
    )
    base: BaseFormat = flag("format of the base weights", "fp4")
    steps: int = flag("LoRA steps", 2)
    text_tokens: int = flag("text tokens beside the 64 image tokens", 64)
    seed: int = flag("seed of weights and data", 0)
    settings: dict = field(default_factory=flux_dev)

    def __post_init__(self) -> None:
        for name, least, most in (("steps", 1, 1000), ("text_tokens", 1, 512), ("seed", 0, 2**31)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: came {getattr(self, name)}, wanted {least} to {most}")

    @property
    def weights(self) -> Path:
        """The component folder of the random transformer."""
        return self.folder / "transformer"

    def config(self) -> RunConfig:
        """The config of the run."""
        from ppcoat.config.schema import RunConfig

        return RunConfig.model_validate(
            {
                "name": "run",
                "output_dir": str(self.folder),
                "seed": self.seed,
                "device": "cpu",
                "model": {
                    "name_or_path": str(self.folder),
                    "quantize": self.base,
                    "quantized_beside_model": True,
                },
                "network": {"linear": 16, "linear_alpha": 16},
                "datasets": [{"folder_path": "none", "resolution": PIXELS, "bucket_rule": "square"}],
                "train": {"steps": self.steps, "max_sequence_length": self.text_tokens},
                "coat": {"enabled": True, "activation": {"policy": "coat+recompute"}},
                "sample": {"sample_every": 0},
            }
        )


@dataclass(frozen=True)
class FullSizeFlags:
    """What the command does with the numbers and with the files that it wrote."""

    delete: bool = flag("remove the weights at the end", False)
    output: Path = flag("JSON file to write", Path("full_size.json"))


@dataclass(frozen=True)
class AccuracyFlags:
    """Settings of the command."""

    output: Path | None = flag("JSON file to write the numbers to", None, metavar="FILE")


@dataclass(frozen=True)
class WeightFlags:
    """Settings of `accuracy weights`."""

    model: Path = flag("FLUX folder or file", Path(TINY_FLUX))
    base: BaseFormat = flag("format of the base weights", "fp8")
    weights_only: bool = flag("measure weights only, for models too large to run", False)
    output: Path | None = flag("JSON file to write the numbers to", None, metavar="FILE")


@dataclass(frozen=True)
class BaseFlags:
    """Settings of `accuracy bases`. config: of the LoRA runs, and its model is the one that is quantised."""

    config: str = flag(
        "config of the runs (default: configs/quickstart.yaml)", str(CONFIG), shows_default=False
    )
    steps: int = flag("steps of each LoRA", 150)
    seeds: list[int] = flag("seeds of the LoRAs", [0, 1, 2])
    samples: int = flag("pictures per Frechet distance", 200)
    output_dir: str = flag("folder for runs and results", "output/bases")
    overrides: list[str] = set_flag()


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, QuickstartFlags)


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DemoFlags)


def add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ParityFlags)


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, AblationFlags)


def add_firstlight_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, FirstlightFlags)


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, BenchmarkCase, "hidden_size", "num_layers", "batch_size")
    add_flags(parser, BenchmarkFlags, "num_steps")
    add_flags(parser, BenchmarkCase, "tokens", "text_tokens", "rank", "seed")
    add_flags(parser, BenchmarkFlags, "memory_budget_gb", "use_fp8_activation", "policy")
    add_flags(parser, BenchmarkCase, "full_training", "device")
    add_flags(parser, BenchmarkFlags, "output")
    full_size = "take LoRA steps on random weights of FLUX.1-dev's size, on the CPU"
    kernels = "measure error and speed of the Triton kernels on a card"
    others = {"full_size": (full_size, (FullSizeCase, FullSizeFlags)), "kernels": (kernels, (KernelFlags,))}
    _add_others(parser, "another measurement, with flags of its own", others)


def add_accuracy_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, AccuracyFlags)
    weights = "errors of weights in a smaller format, and of the output"
    bases = "errors, pictures and training with every format of the base"
    others = {"weights": (weights, (WeightFlags,)), "bases": (bases, (BaseFlags,))}
    _add_others(parser, "other tables, with flags of their own", others)


def _add_others(
    parser: argparse.ArgumentParser, title: str, others: Mapping[str, tuple[str, Sequence[type]]]
) -> None:
    """The name of one of these in `other`: name -> what it does, its flags."""
    subparsers = parser.add_subparsers(dest="other", title=title)
    for name, (what, kinds) in others.items():
        subparser = subparsers.add_parser(name, help=what, description=what, allow_abbrev=False)
        for kind in kinds:
            add_flags(subparser, kind)
