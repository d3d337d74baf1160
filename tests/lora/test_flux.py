"""The real FLUX transformer, tiny and random: a LoRA step with COAT on and off, and a file there and back."""

import numpy as np
import paddle
import pytest

from ppcoat.lora import inject_lora, load_lora, lora_parameters, remove_lora, save_lora
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.saved_tensors import fp8_saved_tensors

TOKENS, TEXT = 64, 16


@pytest.fixture(scope="module")
def inputs() -> dict[str, paddle.Tensor]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(rng.standard_normal(shape).astype("float32"))

    rows, columns = np.divmod(np.arange(TOKENS), 8)
    return {
        "hidden_states": normal(2, TOKENS, 64),
        "encoder_hidden_states": normal(2, TEXT, 48),
        "pooled_projections": normal(2, 32),
        "timestep": paddle.to_tensor([0.3, 0.7]),
        "guidance": paddle.to_tensor([3.5, 3.5]),
        "img_ids": paddle.to_tensor(np.stack([0 * rows, rows, columns], axis=-1).astype("float32")),
        "txt_ids": paddle.zeros([TEXT, 3]),
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def build(build_flux):
    """build(policy): with LoRAs and FP8 Linears; policy None: no LoRA, nothing replaced."""

    def build(policy: str | None) -> FluxTransformer2DModel:
        model = build_flux(head_dim=32, channels=64, text=48, pooled=32, guidance=True)
        if policy is not None:
            with_coat(model, policy)
        return model

    return build


def with_coat(model: FluxTransformer2DModel, policy: str) -> None:
    layers = inject_lora(model, rank=4, alpha=4.0)
    rng = np.random.default_rng(1)
    for layer in layers.values():
        layer.lora_B.set_value((0.05 * rng.standard_normal(layer.lora_B.shape)).astype("float32"))
    if policy != "none":
        replace_linear_with_fp8(model, "per_group")


def step(model: FluxTransformer2DModel, policy: str, inputs: dict) -> tuple[float, np.ndarray, int]:
    """-> loss, all LoRA gradients in one row, bytes kept for backward."""
    with fp8_saved_tensors(policy) as saved:
        loss = paddle.square(model(**inputs)[0]).mean()
    loss.backward()
    gradients = np.concatenate([param.grad.numpy().ravel() for param in lora_parameters(model)])
    return float(loss), gradients, saved.bytes_kept


def test_coat_keeps_the_loss_and_its_gradients_and_a_third_of_the_bytes(build, inputs):
    loss, exact, plain_bytes = step(build("none"), "none", inputs)
    coat_loss, packed, coat_bytes = step(build("coat"), "coat", inputs)
    assert coat_loss == loss
    assert np.sqrt(np.mean((packed - exact) ** 2) / np.mean(exact**2)) < 0.03
    assert coat_bytes < plain_bytes / 3


def test_file_draws_what_was_trained_and_scale_multiplies(build, inputs, tmp_path):
    model = build("none")
    with paddle.no_grad():
        want = model(**inputs)[0].numpy()
        save_lora(tmp_path / "lora.safetensors", model)
        fresh = build(None)
        base = fresh(**inputs)[0].numpy()
        load_lora(fresh, tmp_path / "lora.safetensors")
        np.testing.assert_allclose(fresh(**inputs)[0].numpy(), want, atol=1e-5)
        off = fresh(**inputs, joint_attention_kwargs={"scale": 0.0})[0].numpy()
        np.testing.assert_allclose(off, base, atol=1e-6)
        remove_lora(fresh)
        np.testing.assert_array_equal(fresh(**inputs)[0].numpy(), base)
    assert np.abs(want - base).max() > 1e-3
