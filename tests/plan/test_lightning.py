"""The plan of a distillation: heads by their real shapes, saved bytes by the counters of a real step."""

import gc
import math

import numpy as np
import paddle
import pytest

from ppcoat.coat import COATTrainer
from ppcoat.config.lightning import lightning_config
from ppcoat.distill.discriminator import Discriminator, Head, discriminator_hinge
from ppcoat.distill.objective import Distillation, Terms
from ppcoat.lora import inject_lora
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.plan.lightning import HEAD_WORKING, Heads, LightningMemoryModel
from ppcoat.plan.phases import MemoryModel

SMALL = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 40,
    "axes_dims_rope": (8, 28, 28),
}
TOKENS, TEXT = 144, 64


def planned(settings=SMALL, **flags) -> LightningMemoryModel:
    """On the CPU with pictures of 192 x 192 where nothing else is said."""
    given = {"data_path": "none", "pretrained_teacher_model": "no/such", "resolution": 192, "device": "cpu",
             "max_sequence_length": TEXT, "gradient_checkpointing": True, **flags}  # fmt: skip
    return LightningMemoryModel(lightning_config(given), flags.get("device") == "gpu", settings)


def phase(memory: LightningMemoryModel, name: str) -> dict[str, int]:
    return next(p.parts for p in memory.phases(memory.settings) if p.name == name)


@pytest.mark.parametrize("width", [128, 256])
def test_heads_have_the_parameters_of_the_discriminator(width):
    shapes = sorted(map(tuple, (p.shape for p in Head(width, 0).parameters())))
    heads = Heads(57, width)
    assert sorted(heads.shapes()) == shapes
    assert heads.bytes_of_one == 4 * sum(map(math.prod, shapes))
    assert Heads(57, 3072).bytes_of_one * 57 == 4 * 57 * 18_895_873  # 2 (d^2 + d) + 4 d + d + 1


def test_heads_keep_one_byte_for_a_second_moment_and_none_for_a_first():
    memory = planned()
    parameters = 5 * memory.heads.bytes_of_one / 4
    assert 1.0 < memory.head_states / parameters < 1.15
    assert planned(fp8_optimizer=False, saving_policy="none").head_states == 8 * parameters


@pytest.mark.parametrize(
    ("checkpointing", "flags"),
    [
        (True, {}),
        (False, {"apply_reflow_loss": True}),
        (True, {"adv_weight": 0.0}),
        pytest.param(False, {}, marks=pytest.mark.slow),
        pytest.param(True, {"apply_reflow_loss": True}, marks=pytest.mark.slow),
        pytest.param(False, {"adv_weight": 0.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kept_bytes_are_those_that_a_step_counts(flags, checkpointing, monkeypatch):
    # what a head keeps is gone when the next one runs, but the counter adds it up
    monkeypatch.setattr(Head, "forward", lambda self, x: x.mean(-1, keepdim=True))
    memory = planned(gradient_checkpointing=checkpointing, saving_policy="coat", **flags)
    config = memory.lightning
    coat = COATTrainer(memory.config.coat, checkpointing)
    model = FluxTransformer2DModel(**SMALL)
    inject_lora(model, 32, 32, policy=coat.policy, group_size=coat.linear_group_size)
    coat.convert(model)
    model.train()
    rng = np.random.default_rng(0)

    def normal(*shape):
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))

    batch = {"latents": normal(1, 16, 24, 24), "prompt_embeds": normal(1, TEXT, 48), "pooled": normal(1, 40)}
    terms = Terms(adv_weight=config.adv_weight, reflow_weight=0.01 * config.apply_reflow_loss)
    heads = Discriminator(model) if config.adv_weight else None
    objective = Distillation(terms=terms, discriminator=heads)
    drawn = objective.draw(batch, rng)
    with coat.saved_tensors() as saved:
        objective.losses_at(model, batch, *drawn)
    parts = phase(memory, "LoRA's step")
    expected = parts["kept"] + parts["head features"]
    if (
        checkpointing
    ):  # the plan's peak is in the backward of blocks, when the rest has gone; here it is there
        expected += (1 + bool(heads) + config.apply_reflow_loss) * memory.saved(memory.settings).outside
        # its loss saves the prediction (64 channels in FP8, a scale) twice more than flow matching does
        expected += 2 * TOKENS * (64 + 4)
        assert saved.bytes_kept == pytest.approx(expected, rel=0.06)
    else:  # the teacher's pass keeps less than a student's, for which it is counted
        assert 0.8 * expected < saved.bytes_kept < 1.01 * expected


def test_working_memory_of_a_head_is_what_paddle_allocates():
    head, core = Head(128, 0), paddle.base.core
    x = paddle.randn([1, 2048, 128])
    for _ in range(2):  # the second time the gradients are there
        gc.collect()
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        discriminator_hinge(head(x), True).backward()
        grown = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert pytest.approx(grown / (4 * x.size), rel=0.1) == HEAD_WORKING


def test_phases_of_flux_dev_at_1024():
    flags = {"settings": None, "resolution": 1024, "device": "gpu", "use_dmd_loss": True}
    memory = planned(apply_reflow_loss=True, max_sequence_length=512, **flags)
    assert memory.image_tokens == 4096 and memory.heads.count == 57
    step, update = phase(memory, "heads' step"), phase(memory, "their update")
    assert step["heads"] == step["head gradients"] == 57 * 18_895_873 * 4
    assert update["working"] == 2 * update["heads"] // 57  # of one head
    features = phase(memory, "LoRA's step")["head features"]
    assert features == 57 * 4096 * 3072 * 2
    lora = MemoryModel(memory.config, on_gpu=True).phases(memory.settings)[3].parts
    assert phase(memory, "LoRA's step")["kept"] == 3 * lora["kept"]
    assert max(p.total for p in memory.phases(memory.settings)) < 40e9
    fp8 = planned(quantize="fp8", apply_reflow_loss=True, max_sequence_length=512, **flags)
    assert max(p.total for p in fp8.phases(fp8.settings)) < 28e9


def test_the_next_window_is_encoded_below_the_peak_of_the_steps():
    """Of FLUX.1-dev at 1024; T5-XXL, CLIP-L and the VAE have 4.969 G parameters, a single block 141.6 M."""
    block = 2 * (3072 * 21504 + 21504 + 15360 * 3072 + 3072 + 3072 * 9216 + 9216 + 2 * 128)
    for base in (False, "fp8", "fp4"):
        flags = {"settings": None, "resolution": 1024, "device": "gpu", "quantize": base}
        memory = planned(max_sequence_length=512, use_dmd_loss=True, apply_reflow_loss=True, **flags)
        totals = {p.name: p.total for p in memory.phases(memory.settings)}
        assert totals["window"] < totals["heads' step"] * (1 if base == "fp4" else 0.95)
        window, step = phase(memory, "window"), phase(memory, "heads' step")
        assert window["encoders"] == pytest.approx(2 * 4.969e9, rel=1e-3)
        left = step["base"] - window["base"]
        if base == "fp4":  # all its blocks weigh less than the encoders
            assert left == pytest.approx(step["base"], rel=0.01)
        else:
            assert window["encoders"] <= left < window["encoders"] + block
        assert window["heads"] == step["heads"] and "head gradients" not in window
        if not base:
            assert left == 36 * block
    assert phase(planned(), "window")["base"] == phase(planned(), "heads' step")["base"]  # on a CPU


def test_without_the_adversarial_loss_there_are_no_heads():
    memory = planned(adv_weight=0.0)
    names = [p.name for p in memory.phases(memory.settings)]
    assert "heads' step" not in names and "LoRA's step" in names
    assert phase(memory, "LoRA's step")["heads"] == memory.head_states == 0
