"""The plan of a NewBie-image run against the counters of training and Paddle's allocator; 3B by shapes."""

import gc
from dataclasses import dataclass

import numpy as np
import paddle
import pytest

from ppcoat.cli.plan import settings_toml
from ppcoat.coat import COATTrainer, prepare
from ppcoat.config.newbie import load_newbie_config
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.lora import adapter_layers
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.policy import POLICIES
from ppcoat.objective import NewbieFlowMatching
from ppcoat.plan import newbie as plan_newbie
from ppcoat.plan.model import EncoderSizes
from ppcoat.plan.newbie import NewbieMemoryModel
from ppcoat.plan.phases import Settings
from ppcoat.plan.settings import as_given, plan, with_memory_plan, with_settings

CAPTION_WIDTH, POOLED_WIDTH = 96, 64
TARGETS = ("attention.qkv", "attention.out", "feed_forward.w2", "time_text_embed.1")
TOML = (
    '[Model]\nbase_model_path = "no/such/newbie"\noutput_name = "run"\n'
    'train_data_dir = "no/such/pictures"\nresolution = 768\nlora_rank = 32\n'
)


@dataclass(frozen=True)
class Case:
    """A small NextDiT_CLIP and a batch: heads of head_dim channels, key heads, layers; rows x columns image
    tokens and words."""

    head_dim: int
    heads: int
    key_heads: int
    layers: int
    batch: int
    grid: tuple[int, int]
    words: int

    @property
    def settings(self) -> dict:
        d = self.head_dim
        return {"dim": d * self.heads, "n_layers": self.layers, "n_heads": self.heads,
                "n_kv_heads": self.key_heads, "multiple_of": 64, "cap_feat_dim": CAPTION_WIDTH,
                "clip_text_dim": POOLED_WIDTH, "axes_dims": (d // 2, d // 4, d // 4)}  # fmt: skip


SIZES = (Case(96, 4, 2, 3, 1, (12, 12), 40), Case(96, 3, 1, 3, 2, (8, 16), 48))
WIDE = Case(32, 12, 6, 3, 1, (8, 8), 80)  # wider than the small copies
NONE, COAT, RECOMPUTE, ATTENTION = POLICIES


@pytest.fixture
def make_config(tmp_path):
    """make_config("train.steps=3", ...) -> RunConfig for a GPU; no folder exists: NewBie-image 3B."""
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    return lambda *overrides: load_newbie_config(file, ("device=gpu", "coat.enabled=true", *overrides))


@pytest.fixture
def small_config(make_config):
    """small_config(policy, kind) -> RunConfig of an adapter of rank 4."""

    def make(policy: str, kind: str = "lora") -> RunConfig:
        config = make_config("device=cpu", f"coat.activation.policy={policy}", f"network.type={kind}")
        network = {"linear": 4, "linear_alpha": 4.0, "targets": TARGETS, "dropout": 0.0}
        return config.model_copy(update={"network": config.network.model_copy(update=network)})

    return make


def planned(config: RunConfig, case: Case) -> NewbieMemoryModel:
    memory = NewbieMemoryModel(config, False, case.settings)
    memory.image_tokens, memory.text_tokens = case.grid[0] * case.grid[1], case.words
    memory.tokens = memory.image_tokens + case.words
    return memory


class Training:
    """Steps of the real model with the real parts of a run."""

    def __init__(self, config: RunConfig, case: Case, checkpointed: int = 0, quantize: str | bool = False):
        self.model = NextDiT_CLIP(**case.settings)
        if quantize:
            quantize_linears(self.model, quantize)
        memory = config.coat.memory.model_copy(update={"checkpoint_blocks": checkpointed or None})
        self.coat = COATTrainer(config.coat.model_copy(update={"memory": memory}), checkpointed > 0)
        prepare(self.model, self.coat, config.network)
        rng, (rows, columns) = np.random.default_rng(0), case.grid
        shapes = {"latents": (16, 2 * rows, 2 * columns), "cap_feats": (case.words, CAPTION_WIDTH),
                  "clip_text_pooled": (POOLED_WIDTH,)}  # fmt: skip
        self.batch = {
            name: paddle.to_tensor(rng.standard_normal((case.batch, *shape), dtype=np.float32))
            for name, shape in shapes.items()
        } | {"cap_mask": paddle.ones([case.batch, case.words], dtype="int64")}

    def forward(self):
        with self.coat.saved_tensors() as saved:
            return NewbieFlowMatching().loss(self.model, self.batch, np.random.default_rng(0)), saved

    def growth(self) -> int:
        """Most bytes by which a step grows what Paddle has allocated; a second step grows it by the same."""
        core = paddle.base.core
        gc.collect()  # what earlier tests left must not go meanwhile
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        loss, _ = self.forward()
        loss.backward()
        return core.host_memory_stat_peak_value("Allocated", 0) - before


@pytest.mark.parametrize(
    ("case", "policy", "quantize", "kind"),
    [
        (WIDE, NONE, False, "lora"),
        (WIDE, COAT, False, "lora"),
        pytest.param(WIDE, RECOMPUTE, False, "lora", marks=pytest.mark.slow),
        (WIDE, ATTENTION, False, "lora"),
        (SIZES[1], NONE, "fp8", "lora"),
        pytest.param(SIZES[1], NONE, "fp4", "lora", marks=pytest.mark.slow),
        (WIDE, COAT, False, "lokr"),
    ],
    ids=["none", "coat", "recompute", "attention", "FP8 base", "FP4 base", "lokr"],
)
def test_kept_bytes_are_those_that_training_counts(small_config, case, policy, quantize, kind):
    config = small_config(policy, kind)
    kept, _ = planned(config, case).activations(Settings(policy, 0, quantize, 0, case.batch, 1))
    training = Training(config, case, quantize=quantize)
    assert adapter_layers(training.model)
    counted = training.forward()[1].bytes_kept
    print(f"{kind} {policy} fp8 base {quantize}: planned {kept / 1e6:.2f} MB, counted {counted / 1e6:.2f} MB")
    # the sides of a LoKr's matrices are no straight line in the width
    assert kept == pytest.approx(counted, rel=0.02 if kind == "lokr" else 0.005)


@pytest.mark.parametrize(("policy", "layers"), [(NONE, 3), (COAT, 1), (COAT, 3), (ATTENTION, 3)])
def test_kept_bytes_with_checkpointed_layers_are_those_that_training_counts(small_config, policy, layers):
    config, case = small_config(policy), SIZES[1]
    settings = Settings(policy, layers, False, 0, case.batch, 1)
    kept = planned(config, case).saved_after_forward(settings, case.layers)
    counted = Training(config, case, layers).forward()[1].bytes_kept
    print(f"{policy}, {layers} layers: planned {kept / 1e6:.2f} MB, counted {counted / 1e6:.2f} MB")
    assert kept == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("case", "policy", "checkpointed", "base"),
    [
        (SIZES[0], NONE, False, False),
        (SIZES[1], NONE, True, False),
        pytest.param(SIZES[0], COAT, False, "int8", marks=pytest.mark.slow),
        pytest.param(SIZES[1], COAT, True, False, marks=pytest.mark.slow),
        (SIZES[1], RECOMPUTE, False, False),
        pytest.param(SIZES[0], ATTENTION, False, "fp4", marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value.heads} heads" if isinstance(value, Case) else str(value),
)
def test_allocated_memory_of_a_step_agrees(small_config, case, policy, checkpointed, base):
    config = small_config(policy)
    memory = planned(config, case)
    settings = Settings(policy, case.layers * checkpointed, base, 0, case.batch, 1)
    step = next(p.parts for p in memory.phases(settings) if p.name == "forward, backward")
    expected = sum(step[name] for name in ("gradients", "kept", "working"))
    grown = Training(config, case, case.layers * checkpointed, base).growth()
    unit = 4 * case.batch * memory.tokens * memory.model.width
    scores = case.heads * memory.tokens / memory.model.width
    print(f"{policy} {base} ck {checkpointed} sc {scores:.2f}: planned {expected / 1e6:.1f} MB, measured "
          f"{grown / 1e6:.1f} MB; U: kept {step['kept'] / unit:.1f} work {step['working'] / unit:.1f} "
          f"grads {step['gradients'] / unit:.2f} measured {grown / unit:.1f}")  # fmt: skip
    assert expected == pytest.approx(grown, rel=0.10)


def test_newbie_3b_by_its_shapes(make_config):
    memory = NewbieMemoryModel(make_config("model.quantize=true"), on_gpu=True)
    model = memory.model
    assert model.assumed and model.parameters == 3_486_636_096
    assert len(model.blocks) == 36 and len(model.linears) == 246 and model.width == 2304
    assert memory.base_by_swapped(False)[0] == 2 * 3_486_636_096
    assert memory.base_by_swapped("fp8")[0] == pytest.approx(3_486_636_096, rel=0.002)
    # of 10 swapped layers two stay: qkv, out, three of the feed-forward, modulation, norms
    layer = 2304 * (2304 + 2 * 768) + 2304**2 + 3 * 2304 * 9216 + 1024 * 4 * 2304
    saved = memory.base_by_swapped(False)[0] - memory.base_by_swapped(False)[10]
    assert saved == pytest.approx(8 * 2 * layer, rel=0.001)
    # Gemma3-4B's text layers are 3.88e9 values, and its last layer is not there; Jina CLIP's tower 0.56e9
    assert memory.model.encoders.text == pytest.approx(3.88e9 - 0.094e9 + 0.56e9, rel=0.01)
    assert sum(a * b for a, b in memory.lora) == sum(
        32 * sum(model.linears[path]) for path in model.lora_paths
    )


def fixed_parts(config: RunConfig) -> dict[str, dict[str, int]]:
    """Phase -> its parts; nothing is kept for backward, which would take seconds to count."""
    memory = NewbieMemoryModel(config, on_gpu=True)
    memory.activations = lambda settings: (0, 0)
    return {phase.name: phase.parts for phase in memory.phases(as_given(config, 36))}


def test_an_fp8_base_is_never_held_in_another_form(make_config):
    phases = fixed_parts(make_config("model.quantize=true")).values()
    held = [parts["base"] for parts in phases if "base" in parts]
    assert held and max(held) == pytest.approx(3_486_636_096, rel=0.002)


def test_all_encoders_are_there_while_any_encodes(make_config):
    phases = fixed_parts(make_config())
    encoders = NewbieMemoryModel(make_config(), on_gpu=True).model.encoders
    held = 2 * encoders.text + 4 * encoders.vae  # the VAE is float32
    assert phases["captions"]["encoders"] == phases["pictures"]["encoders"] == held


@pytest.fixture
def narrow(monkeypatch):
    """A model of NewBie-image's depth, but soon counted; encoders of a million values."""
    sizes = {"dim": 256, "n_heads": 8, "n_kv_heads": 4, "axes_dims": (16, 8, 8), "cap_feat_dim": 96}

    class Narrow(NextDiT_CLIP):
        @classmethod
        def from_config(cls, own):
            return NextDiT_CLIP(**sizes)

    monkeypatch.setattr(plan_newbie, "NextDiT_CLIP", Narrow)
    monkeypatch.setattr(plan_newbie, "_encoders", lambda folder: EncoderSizes(10**6, 10**6, 8, 2048, 32))


def test_the_choice_is_among_what_newbie_has(make_config, narrow):
    budget = 2.6
    config = make_config("memory=auto", f"vram_gb={budget}", "model.quantize=false")
    memory = NewbieMemoryModel(config, on_gpu=True)
    assert memory.policies == POLICIES and memory.checkpoint_counts == range(37)
    found = plan(config, NewbieMemoryModel, budget)
    assert found.total <= budget * 1e9 and not found.settings.quantize
    for policy in memory.policies:
        for checkpointed in (0, 12, 36):
            for swapped in (0, 20):
                other = Settings(policy, checkpointed, False, swapped, 1, 1)
                total = max(phase.total for phase in memory.phases(other))
                assert total > budget * 1e9 or memory.seconds(other) >= found.seconds
    applied = with_memory_plan(config, NewbieMemoryModel)
    assert as_given(applied, 36) == found.settings
    with pytest.raises(ConfigError, match="nothing fits into 1 GB: the smallest possible need is"):
        plan(config, NewbieMemoryModel, 1)


def test_without_coat_nothing_is_packed(make_config):
    assert NewbieMemoryModel(make_config("coat.enabled=false"), on_gpu=True).policies == (NONE,)


@pytest.mark.parametrize(
    "settings", [Settings(COAT, 0, "fp8", 7, 1, 3), Settings(ATTENTION, 12, False, 0, 2, 1)]
)
def test_the_advice_is_read_back_as_the_choice(make_config, tmp_path, settings):
    file = tmp_path / "advised.toml"
    file.write_text(TOML + settings_toml(settings) + "\n[coat]\nenabled = true\n")
    assert as_given(load_newbie_config(file), 36) == settings
    assert as_given(with_settings(make_config(), settings), 36) == settings
