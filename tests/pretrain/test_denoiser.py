"""Training of the small transformer: what it starts from, its batches, its guidance, and a few steps."""

import numpy as np
import paddle
import pytest

from ppcoat.models.loading import load_transformer
from ppcoat.pretrain.denoiser import (
    DenoiserTraining,
    FlowBatches,
    _rate,
    build_transformer,
    train_transformer,
)

TRAINING = DenoiserTraining(steps=4, batch_size=8, guided_after=2, warmup=1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    texts = {"prompt_embeds": normal(20, 6, 64), "pooled": normal(20, 64)}
    return {"latents": normal(20, 64, 16), **texts, "empty_embeds": normal(6, 64), "empty_pooled": normal(64)}


@pytest.fixture
def teacher():
    """Answers with the mean of its text, so that every caption changes it by a known amount."""

    class Teacher:
        def __call__(self, hidden_states, encoder_hidden_states, pooled_projections, guidance, **_):
            assert (guidance == 1).all()
            text = encoder_hidden_states.mean([1, 2]) + pooled_projections.mean(-1)
            return (paddle.ones_like(hidden_states) * text.reshape([-1, 1, 1]),)

    return Teacher()


def test_a_new_transformer_answers_zero_whatever_it_is_asked(data):
    paddle.seed(0)
    arguments, _ = FlowBatches(data, None, TRAINING).draw(guided=False)
    assert float(build_transformer()(**arguments)[0].abs().max()) == 0


def test_batches_without_guidance(data):
    paddle.seed(0)
    training = DenoiserTraining(batch_size=4000, caption_dropout=0.25)
    arguments, target = FlowBatches(data, None, training).draw(guided=False)
    sigma = arguments["timestep"].numpy()
    # noisy = latents + sigma * (noise - latents): the latents are had back exactly
    latents = (arguments["hidden_states"] - arguments["timestep"].reshape([-1, 1, 1]) * target).numpy()
    nearest = np.abs(latents[:, None, 0, 0] - data["latents"][None, :, 0, 0]).argmin(1)
    np.testing.assert_allclose(latents, data["latents"][nearest], atol=1e-4)
    assert (arguments["guidance"] == 1).all()
    empty = (arguments["encoder_hidden_states"].numpy() == data["empty_embeds"]).all((1, 2))
    assert abs(empty.mean() - 0.25) < 0.03
    np.testing.assert_array_equal(
        arguments["encoder_hidden_states"].numpy()[~empty], data["prompt_embeds"][nearest[~empty]]
    )
    level = sigma / (np.exp(0.4675) - (np.exp(0.4675) - 1) * sigma)  # mu at 64 tokens, by diffusers' line
    assert abs(level.mean() - 0.5) < 0.02 and level.min() < 0.01 and level.max() > 0.99


def test_guided_half_is_moved_by_what_the_caption_changes_below_a_noise_level(data, teacher):
    paddle.seed(0)
    training = DenoiserTraining(batch_size=40, caption_dropout=0.5, largest_guidance=3.0, guided_below=0.7)
    arguments, target = FlowBatches(data, teacher, training).draw(guided=True)
    paddle.seed(0)
    plain_arguments, plain = FlowBatches(data, teacher, training).draw(guided=False)
    np.testing.assert_array_equal(
        arguments["hidden_states"].numpy(), plain_arguments["hidden_states"].numpy()
    )
    guidance, sigma = arguments["guidance"].numpy(), arguments["timestep"].numpy()
    assert (guidance[20:] == 1).all() and 1 <= guidance[:20].min() < 1.5 < 2.5 < guidance[:20].max() <= 3
    text = arguments["encoder_hidden_states"].numpy().mean((1, 2))
    text += arguments["pooled_projections"].numpy().mean(-1)
    change = text - data["empty_embeds"].mean() - data["empty_pooled"].mean()
    moved = (target - plain).numpy()
    wanted = (guidance - 1) * change * (sigma <= 0.7)
    assert 5 < (wanted != 0).sum() < 20
    np.testing.assert_allclose(moved, np.broadcast_to(wanted[:, None, None], moved.shape), atol=1e-5)
    assert (moved[wanted == 0] == 0).all()
    assert not (arguments["encoder_hidden_states"].numpy()[:20] == data["empty_embeds"]).all((1, 2)).any()


def test_learning_rates_rise_stay_and_fall():
    training = DenoiserTraining(steps=1000, warmup=100, decay=0.5)
    rates = [_rate(step, training) for step in (1, 50, 100, 500, 750, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 0.502, 0.002])


def test_a_few_steps_train_all_but_the_token_biases_and_keep_the_average(data, tmp_path):
    paddle.seed(0)
    transformer = build_transformer()
    before = {name: value.numpy() for name, value in transformer.state_dict().items()}
    losses = train_transformer(transformer, data, TRAINING, tmp_path)
    assert len(losses) == 4 and np.isfinite(losses).all()
    after = transformer.state_dict()
    same = {name for name in before if np.array_equal(after[name].numpy(), before[name])}
    assert same == {
        name
        for name in before
        if "transformer_blocks" in name and name.endswith("bias") and "norm" not in name
    }
    saved = load_transformer(tmp_path, "float32").state_dict()
    assert all(np.array_equal(saved[name].numpy(), after[name].numpy()) for name in before)
