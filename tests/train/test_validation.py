"""Validation: fixed numbers, no influence on training, wrong inputs refused early."""

import json

import numpy as np
import paddle
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from ppcoat.data.cache import Encoders
from ppcoat.errors import ConfigError
from ppcoat.objective import FlowMatching
from ppcoat.train import flux as flux_lora
from ppcoat.train.previews import Validation, encode_validation, kept_pictures
from ppcoat.train.run import train_lora

pytestmark = pytest.mark.usefixtures("small_flux")

LEVELS = ["validation_loss", *(f"validation_loss_sigma_{s}" for s in ("1.00", "0.75", "0.50", "0.25"))]


def log(config):
    return [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


class Stub(paddle.nn.Layer):
    """Half of what it sees, with dropout where it trains."""

    config = type("config", (), {"guidance_embeds": False})

    def forward(self, hidden_states, **_):
        return (paddle.nn.functional.dropout(hidden_states, 0.5, training=self.training) * 0.5,)


def pictures(count):
    rng = np.random.default_rng(2)
    shapes = {"latents": (1, 2, 4, 4), "prompt_embeds": (1, 3, 8), "pooled": (1, 4)}
    return [{name: paddle.to_tensor(rng.standard_normal(s, dtype=np.float32)) for name, s in shapes.items()}
            for _ in range(count)]  # fmt: skip


def test_losses_are_those_of_fixed_noise_at_each_level():
    some, sigmas = pictures(3), (1.0, 0.5)
    model = Stub()
    found = Validation(some, FlowMatching(), sigmas).losses(model)
    assert model.training
    table = np.zeros((3, 2))
    for number, batch in enumerate(some):
        latents = batch["latents"].numpy().astype(np.float64)
        clean = latents.reshape(1, 2, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 4, 8)
        rng = np.random.default_rng([0, number])
        rng.standard_normal(1)  # the noise level that training would draw
        noise = rng.standard_normal((1, 4, 8), dtype=np.float32)
        for column, sigma in enumerate(sigmas):
            velocity = 0.5 * ((1 - sigma) * clean + sigma * noise)
            table[number, column] = np.mean((velocity - (noise - clean)) ** 2)
    assert found == {
        "validation_loss": pytest.approx(table.mean(), rel=1e-5),
        "validation_loss_sigma_1.00": pytest.approx(table[:, 0].mean(), rel=1e-5),
        "validation_loss_sigma_0.50": pytest.approx(table[:, 1].mean(), rel=1e-5),
    }
    paddle.seed(99)
    assert Validation(some, FlowMatching("weighted"), sigmas).losses(model) == found  # no weights, no dropout


def test_training_with_validation_is_bit_equal_to_training_without(make_config, tmp_path):
    common = ("network.dropout=0.2", "datasets.0.caption_dropout_rate=0.3", "train.steps=3")
    plain = make_config("name=plain", *common)
    measured = make_config(
        "name=measured", *common, f"train.validation.folder_path={tmp_path / 'data'}",
        "train.validation.resolution=64", "train.validation.every=2",
    )  # fmt: skip
    first, second = (load_file(train_lora(config).lora_file) for config in (plain, measured))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    found = [[name for name in LEVELS if name in line] for line in log(measured)]
    assert found == [[], LEVELS, LEVELS]
    extra = [{name: value for name, value in line.items() if name not in LEVELS} for line in log(measured)]
    assert extra == log(plain)
    values = [[line[name] for name in LEVELS] for line in log(measured)[1:]]
    assert np.isfinite(values).all() and values[0] != values[1]
    assert values[0][0] == pytest.approx(np.mean(values[0][1:]), rel=1e-6)


def test_items_name_pictures_one_by_one(make_config, tmp_path):
    item = f"[{{image_path: {tmp_path}/data/0000.png, prompt: 'a [trigger] dress'}}]"
    config = make_config(f"train.validation.items={item}", "train.validation.resolution=64", "train.steps=1")
    train_lora(config)
    assert set(LEVELS) <= log(config)[0].keys()


def test_wrong_pictures_are_refused_before_a_model_is_loaded(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(flux_lora.FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="there is no picture nowhere.png"):
        train_lora(make_config("train.validation.items=[{image_path: nowhere.png}]"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="bad.png"):
        train_lora(make_config(f"train.validation.items=[{{image_path: {bad}}}]"))
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        train_lora(make_config("train.validation.folder_path=nowhere"))


def test_pictures_are_shown_their_references(make_config, tmp_path):
    """Inverted copies; a picture without one is shown none."""
    before = tmp_path / "data" / "before"
    before.mkdir()
    for path in sorted((tmp_path / "data").glob("*.png"))[:2]:
        ImageOps.invert(Image.open(path).convert("RGB")).save(before / path.name)
    config = make_config(
        f"datasets.0.control_path={before}",
        f"train.validation.folder_path={tmp_path / 'data'}",
        f"train.validation.control_path={before}",
        "train.validation.resolution=64",
        "train.steps=1",
    )
    kept = kept_pictures(config)
    assert [len(each.references) for each in kept] == [1, 1, 0, 0, 0, 0]
    blank = Encoders(lambda pixels: pixels, lambda captions: (paddle.zeros([1, 2, 4]), paddle.zeros([1, 4])))
    shown = encode_validation(config, kept, blank, FlowMatching()).pictures
    assert [("reference_0" in each) for each in shown] == [True, True, False, False, False, False]
    for each in shown[:2]:
        assert np.allclose(each["reference_0"].numpy(), -each["latents"].numpy(), atol=2 / 255)
    train_lora(config)
    assert set(LEVELS) <= log(config)[0].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["control_path=before"], "references of a folder: give folder_path, too"),
        (["folder_path=data", "control_path=nowhere"], "train.validation.control_path nowhere does not"),
        (
            ["folder_path=data", "control_path=empty"],
            "in data has a reference .* check train.validation.control_path",
        ),
    ],
)
def test_references_that_are_not_there(make_config, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        kept_pictures(make_config(*(f"train.validation.{each}" for each in settings)))
