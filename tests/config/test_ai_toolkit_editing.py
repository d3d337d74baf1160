"""Keys of references and masks: ai-toolkit's published Kontext file, its numbered folders, kohya's masks."""

from pathlib import Path

import pytest

from ppcoat.config.load import load_config

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "ai_toolkit" / "train_lora_flux_kontext_24gb.yaml"


def test_the_published_kontext_file_says_here_what_it_says_there():
    config = load_config(PUBLISHED, ())
    assert config.model.arch == "flux_kontext" and config.model.quantize == "fp8"
    assert [data.resolution for data in config.datasets] == [512, 768]
    for data in config.datasets:
        assert data.control_path == ("/path/to/control/folder",) and data.full_size_control_images
        assert data.control_transparent_color == (0, 0, 0) and data.caption_dropout_rate == 0.05
    assert config.train.timestep_type == "weighted" and config.train.cfg_scale == 1
    assert len(config.sample.previews) == 10 and config.sample.guidance_scale == 4
    assert {each.ctrl_img for each in config.sample.previews} == {("/path/to/control/folder/person1.jpg",)}
    assert config.sample.previews[0].prompt == "make the coat blue"


def test_numbered_folders_follow_the_first(load):
    data = load(
        "datasets.0.control_path=a", "datasets.0.control_path_2=c", "datasets.0.control_path_1=b"
    ).data
    assert data.control_path == ("a", "b", "c")
    assert load("datasets.0.control_path_1=''", "datasets.0.control_path=null").data.control_path == ()


def test_references_at_another_size_than_there_are_told(warnings):
    said = warnings("datasets.0.control_path=a", "datasets.0.full_size_control_images=false")
    assert len(said) == 1 and "ai-toolkit squeezes them to 512 x 512" in said[0]


def test_a_masked_loss_tells_that_weights_have_a_mean_of_one(warnings):
    (said,) = warnings("datasets.0.conditioning_data_dir=m", "train.masked_loss=true")
    assert "train.masked_loss: came True, weights are divided by their mean" in said


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.arch=flux2"], "wanted flux or flux_kontext"),
        (["datasets.0.conditioning_data_dir=m"], "set train.masked_loss: true"),
        (["train.masked_loss=true"], "no dataset has masks: give mask_path"),
        (["train.masked_loss=false", "datasets.0.mask_path=m"], "leave out the one or the other"),
        (["train.masked_loss=1"], "wanted true or false"),
        (["datasets.0.mask_path=m", "datasets.0.alpha_mask=true"], "both say where the mask is"),
        (["datasets.0.mask_path=m", "datasets.0.mask_min_value=1"], "less than 1"),
        (["datasets.0.control_path=m", "datasets.0.control_transparent_color=[0, 0, 256]"], "255"),
        (["datasets.0.control_path=5"], "datasets.0.control_path: came 5, wanted a list"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(refusal, overrides, part):
    assert part in refusal(*overrides)


def test_our_own_form_refuses_what_has_no_effect(refusal):
    text = "name: a\nmodel: {name_or_path: m}\ndatasets: [{folder_path: p, mask_min_value: 0.1}]\n"
    assert "have no effect without mask_path or alpha_mask" in refusal(text=text)
