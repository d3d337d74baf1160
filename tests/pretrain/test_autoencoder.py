"""The small autoencoder: its shapes, and the stage that trains the decoder alone."""

import numpy as np
import paddle
import pytest

from ppcoat.models.loading import load_vae
from ppcoat.models.writing import save_diffusers_model
from ppcoat.pretrain.autoencoder import AutoencoderTraining, build_autoencoder, sharp_loss, sharpen_decoder


def test_latents_are_four_times_smaller():
    vae = build_autoencoder()
    latents = vae.encode(paddle.zeros([1, 3, 64, 64])).latent_dist.mode()
    assert latents.shape == [1, 4, 16, 16]
    assert vae.decode(latents).sample.shape == [1, 3, 64, 64]


def test_the_sharp_loss_sees_edges_that_a_squared_error_does_not():
    difference = paddle.zeros([1, 1, 8, 8])
    difference[..., 4:] = 1.0  # half is off by 1: one edge, which 1, 2 and 4 steps across meet
    across = [8 / 56, 16 / 48, 32 / 32]
    assert float(sharp_loss(difference)) == pytest.approx(0.5 + sum(across) / 6)
    assert float(sharp_loss(paddle.full([1, 1, 8, 8], -0.5))) == pytest.approx(0.5)


def test_only_the_decoder_is_trained_and_the_latents_scale_stays(tmp_path):
    paddle.seed(0)
    vae = build_autoencoder()
    vae.register_to_config(scaling_factor=1.7, shift_factor=0.2)
    save_diffusers_model(vae, tmp_path)
    before = load_vae(tmp_path).state_dict()
    sharpen_decoder(tmp_path, AutoencoderTraining(decoder_steps=1, decoder_batch_size=1))
    after = load_vae(tmp_path)
    for name, value in after.state_dict().items():
        same = np.array_equal(value.numpy(), before[name].numpy())
        assert same == name.startswith("encoder."), name
    assert (after.config.scaling_factor, after.config.shift_factor) == (1.7, 0.2)
