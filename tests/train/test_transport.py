from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.models.flux.scheduler import calculate_shift
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.objective import NewbieFlowMatching, interpolate

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def model():
    return load_nextdit(FOLDER / "transformer", "float32")


@pytest.fixture(scope="module")
def batch(refs):
    names = {"latents": "train_x1", "cap_feats": "gemma_hidden", "cap_mask": "gemma_mask"}
    names["clip_text_pooled"] = "jina_pooled"
    return {name: paddle.to_tensor(refs[ref][:2]) for name, ref in names.items()}


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_times_are_those_of_the_original(refs, tokens):
    times = NewbieFlowMatching().times(refs["tmap_lognorm_draw"], tokens)
    np.testing.assert_allclose(times, refs[f"tmap_lognorm_shift{tokens}"], rtol=0, atol=1e-6)


def test_mu_is_that_of_the_original_and_not_clamped(refs):
    for tokens, mu in zip(refs["tmap_mu_seq_len"], refs["tmap_mu"], strict=True):
        assert abs(calculate_shift(int(tokens)) - mu) < 1e-12


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_loss_is_that_of_the_original(refs, model, batch, tokens):
    times = NewbieFlowMatching().times(refs["train_u"], tokens)
    np.testing.assert_allclose(times, refs[f"train_{tokens}_t"], rtol=0, atol=1e-6)
    noise = paddle.to_tensor(refs["train_x0"])
    noisy, target = interpolate(batch["latents"], noise, paddle.to_tensor(times))
    np.testing.assert_allclose(noisy.numpy(), refs[f"train_{tokens}_xt"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(target.numpy(), refs["train_target"], rtol=0, atol=1e-6)
    loss = NewbieFlowMatching().losses_at(model, batch, times, refs["train_x0"])
    np.testing.assert_allclose(
        loss.of_pictures.numpy(), refs[f"train_{tokens}_loss_per_sample"], rtol=0, atol=TOLERANCE
    )
    assert abs(float(loss.mean) - refs[f"train_{tokens}_loss"]) < TOLERANCE
    halved = NewbieFlowMatching().loss_at(model, {**batch, "loss_weight": 0.5}, times, refs["train_x0"])
    assert abs(float(halved) - refs[f"train_{tokens}_loss"] / 2) < TOLERANCE


def test_shift_follows_the_size_of_the_batch(batch):
    small, large = batch, {"latents": paddle.zeros([2, 16, 128, 128])}
    for size, tokens in ((small, 6 * 4), (large, 64 * 64)):
        rng = np.random.default_rng(3)
        times, noise = NewbieFlowMatching().draw(size, np.random.default_rng(3))
        np.testing.assert_array_equal(times, NewbieFlowMatching().times(rng.standard_normal(2), tokens))
        assert list(noise.shape) == size["latents"].shape and noise.dtype == np.float32


def test_median_time_of_the_shifted_distribution():
    """The median of a logit-normal is 1/2, and the shift moves it to 1 / (1 + e^mu)."""
    raw = np.random.default_rng(0).standard_normal(20001)
    for tokens, median in ((1024, 1 / (1 + np.exp(0.5 + 768 * 0.65 / 3840))), (4096, 1 / (1 + np.exp(1.15)))):
        assert abs(np.median(NewbieFlowMatching().times(raw, tokens)) - median) < 0.01
