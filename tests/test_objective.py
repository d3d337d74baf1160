"""The flow-matching loss against float64 NumPy, and its noise levels against their closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ppcoat.lora import inject_lora, lora_disabled
from ppcoat.lora.layer import lora_parameters
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.objective import FlowMatching, level_weights

B, C, H, W, T = 3, 2, 4, 6, 5
TOKENS = H * W // 4
QUANTILES = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
NORMAL_QUANTILES = np.array([-1.6448536, -0.6744898, 0.0, 0.6744898, 1.6448536])  # tables of the normal


class StubTransformer:
    """Keeps its arguments; `velocity` makes the prediction of them. Like the real one, it is called by
    name."""

    def __init__(self, velocity, guidance_embeds=False):
        self.velocity = velocity
        self.config = SimpleNamespace(guidance_embeds=guidance_embeds)

    def __call__(self, **arguments):
        self.arguments = arguments
        return (self.velocity(**arguments),)


def linear_velocity(hidden_states, timestep, pooled_projections, **_):
    return 0.5 * hidden_states + timestep.reshape([-1, 1, 1]) + pooled_projections.mean()


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    shapes = {"latents": (B, C, H, W), "prompt_embeds": (B, T, 8), "pooled": (B, 4)}
    return {name: paddle.to_tensor(rng.standard_normal(s, dtype=np.float32)) for name, s in shapes.items()}


@pytest.fixture
def noise():
    return np.random.default_rng(4).standard_normal((B, TOKENS, C * 4), dtype=np.float32)


def tokens_of(latents):
    """[B, C, H, W] -> [B, H/2 * W/2, C * 4] patch by patch, written as loops."""
    found = np.zeros((B, TOKENS, C * 4))
    for row in range(H // 2):
        for column in range(W // 2):
            patch = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            found[:, row * (W // 2) + column] = patch.reshape(B, -1)
    return found


def test_loss_is_the_mean_square_error_to_noise_minus_latents(batch, noise):
    sigma = np.array([0.1, 0.5, 0.9])
    transformer = StubTransformer(linear_velocity)
    loss = FlowMatching().loss_at(transformer, batch, sigma, noise)
    clean, mix = tokens_of(batch["latents"].numpy().astype(np.float64)), sigma[:, None, None]
    noisy = (1 - mix) * clean + mix * noise
    velocity = 0.5 * noisy + mix + batch["pooled"].numpy().astype(np.float64).mean()
    assert float(loss) == pytest.approx(np.mean((velocity - (noise - clean)) ** 2), rel=1e-6)
    assert loss.dtype == paddle.float32 and loss.shape == []
    np.testing.assert_allclose(transformer.arguments["hidden_states"].numpy(), noisy, atol=1e-6)


def test_target_points_from_picture_to_noise(batch, noise):
    clean = paddle.to_tensor(tokens_of(batch["latents"].numpy()), dtype="float32")
    right = paddle.to_tensor(noise) - clean
    sigma = np.array([0.2, 0.4, 0.6])
    assert float(FlowMatching().loss_at(StubTransformer(lambda **_: right), batch, sigma, noise)) < 1e-12
    backwards = FlowMatching().loss_at(StubTransformer(lambda **_: -right), batch, sigma, noise)
    assert float(backwards) == pytest.approx(4 * np.mean((noise - clean.numpy()) ** 2), rel=1e-5)


def test_transformer_gets_texts_positions_and_noise_levels(batch, noise):
    transformer = StubTransformer(linear_velocity)
    sigma = np.array([0.1, 0.5, 0.9])
    FlowMatching().loss_at(transformer, batch, sigma, noise)
    arguments = transformer.arguments
    assert arguments["encoder_hidden_states"] is batch["prompt_embeds"]
    assert arguments["pooled_projections"] is batch["pooled"]
    np.testing.assert_allclose(arguments["timestep"].numpy(), sigma, rtol=1e-7)  # in 0..1, not 0..1000
    rows_and_columns = [[0, row, column] for row in range(H // 2) for column in range(W // 2)]
    np.testing.assert_array_equal(arguments["img_ids"].numpy(), rows_and_columns)
    np.testing.assert_array_equal(arguments["txt_ids"].numpy(), np.zeros((T, 3)))


def test_half_precision_latents_are_mixed_in_float32(batch, noise):
    """The transformer gets its own dtype; the error is taken in float32 against unrounded noise."""
    batch["latents"] = batch["latents"].astype("float16")
    transformer = StubTransformer(lambda hidden_states, **_: paddle.zeros(hidden_states.shape, "float16"))
    loss = FlowMatching().loss_at(transformer, batch, np.full(B, 0.5), noise)
    assert transformer.arguments["hidden_states"].dtype == paddle.float16
    target = noise - tokens_of(batch["latents"].numpy().astype(np.float64))
    assert float(loss) == pytest.approx(np.mean(target**2), rel=1e-6)


def test_guidance_is_given_only_to_a_transformer_that_has_it(batch, noise):
    with_it, without = (StubTransformer(linear_velocity, guidance_embeds=has) for has in (True, False))
    for transformer in (with_it, without):
        FlowMatching(guidance=3.5).loss_at(transformer, batch, np.full(B, 0.5), noise)
    np.testing.assert_array_equal(with_it.arguments["guidance"].numpy(), np.full(B, 3.5, np.float32))
    assert without.arguments["guidance"] is None


def test_loss_draws_a_level_per_picture_and_normal_noise(batch):
    """Noise and levels are read back from what the transformer sees."""
    transformer = StubTransformer(linear_velocity)
    loss = FlowMatching().loss(transformer, batch, np.random.default_rng(7))
    sigma = transformer.arguments["timestep"].numpy().astype(np.float64)
    assert sigma.shape == (B,) and len(set(sigma)) == B
    clean, mix = tokens_of(batch["latents"].numpy().astype(np.float64)), sigma[:, None, None]
    noisy = transformer.arguments["hidden_states"].numpy().astype(np.float64)
    noise = (noisy - (1 - mix) * clean) / mix
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert noise.std() == pytest.approx(1, abs=0.25)
    velocity = 0.5 * noisy + mix + batch["pooled"].numpy().mean()
    assert float(loss) == pytest.approx(np.mean((velocity - (noise - clean)) ** 2), rel=1e-4)


def test_loss_depends_on_the_rng_alone(batch):
    def loss(seed, device_seed):
        paddle.seed(device_seed)
        return float(
            FlowMatching().loss(StubTransformer(linear_velocity), batch, np.random.default_rng(seed))
        )

    assert loss(1, device_seed=1) == loss(1, device_seed=2)
    assert loss(1, device_seed=1) != loss(2, device_seed=1)


def quantiles_of(timestep_type, tokens):
    """What the distribution promises, at QUANTILES."""
    if timestep_type == "sigmoid":
        return 1 / (1 + np.exp(-NORMAL_QUANTILES))
    if timestep_type == "linear":
        return QUANTILES
    # FLUX: mu is a line through (256 tokens, 0.5) and (4096 tokens, 1.15)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return math.exp(mu) / (math.exp(mu) + 1 / QUANTILES - 1)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096])
@pytest.mark.parametrize("timestep_type", ["sigmoid", "linear", "shift"])
def test_noise_levels_follow_their_distribution(timestep_type, tokens):
    drawn = FlowMatching(timestep_type).draw_sigma(np.random.default_rng(0), 200_000, tokens)
    assert drawn.dtype == np.float32 and drawn.shape == (200_000,)
    assert drawn.min() >= 0 and drawn.max() <= 1
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES), quantiles_of(timestep_type, tokens), atol=5e-3)


@pytest.mark.parametrize(
    ("timestep_type", "mean", "deviation"),
    [("sigmoid", 0.5, 0.2083), ("linear", 0.5, 12**-0.5)],  # logit-normal by quadrature; uniform
)
def test_symmetric_noise_levels_have_their_moments(timestep_type, mean, deviation):
    drawn = FlowMatching(timestep_type).draw_sigma(np.random.default_rng(1), 200_000, 256)
    assert drawn.mean() == pytest.approx(mean, abs=3e-3)
    assert drawn.std() == pytest.approx(deviation, abs=3e-3)


def test_shift_agrees_with_the_sampler():
    """The levels trained on are those that sampling visits: the scheduler shifts uniform ones alike."""
    uniform = FlowMatching("linear").draw_sigma(np.random.default_rng(5), 64, 1024)
    shifted = FlowMatching("shift").draw_sigma(np.random.default_rng(5), 64, 1024)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.sort(uniform)[::-1], mu=0.63)  # 0.5 + 0.65 * 768 / 3840
    np.testing.assert_allclose(np.sort(shifted)[::-1], scheduler.sigmas.numpy()[:-1], rtol=1e-5)


def test_noise_levels_repeat_with_the_rng():
    for timestep_type in ("sigmoid", "linear", "shift"):
        objective = FlowMatching(timestep_type)
        first, again, other = (
            objective.draw_sigma(np.random.default_rng(seed), 8, 64) for seed in (9, 9, 10)
        )
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def numpy_distance(loss_type, error):
    if loss_type == "mae":
        return np.abs(error)
    # ai-toolkit's: sqrt(e^2 + c^2) - c with c = 0.01
    return np.sqrt(error**2 + 0.01**2) - 0.01 if loss_type == "pseudo_huber" else error**2


@pytest.mark.parametrize("weight", [None, 1.0, 0.25])
@pytest.mark.parametrize("timestep_type", ["linear", "weighted"])
@pytest.mark.parametrize("loss_type", ["mse", "mae", "pseudo_huber"])
def test_loss_types_and_weights_against_float64(batch, noise, loss_type, timestep_type, weight):
    if weight is not None:
        batch["loss_weight"] = weight
    sigma = np.array([0.1, 0.5, 0.865], dtype=np.float32)
    transformer = StubTransformer(lambda hidden_states, **_: 0.5 * hidden_states)
    found = FlowMatching(timestep_type, loss_type=loss_type).losses_at(transformer, batch, sigma, noise)
    clean, mix = (
        tokens_of(batch["latents"].numpy().astype(np.float64)),
        sigma[:, None, None].astype(np.float64),
    )
    error = 0.5 * ((1 - mix) * clean + mix * noise) - (noise - clean)
    of_pictures = numpy_distance(loss_type, error).mean((1, 2))
    levels = [0.716, (0.817 * 48 + 0.997 * 88) / 136, 1.52] if timestep_type == "weighted" else 1.0
    mean = (of_pictures * levels).mean() * (1.0 if weight is None else weight)
    np.testing.assert_allclose(found.of_pictures.numpy(), of_pictures, rtol=1e-5)
    assert float(found.mean) == pytest.approx(mean, rel=1e-5)
    assert found.of_pictures.stop_gradient


def test_gradients_of_loss_types(batch, noise):
    """d/de: 2e, sign(e), e / sqrt(e^2 + c^2), each over the number of values."""
    clean = tokens_of(batch["latents"].numpy().astype(np.float64))
    error = np.random.default_rng(6).standard_normal(clean.shape) * 0.02
    of = {"mse": 2 * error, "mae": np.sign(error), "pseudo_huber": error / np.sqrt(error**2 + 1e-4)}
    for loss_type, wanted in of.items():
        velocity = paddle.to_tensor(noise - clean + error, dtype="float32")
        velocity.stop_gradient = False
        transformer = StubTransformer(lambda velocity=velocity, **_: velocity)
        FlowMatching(loss_type=loss_type).loss_at(transformer, batch, np.full(B, 0.5), noise).backward()
        np.testing.assert_allclose(velocity.grad.numpy() * error.size, wanted, atol=2e-4, err_msg=loss_type)


def test_weights_of_noise_levels_follow_the_published_curve():
    """Values of ai-toolkit's table at noise levels between our points; its mean is 1."""
    published = {0.95: 1.3748, 0.9: 1.5068, 0.8: 1.4413, 0.7: 1.2636, 0.6: 1.0826, 0.5: 0.9254,
                 0.4: 0.8049, 0.3: 0.7312, 0.2: 0.7161, 0.05: 0.5822}  # fmt: skip
    levels = np.array(list(published))
    np.testing.assert_allclose(level_weights(levels), list(published.values()), atol=0.025)
    assert level_weights(np.linspace(1, 1000, 1000) / 1000).mean() == pytest.approx(1, abs=0.005)
    drawn = FlowMatching("weighted").draw_sigma(np.random.default_rng(0), 200_000, 64)
    np.testing.assert_allclose(np.quantile(drawn, QUANTILES), QUANTILES, atol=5e-3)


def test_preservation_compares_the_adapter_on_and_off_for_the_class(build_flux):
    """With the velocities of two calls of the model, in float64; its gradient is the adapter's alone."""
    flux = build_flux()
    inject_lora(flux, rank=2, alpha=2, seed=0)
    factors = lora_parameters(flux)
    rng = np.random.default_rng(5)
    draw = lambda *shape: paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))  # noqa: E731
    text, pooled = flux.config.joint_attention_dim, flux.config.pooled_projection_dim
    channels = flux.config.in_channels
    batch = {
        "latents": draw(2, channels // 4, 4, 4),
        "prompt_embeds": draw(2, 3, text),
        "pooled": draw(2, pooled),
    }
    batch |= {"class_prompt_embeds": draw(2, 3, text), "class_pooled": draw(2, pooled)}
    objective, sigma = FlowMatching(), np.array([0.3, 0.8], "float32")
    noise = rng.standard_normal((2, 4, channels), dtype=np.float32)
    assert float(objective.preservation_at(flux, batch, sigma, noise)) == 0  # B is 0
    for factor in factors:
        factor.set_value(0.3 * draw(*factor.shape))
    loss = objective.preservation_at(flux, batch, sigma, noise)
    of_class = {"latents": batch["latents"], "prompt_embeds": batch["class_prompt_embeds"],
                "pooled": batch["class_pooled"]}  # fmt: skip
    on = objective.predict(flux, of_class, sigma, noise)[0].numpy().astype("float64")
    with lora_disabled(flux):
        off = objective.predict(flux, of_class, sigma, noise)[0].numpy().astype("float64")
    assert float(loss) == pytest.approx(((on - off) ** 2).mean(), rel=1e-5) and float(loss) > 1e-6
    loss.backward()
    assert all(factor.grad is not None and float(factor.grad.abs().max()) > 0 for factor in factors)
