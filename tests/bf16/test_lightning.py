"""FLUX-Lightning in bfloat16: a turn of the discriminator's heads and one of the LoRA, with every loss."""

import json

import pytest
from pretended_gpu import PretendedGpu, bfloat16_noise, four_deviations

from ppcoat.config.lightning import lightning_config
from ppcoat.data import garments
from ppcoat.distill.flux_lightning import train_flux_lightning

LOSSES = ("loss_discriminator_fake", "loss_discriminator_real", "loss_consistency", "loss_reflow",
          "loss_adversarial")  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_flux):
    """train(name, flag=value, ...) -> {loss: its values} of two steps, all losses on."""
    folder = tmp_path_factory.mktemp("lightning")
    garments.write_folder(folder / "data", 2, seed=1)
    given = {
        "data_path": str(folder / "data"), "output_dir": str(folder),
        "pretrained_teacher_model": str(tiny_flux),
        "resolution": 64, "lora_rank": 4, "learning_rate": 1e-3, "adv_lr": 1e-3, "train_batch_size": 2,
        "max_train_steps": 2, "max_sequence_length": 16, "num_euler_timesteps": 20, "use_dmd_loss": True,
        "apply_reflow_loss": True, "log_every": 1, "visualdl": False, "validation_steps": 0, "device": "cpu",
    }  # fmt: skip

    def run(name, **flags):
        train_flux_lightning(lightning_config(given | {"tracker_project_name": name} | flags))
        lines = map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())
        return {key: value for line in lines for key, value in line.items() if key in LOSSES}

    return run


def changes(found, wanted):
    assert found.keys() == wanted.keys() == set(LOSSES)
    return [found[name] / wanted[name] - 1 for name in LOSSES]


@pytest.fixture(scope="module")
def exact(train):
    return train("exact")


@pytest.fixture(scope="module")
def explained(train, exact):
    """By how much losses may change: as four deviations of theirs under noise in all forward passes."""
    with bfloat16_noise(0):
        return four_deviations(changes(train("noise"), exact))


@pytest.mark.slow
def test_both_sides_have_float32s_losses(train, exact, explained, assert_as_on_a_gpu):
    with PretendedGpu() as gpu:
        found = train("half")
    assert_as_on_a_gpu(gpu, "norm_kernel", "quantize_kernel", "dequantize_kernel", "activation_kernel",
                       "rms_norm_rotated_kernel", "rms_norm_rotated_grad_kernel", "adamw_kernel")  # fmt: skip
    print(found, exact, explained)
    assert 0 < max(map(abs, changes(found, exact))) < explained


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"saving_policy": "coat+recompute+attention", "gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"quantize": "fp8", "blocks_to_swap": 2},
        {"fp8_optimizer": False, "saving_policy": "none"},
    ],
    ids=str,
)
def test_other_settings(train, explained, assert_as_on_a_gpu, flags):
    name = " ".join(map(str, flags.values()))
    wanted = train(f"exact {name}", **flags)
    with PretendedGpu() as gpu:
        found = train(f"half {name}", **flags)
    assert_as_on_a_gpu(gpu)
    assert 0 < max(map(abs, changes(found, wanted))) < explained
