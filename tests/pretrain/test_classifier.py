"""Training of the judge: what the autoencoder does to its pictures, and going on from a file."""

import numpy as np
import paddle
import pytest

from ppcoat.infer.garment_scores import WEIGHTS, GarmentClassifier
from ppcoat.models.loading import load_vae
from ppcoat.pretrain.classifier import ClassifierTraining, LabelledDrawings, reconstructed, train_classifier


@pytest.fixture(scope="module")
def vae():
    return load_vae(WEIGHTS.parent / "tiny_flux" / "vae")


def drawings(count):
    pixels = np.stack([LabelledDrawings(count, 0)[i][0] for i in range(count)])
    return ((pixels + 1) * 127.5 + 0.5).astype(np.uint8)


def rms(a, b):
    return float(np.sqrt(np.square(a.astype(np.float32) - b.astype(np.float32)).mean()))


def test_reconstructions_are_like_the_drawings_and_noise_moves_them_away(vae):
    paddle.seed(0)  # of the noise, and of how much of it a batch gets
    pixels = drawings(6)
    again = reconstructed(vae, pixels, noise=0.0, batch_size=4)
    assert again.shape == pixels.shape and again.dtype == np.uint8
    near, other = rms(again, pixels), rms(again, pixels[::-1])
    assert 0 < near < 0.3 * other
    assert rms(reconstructed(vae, pixels, noise=3.0), pixels) > 1.2 * near


def test_training_goes_on_from_a_file(vae, tmp_path):
    file = tmp_path / "judge.safetensors"
    few = {"pictures": 4, "batch_size": 2, "tested": 4}
    train_classifier(file, ClassifierTraining(steps=2, **few), vae)
    first = {k: v.numpy() for k, v in GarmentClassifier.load(file).state_dict().items()}
    # a learning rate so small that float16 cannot show what it did: the weights are those of the file
    train_classifier(file, ClassifierTraining(steps=1, learning_rate=1e-12, seed=1, **few), vae)
    for name, value in GarmentClassifier.load(file).named_parameters():
        np.testing.assert_allclose(value.numpy(), first[name], rtol=1e-3, atol=1e-6, err_msg=name)
