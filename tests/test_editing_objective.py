"""Steps on references, holes and masks: loss and gradients are those of the original code (diffusers,
ai-toolkit), and a mask's weights those of float64."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.data.pairs import loss_weights
from ppcoat.models.flux.picture_inputs import masked_pixels
from ppcoat.models.loading import load_transformer, load_vae
from ppcoat.models.pictures import pack_latents
from ppcoat.objective import FlowMatching, velocity

FIXTURES = Path(__file__).parent / "fixtures"
DEV = FIXTURES / "tiny_flux_fp32/transformer"


def case(file, name):
    with np.load(FIXTURES / file) as found:
        return {key.removeprefix(f"{name}/"): found[key] for key in found.files if key.startswith(f"{name}/")}


def batch_of(refs, **beside):
    shared = {"latents": "x0", "prompt_embeds": "t5", "pooled": "clip"}
    return {name: paddle.to_tensor(refs[key]) for name, key in (shared | beside).items()}


def packed(latents):
    return pack_latents(paddle.to_tensor(latents)).numpy()


def seen_and_loss(model, refs, batch):
    """Inputs of the transformer, and the step's loss, after which parameters have gradients."""
    seen = []
    for parameter in model.parameters():
        parameter.stop_gradient = False
    forward = model.forward
    model.forward = lambda **given: seen.append(given) or forward(**given)
    objective = FlowMatching(guidance=float(refs["guidance"]))
    found = objective.losses_at(model, batch, refs["t"], packed(refs["noise"]))
    model.forward = forward
    found.mean.backward()
    assert float(found.mean) == pytest.approx(float(found.of_pictures.mean()), rel=1e-6)
    return seen[0], float(found.mean)


def check_gradients(model, refs):
    parameters, compared = dict(model.named_parameters()), 0
    for key, wanted in refs.items():
        if key.startswith("grad/"):
            name = key.removeprefix("grad/")
            gradient = parameters[name].grad.numpy()
            wanted = wanted.T if wanted.ndim == 2 else wanted  # Paddle's Linears are [in, out]
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-6, err_msg=name)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["train_same_size", "train_own_size"])
def test_a_step_with_a_reference_is_that_of_the_original_code(name):
    refs, model = (
        case("kontext/training.npz", name),
        load_transformer(DEV),
    )
    batch = batch_of(refs, reference_0="ref_latents")
    seen, loss = seen_and_loss(model, refs, batch)
    np.testing.assert_allclose(seen["hidden_states"].numpy(), refs["tokens_in"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(seen["img_ids"].numpy(), refs["img_ids"])
    assert loss == pytest.approx(float(refs["loss"]), abs=1e-5)
    check_gradients(model, refs)
    with paddle.no_grad():
        x = paddle.to_tensor(
            packed(refs["x0"] + refs["t"][:, None, None, None] * (refs["noise"] - refs["x0"]))
        )
        found = velocity(model, batch, x, refs["t"], float(refs["guidance"]))
    np.testing.assert_allclose(found.numpy(), packed(refs["velocity"]), rtol=0, atol=2e-5)


def test_a_step_of_fill_is_that_of_the_original_code_from_the_pixels_on():
    refs, model = case("fill/training.npz", "train"), load_transformer(FIXTURES / "fill/transformer")
    vae = load_vae(FIXTURES / "tiny_flux_fp32/vae")
    pixels = paddle.to_tensor(refs["pixels"].transpose(0, 3, 1, 2).astype("float32") / 127.5 - 1)
    left = masked_pixels(pixels, paddle.to_tensor(refs["mask"]))
    with paddle.no_grad():
        mode = vae.encode(left).latent_dist.mode()
    masked = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    np.testing.assert_allclose(masked.numpy(), refs["masked_latents"], rtol=0, atol=2e-5)
    batch = batch_of(refs, masked_latents="masked_latents", mask="mask")
    seen, loss = seen_and_loss(model, refs, batch)
    np.testing.assert_allclose(seen["hidden_states"].numpy()[..., :128], refs["tokens_in"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(seen["hidden_states"].numpy()[..., 128:], packed(refs["mask64"]))
    assert loss == pytest.approx(float(refs["loss"]), abs=1e-5)
    check_gradients(model, refs)


def test_several_references_stand_side_by_side_and_change_what_is_predicted():
    refs, model = case("kontext/training.npz", "train_own_size"), load_transformer(DEV)
    noise, seen = packed(refs["noise"]), []
    forward = model.forward
    model.forward = lambda **given: seen.append(given) or forward(**given)
    losses = []
    with paddle.no_grad():
        for beside in (
            {},
            {"reference_0": "ref_latents"},
            {"reference_0": "ref_latents", "reference_1": "x0"},
        ):
            losses.append(
                float(FlowMatching().losses_at(model, batch_of(refs, **beside), refs["t"], noise).mean)
            )
    assert len(set(losses)) == 3
    assert [given["hidden_states"].shape[1] for given in seen] == [9, 9 + 8, 9 + 8 + 9]
    # 2 x 4 tokens, then 3 x 3 below them: the shape stays nearer to a square
    first, second = seen[2]["img_ids"].numpy()[9:17], seen[2]["img_ids"].numpy()[17:]
    assert first.max(0).tolist() == [1, 1, 3] and second.min(0).tolist() == [1, 2, 0]


def test_a_mask_weighs_the_error_of_each_latent_as_in_float64():
    refs, model = case("kontext/training.npz", "train_same_size"), load_transformer(DEV)
    rng = np.random.default_rng(0)
    pixels = np.zeros((48, 64), np.float32)
    pixels[4:29, 11:50] = 1
    masks = [pixels, rng.random((48, 64), dtype=np.float32)]
    weights = np.stack([loss_weights(mask, refs["x0"].shape, 0.1) for mask in masks])
    cells = np.stack(masks).astype(np.float64).reshape(2, 6, 8, 8, 8).mean((2, 4))
    wanted = 0.1 + 0.9 * cells
    wanted /= wanted.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)
    batch = batch_of(refs, reference_0="ref_latents") | {"loss_mask": paddle.to_tensor(weights)}
    with paddle.no_grad():
        found = FlowMatching().losses_at(model, batch, refs["t"], packed(refs["noise"]))
    error = refs["velocity"].astype(np.float64) - (refs["noise"] - refs["x0"])
    assert float(found.mean) == pytest.approx((error**2 * wanted[:, None]).mean(), rel=1e-5)
    np.testing.assert_allclose(found.of_pictures, (error**2 * wanted[:, None]).mean((1, 2, 3)), rtol=1e-5)


def test_a_mask_of_which_cutting_left_nothing_weighs_all_alike():
    np.testing.assert_array_equal(
        loss_weights(np.zeros((16, 32), np.float32), (16, 2, 4), 0.0), np.ones((2, 4))
    )
    np.testing.assert_array_equal(
        loss_weights(np.zeros((16, 32), np.float32), (16, 2, 4), 0.2), np.ones((2, 4))
    )
