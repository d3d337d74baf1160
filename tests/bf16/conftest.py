"""Runs in half precision on a CPU. The harness is half_precision.py and pretended_gpu.py; here is what the
tests share."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import paddle
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests here import the two modules by name

from pretended_gpu import PretendedGpu, bfloat16_noise, four_deviations  # noqa: E402

from ppcoat.config.load import load_config  # noqa: E402
from ppcoat.config.schema import RunConfig  # noqa: E402
from ppcoat.data import garments  # noqa: E402
from ppcoat.objective import FlowMatching  # noqa: E402
from ppcoat.train import trainer  # noqa: E402
from ppcoat.train.run import train_lora  # noqa: E402

ROOT = HERE.parents[1]
TINY_FLUX = ROOT / "ppcoat" / "assets" / "tiny_flux"
SEEDS = range(3)


@dataclass
class Trained:
    """What a run of a few steps left. saved: byte counts of the last forward pass; dtypes: those of what is
    trained; explained: relative change of each step's loss under noise of the size of bfloat16's rounding."""

    config: RunConfig
    losses: list[float] = field(default_factory=list)
    saved: object = None
    dtypes: set = field(default_factory=set)
    explained: list[float] = field(default_factory=list)

    @property
    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.config.run_dir / "log.jsonl").read_text().splitlines()]


def assert_nothing_differs(gpu: PretendedGpu, *kernels: str) -> None:
    """No launcher refused a tensor or returned another dtype or shape than the reference; `kernels` were
    among those launched; only the text encoders of ppdiffusers leave it to Paddle to promote."""
    assert gpu.unsuited == {} and gpu.different == {}
    assert set(kernels) <= set(gpu.launches)
    assert [place for place in gpu.half.promoted if " encode_prompt," not in place] == []


@pytest.fixture(scope="session")
def assert_as_on_a_gpu():
    return assert_nothing_differs


@pytest.fixture(scope="session")
def tiny_flux(first_blocks):
    """The built-in FLUX with the first block of each kind alone."""
    return first_blocks(TINY_FLUX)


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_flux):
    """train(*settings, sensitivity=False) -> Trained: two steps of the small FLUX on four
    drawings, encoders included."""
    folder = tmp_path_factory.mktemp("bf16")
    garments.write_folder(folder / "data", 4, seed=1, motif="gold star", prefix="[trigger] ")

    def run(*settings: str, sensitivity: bool = False) -> Trained:
        name = f"name=run{len(list(folder.iterdir()))}"
        base = (f"output_dir={folder}", name, f"model.name_or_path={tiny_flux}", "device=cpu",
                "train.steps=2", "train.batch_size=2", "train.lr=1e-3",
                f"datasets.0.folder_path={folder / 'data'}", "network.linear=8",
                "network.linear_alpha=8", "sample.sample_every=0", "sample.sample_steps=2",
                "logging.visualdl=false", "train.max_sequence_length=16")  # fmt: skip
        done = Trained(load_config(ROOT / "configs" / "quickstart.yaml", [*base, *settings]))
        with pytest.MonkeyPatch.context() as patch:
            watch_steps(patch, done)
            if sensitivity:
                feel_noise(patch, FlowMatching, done.explained)
            done.losses = train_lora(done.config).losses
        return done

    return run


def watch_steps(patch: pytest.MonkeyPatch, done: Trained) -> None:
    step = trainer.Trainer.train_step

    def watched(self):
        result = step(self)
        done.saved, done.dtypes = result.saved, {p.dtype for p in self.side.parameters.values()}
        return result

    patch.setattr(trainer.Trainer, "train_step", watched)


def feel_noise(patch: pytest.MonkeyPatch, objective: type, explained: list[float]) -> None:
    """Each loss of a float32 run is computed again under noise, one seed after the other; `explained` gets
    the relative changes."""
    losses_at = objective.losses_at

    def felt(self, transformer, *drawn):
        found = losses_at(self, transformer, *drawn)
        with paddle.no_grad():
            for seed in SEEDS:
                with bfloat16_noise(seed):
                    noisy = losses_at(self, transformer, *drawn).mean
                explained.append(float(noisy / found.mean.detach()) - 1)
        return found

    patch.setattr(objective, "losses_at", felt)


@pytest.fixture(scope="session")
def noise_felt():
    return feel_noise


@pytest.fixture(scope="module")
def plain(train) -> Trained:
    """A float32 run without COAT."""
    return train("coat.enabled=false", sensitivity=True)


@pytest.fixture(scope="module")
def explained(plain) -> float:
    """The largest relative difference of a loss that bfloat16 explains: four standard deviations of the
    float32 run's loss under noise of the size of bfloat16's rounding."""
    assert len(plain.explained) == len(plain.losses) * len(SEEDS)
    return four_deviations(plain.explained)
