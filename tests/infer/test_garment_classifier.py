"""The picture classifier: shapes, names, resizing, files, and that a few steps teach it something."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from PIL import Image
from safetensors.paddle import save_file

from ppcoat.data import garments
from ppcoat.infer.garment_scores import LABELS, GarmentClassifier, classify, pictures_to_tensor
from ppcoat.pretrain.classifier import LabelledDrawings, accuracy

SIZES = {"kind": 6, "colour": 8, "pattern": 4, "motif": 2}


@pytest.fixture(scope="module")
def model():
    paddle.seed(0)
    return GarmentClassifier()


@pytest.fixture(scope="module")
def drawings():
    return [garments.draw(garments.all_garments()[37 * i], seed=i) for i in range(5)]


def test_scores_have_one_column_per_label(model):
    scores = model(paddle.zeros([3, 3, 64, 64]))
    assert {name: tuple(value.shape) for name, value in scores.items()} == {
        name: (3, size) for name, size in SIZES.items()
    }
    assert model.features(paddle.zeros([3, 3, 64, 64])).shape == [3, 128]


def test_labels_are_what_the_drawings_are_made_of():
    assert {name: len(labels) for name, labels in LABELS.items()} == SIZES
    for garment in garments.all_garments():
        assert all(getattr(garment, name) in LABELS[name] for name in ("kind", "colour", "pattern"))
    assert LABELS["motif"] == ("none", "gold star")


def test_classify_names_the_highest_score_whatever_the_batch(model, drawings):
    scores = model(pictures_to_tensor(drawings))
    whole, pairs = classify(model, drawings), classify(model, drawings, batch_size=2)
    for name, labels in LABELS.items():
        wanted = [labels[i] for i in scores[name].numpy().argmax(axis=1)]
        assert whole[name].tolist() == wanted == pairs[name].tolist()
    assert whole["features"].shape == (5, 128)
    np.testing.assert_allclose(whole["features"], pairs["features"], atol=1e-5)


def test_pixels_go_from_minus_1_to_1_channels_first():
    picture = Image.new("RGB", (64, 64), (255, 0, 127))
    picture.putpixel((63, 0), (0, 255, 0))  # x = 63, y = 0: the end of the first row
    tensor = pictures_to_tensor([picture, picture])
    assert tensor.shape == [2, 3, 64, 64] and tensor.dtype == paddle.float32
    np.testing.assert_allclose(tensor[1, :, 5, 5].numpy(), [1, -1, 127 / 127.5 - 1], atol=1e-6)
    np.testing.assert_allclose(tensor[0, :, 0, 63].numpy(), [-1, 1, -1], atol=1e-6)


def test_larger_pictures_are_averaged_down_and_other_modes_converted(model, drawings):
    """Two by two equal pixels average to themselves."""
    large = [picture.resize((128, 128), Image.NEAREST).convert("RGBA") for picture in drawings]
    np.testing.assert_array_equal(pictures_to_tensor(large).numpy(), pictures_to_tensor(drawings).numpy())


def test_fine_stripes_become_grey_when_averaged_down():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 254
    shrunk = pictures_to_tensor([Image.fromarray(stripes)])
    np.testing.assert_allclose(shrunk.numpy(), 127 / 127.5 - 1, atol=1e-6)


def test_load_reads_a_float16_file_back(model, drawings, tmp_path):
    file = tmp_path / "weights.safetensors"
    weights = {name: tensor.astype("float16") for name, tensor in model.state_dict().items()}
    save_file(weights, str(file), metadata={"format": "pd"})
    loaded = GarmentClassifier.load(file)
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == paddle.float32
        half = model.state_dict()[name].numpy().astype(np.float16)
        np.testing.assert_array_equal(tensor.numpy(), half.astype(np.float32), err_msg=name)


def fit(model, data, steps, batch_size):
    """AdamW on random batches of `data`, as the training command does it, without its schedule."""
    pixels, labels = (np.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=model.parameters())
    rng = np.random.default_rng(0)
    for _ in range(steps):
        some = rng.choice(len(data), batch_size, replace=False)
        scores = model(paddle.to_tensor(pixels[some]))
        wanted = paddle.to_tensor(labels[some])
        loss = sum(F.cross_entropy(scores[name], wanted[:, i]) for i, name in enumerate(LABELS))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()


@pytest.mark.slow
def test_it_can_learn_a_few_drawings_by_heart():
    """Chance is 1/6, 1/8, 1/4 and 1/2; every head and every layer below must learn for this."""
    paddle.seed(0)
    model = GarmentClassifier()
    data = LabelledDrawings(24, first_seed=0)
    fit(model, data, steps=12, batch_size=24)
    pixels, labels = (np.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
    scores = model(paddle.to_tensor(pixels))
    for i, name in enumerate(LABELS):
        right = scores[name].numpy().argmax(axis=1) == labels[:, i]
        assert right.mean() > 0.9, name


@pytest.mark.slow
def test_some_hundred_drawings_teach_it_about_others():
    paddle.seed(0)
    model = GarmentClassifier()
    fit(model, LabelledDrawings(1500, first_seed=0), steps=200, batch_size=32)
    model.eval()
    found = accuracy(model, 300)
    assert found["kind"] > 0.3 and found["colour"] > 0.5 and found["motif"] > 0.75, found


def test_the_shipped_classifier_knows_fresh_drawings():
    found = accuracy(GarmentClassifier.load(), 160)
    assert found["kind"] > 0.95 and found["colour"] > 0.95 and found["motif"] > 0.95, found
