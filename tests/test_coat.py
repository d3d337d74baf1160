"""COATTrainer: what its settings choose, and that off means Paddle's own AdamW and ordinary activations."""

import json

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from pydantic import ValidationError

from ppcoat import COATConfig, COATTrainer, FP8AdamW
from ppcoat.config.schema import CoatActivationConfig, CoatConfig, CoatMemoryConfig, CoatOptimizerConfig
from ppcoat.fp8.formats import E4M3
from ppcoat.lora import inject_lora, lora_layers
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.nn.linear import FrozenLinear
from ppcoat.nn.policy import get_policy

NO_FP8_STATES = COATConfig(optimizer=CoatOptimizerConfig(use_fp8=False))
NO_FP8_ACTIVATIONS = COATConfig(activation=CoatActivationConfig(use_fp8=False))
OFF = COATConfig(enabled=False)


@pytest.fixture
def parameter():
    """[4, 256], values from a fixed seed: 8 groups of 128."""
    values = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    return paddle.create_parameter([4, 256], "float32", default_initializer=nn.initializer.Assign(values))


def test_the_config_of_the_public_name_is_on_and_that_of_a_run_is_off():
    assert COATConfig().enabled and not CoatConfig().enabled
    assert COATTrainer().config == COATConfig()
    with pytest.raises(ValidationError, match="use_fp9"):
        COATConfig(use_fp9=True)


def activation(**settings):
    return COATConfig(activation=CoatActivationConfig(**settings))


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (COATConfig(), "coat"),
        (OFF, "none"),
        (NO_FP8_ACTIVATIONS, "none"),
        (NO_FP8_STATES, "coat"),
        (activation(policy="coat+recompute"), "coat+recompute"),
        (activation(policy="none"), "none"),
        (activation(policy="coat+recompute", use_fp8=False), "none"),
    ],
)
def test_policy_and_conversion_follow_enabled_and_activation(config, policy):
    coat = COATTrainer(config)
    assert coat.policy == policy and coat.fp8_activations == (policy != "none")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in model[0].parameters():
        parameter.stop_gradient = True
    assert coat.convert(model) is model
    assert isinstance(model[0], FrozenLinear) == (policy != "none")
    assert type(model[1]) is nn.Linear  # it is trained


def test_linear_group_size_is_none_per_tensor_and_the_size_per_group():
    assert COATTrainer(COATConfig()).linear_group_size is None
    grouped = COATConfig(activation=CoatActivationConfig(linear_granularity="per_group", group_size=64))
    assert COATTrainer(grouped).linear_group_size == 64


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (OFF, 64 * 256 * 4),
        (COATConfig(), 64 * 256 + 64 * 2 * 4),  # a byte per value, a float32 scale per group of 128
        (COATConfig(activation=CoatActivationConfig(group_size=64)), 64 * 256 + 64 * 4 * 4),
        (COATConfig(activation=CoatActivationConfig(nonlinear_granularity="per_tensor")), 64 * 256 + 4),
    ],
)
def test_saved_tensors_keep_what_the_policy_promises(config, kept):
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal((64, 256), dtype=np.float32))
    x.stop_gradient = False
    with COATTrainer(config).saved_tensors() as saved:
        y = F.gelu(x)  # keeps its input and nothing else
    y.sum().backward()
    assert saved.bytes_kept == kept and saved.bytes_unpacked == 64 * 256 * 4
    assert np.isfinite(x.grad.numpy()).all()


@pytest.fixture
def transformer(build_flux):
    model = build_flux(double=1)
    inject_lora(model, rank=2, alpha=2.0)
    model.train()
    return model


def lora_inputs(model):
    """How LoRAs save their input: (policy, group size)."""
    return {(layer.policy, layer.group_size) for layer in lora_layers(model).values()}


def test_ops_and_linears_follow_policy_and_group_sizes(transformer):
    COATTrainer(OFF).convert(transformer)
    assert lora_inputs(transformer) == {("none", 128)}
    coat = COATTrainer(activation(policy="coat+recompute", linear_granularity="per_group", group_size=64))
    coat.convert(transformer)
    assert lora_inputs(transformer) == {("coat", 64)}
    assert coat.saved_tensors().policy == get_policy("coat+recompute", 64)
    coat = COATTrainer(activation(nonlinear_granularity="per_tensor"))
    coat.convert(transformer)
    assert lora_inputs(transformer) == {("coat", None)}
    assert coat.saved_tensors().policy == get_policy("coat", None)


@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize(("enabled", "efficient"), [(True, True), (True, False), (False, True)])
def test_gradient_checkpointing_of_a_flux(transformer, blocks, enabled, efficient):
    memory = CoatMemoryConfig(enable_efficient_checkpoint=efficient, checkpoint_blocks=blocks)
    coat = COATTrainer(COATConfig(enabled=enabled, memory=memory), gradient_checkpointing=True)
    coat.convert(transformer)
    assert transformer.gradient_checkpointing and transformer.checkpoint_blocks == blocks
    with coat.saved_tensors() as saved:
        assert saved.checkpoint_fmt == (E4M3 if enabled and efficient else None)
        assert saved.policy == get_policy("coat" if enabled else "none", 128)


def test_without_gradient_checkpointing_a_flux_has_none(transformer):
    COATTrainer(COATConfig()).convert(transformer)
    assert not transformer.gradient_checkpointing


def test_with_gradient_checkpointing_of_another_model_nothing_is_counted():
    coat = COATTrainer(COATConfig(), gradient_checkpointing=True)
    coat.convert(nn.Linear(2, 2))
    with coat.saved_tensors() as saved:
        assert saved is None


@pytest.mark.parametrize(
    ("config", "fmt"),
    [
        (COATConfig(), E4M3),
        (OFF, None),
        (COATConfig(memory=CoatMemoryConfig(enable_efficient_checkpoint=False)), None),
    ],
)
def test_a_nextdit_takes_hooks_and_checkpoints_in_fp8_as_the_settings_say(config, fmt):
    coat = COATTrainer(config, gradient_checkpointing=True)
    sizes = {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 8}
    coat.convert(NextDiT_CLIP(**sizes, cap_feat_dim=4, clip_text_dim=4, axes_dims=[2, 2, 4]))
    with coat.saved_tensors() as saved:
        assert saved.checkpoint_fmt == fmt and saved.policy.name == coat.policy


@pytest.mark.parametrize(
    ("config", "override", "kind"),
    [
        (COATConfig(), None, FP8AdamW),
        (NO_FP8_ACTIVATIONS, None, FP8AdamW),
        (OFF, None, paddle.optimizer.AdamW),
        (NO_FP8_STATES, None, paddle.optimizer.AdamW),
        (OFF, True, FP8AdamW),
        (COATConfig(), False, paddle.optimizer.AdamW),
    ],
)
def test_optimizer_kind_follows_config_unless_overridden(parameter, config, override, kind):
    assert type(COATTrainer(config).create_optimizer([parameter], fp8_states=override)) is kind


def test_optimizer_keeps_the_formats_and_groups_of_the_config(parameter):
    states = CoatOptimizerConfig(
        m1_format="e5m2", m2_format="e4m3", block_size=64, use_dynamic_range_expansion=False
    )
    optimizer = COATTrainer(COATConfig(optimizer=states)).create_optimizer([parameter])
    layout = json.loads(optimizer.state_dict()["layout"].numpy().tobytes())
    assert "e5m2" in layout["m1_format"] and "e4m3" in layout["m2_format"] and layout["block_size"] == 64
    # two moments of a byte per value and one float32 scale per 64 values, no exponent of an expansion
    assert optimizer.state_bytes() == 2 * (1024 + 4 * 1024 // 64)
    with_expansion = COATTrainer(COATConfig()).create_optimizer([parameter])
    assert with_expansion.state_bytes() == 2 * (1024 + 5 * 1024 // 128)


def adamw_first_step(value, grad, lr, decay, betas, epsilon, max_norm):
    """AdamW (arXiv 1711.05101) in float64 after clipping by the global norm."""
    norm = np.sqrt((grad**2).sum())
    grad = grad * min(1.0, max_norm / norm) if max_norm else grad
    m, v = (1 - betas[0]) * grad, (1 - betas[1]) * grad**2
    m_hat, v_hat = m / (1 - betas[0]), v / (1 - betas[1])
    return value * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + epsilon)


@pytest.mark.parametrize("config", [COATConfig(), OFF], ids=["fp8", "adamw"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1000.0])
def test_settings_reach_the_optimizer(parameter, config, max_norm):
    """A large epsilon makes the size of the gradient, and so the clipping, visible in the first step. Moments
    are rounded only when they are stored, after it."""
    settings = {"lr": 0.05, "weight_decay": 0.3, "betas": (0.8, 0.95), "epsilon": 0.1}
    optimizer = COATTrainer(config).create_optimizer([parameter], max_grad_norm=max_norm, **settings)
    before = parameter.numpy().astype(np.float64)
    factors = np.random.default_rng(2).standard_normal((4, 256), dtype=np.float32)
    (parameter * paddle.to_tensor(factors)).sum().backward()
    optimizer.step()
    wanted = adamw_first_step(before, factors.astype(np.float64), 0.05, 0.3, (0.8, 0.95), 0.1, max_norm)
    np.testing.assert_allclose(parameter.numpy(), wanted, atol=2e-6)


def test_off_is_bit_equal_to_paddles_adamw():
    def train(make_optimizer):
        paddle.seed(0)
        layer = nn.Linear(8, 8)
        optimizer = make_optimizer(layer.parameters())
        x = paddle.to_tensor(np.random.default_rng(3).standard_normal((4, 8), dtype=np.float32))
        for _ in range(5):
            (layer(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.clear_grad()
        return layer.weight.numpy()

    ours = train(lambda parameters: COATTrainer(OFF).create_optimizer(parameters, lr=1e-2))
    theirs = train(
        lambda parameters: paddle.optimizer.AdamW(
            1e-2,
            parameters=parameters,
            weight_decay=0.01,
            epsilon=1e-8,
            grad_clip=nn.ClipGradByGlobalNorm(1.0),
        )
    )
    np.testing.assert_array_equal(ours, theirs)


def test_the_two_line_use_trains(parameter):
    optimizer = COATTrainer(COATConfig()).create_optimizer([parameter], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (parameter - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_a_generator_of_parameters_and_a_schedule_are_taken(parameter):
    schedule = paddle.optimizer.lr.LambdaDecay(1e-2, lambda step: 0.5**step)
    for config in (COATConfig(), OFF):
        optimizer = COATTrainer(config).create_optimizer((p for p in [parameter]), schedule)
        assert optimizer.get_lr() == schedule()


def test_stochastic_rounding_of_the_config_leaves_no_master_copy():
    parameter = paddle.ones([64, 128]).astype("bfloat16")
    parameter.stop_gradient = False
    states = COATConfig(optimizer=CoatOptimizerConfig(stochastic_rounding=True))
    assert "master" in COATTrainer(COATConfig()).create_optimizer([parameter]).state_dict()
    assert "master" not in COATTrainer(states).create_optimizer([parameter]).state_dict()
