"""Features of paddle.vision's Inception v3 with random weights: its own numbers, and refusals of files."""

import re

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.paddle import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.infer.scores import Inception


@pytest.fixture(scope="module")
def whole():
    paddle.seed(0)
    return paddle.vision.models.InceptionV3()


@pytest.fixture(scope="module")
def file(tmp_path_factory, whole):
    """As Paddle's own file: with the classes' layer, which the features do not need."""
    file = tmp_path_factory.mktemp("inception") / "inception_v3.safetensors"
    save_file(whole.state_dict(), str(file))
    return file


def test_features_are_the_layer_below_the_classes(file, whole):
    """With those features, the classes' layer gives what the whole network gives."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (299, 299, 3), dtype=np.uint8)
    (features,) = Inception(file)([Image.fromarray(picture)])
    assert features.shape == (2048,) and features.dtype == np.float32
    tensors = load_file(str(file))
    whole.eval()
    whole.dropout.p = 0.0  # Paddle scales by it also when drawing no dropout
    pixels = (picture / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with paddle.no_grad():
        wanted = whole(paddle.to_tensor(pixels.transpose(2, 0, 1)[None].astype("float32"))).numpy()[0]
    classes = features @ tensors["fc.weight"].numpy() + tensors["fc.bias"].numpy()
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(classes, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_files_that_are_not_its_weights_are_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="reading a pickle can run code; fetch .*save_file"):
        Inception(tmp_path / "inception_v3.pdparams")
    with pytest.raises(ConfigError, match="no Inception weights at"):
        Inception(tmp_path / "nowhere.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="torn.safetensors is not a whole safetensors file"):
        Inception(tmp_path / "torn.safetensors")
    name = "inception_stem.conv_1a_3x3.0.weight"
    save_file({name: paddle.ones([32, 3, 3, 3])}, str(tmp_path / "few.safetensors"))
    with pytest.raises(ConfigError, match="has nothing for inception_stem"):
        Inception(tmp_path / "few.safetensors")
    save_file({name: paddle.ones([3, 3])}, str(tmp_path / "other.safetensors"))
    wanted = re.escape(f"has [3, 3] for {name}, wanted [32, 3, 3, 3]")
    with pytest.raises(ConfigError, match=wanted):
        Inception(tmp_path / "other.safetensors")
