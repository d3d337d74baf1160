"""The schema itself: every field says what it is, every section is strict and frozen."""

import pytest
from pydantic import ValidationError

from ppcoat.config import schema
from ppcoat.config.schema import RunConfig, Section

SECTIONS = [each for each in vars(schema).values() if isinstance(each, type) and issubclass(each, Section)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described_and_unknown_keys_are_refused(section):
    assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"


def test_the_published_coat_section_is_accepted():
    """Keys and values as in the README of the project that this one was asked to follow."""
    coat = {
        "enabled": True,
        "optimizer": {
            "use_fp8": True,
            "m1_format": "e4m3",
            "m2_format": "e5m2",
            "block_size": 128,
            "use_dynamic_range_expansion": True,
            "stochastic_rounding": False,
        },
        "activation": {
            "use_fp8": True,
            "linear_granularity": "per_tensor",
            "nonlinear_granularity": "per_group",
            "group_size": 256,
        },
        "memory": {"enable_efficient_checkpoint": True, "log_memory_stats": True},
    }
    given = {"name": "a", "model": {"name_or_path": "m"}, "datasets": [{"folder_path": "d"}], "coat": coat}
    read = RunConfig.model_validate(given).coat.model_dump()
    # settings that came later have defaults
    assert read["activation"].pop("policy") == "coat"
    assert read["memory"].pop("checkpoint_blocks") is None
    assert read == coat


@pytest.mark.parametrize("size", [0, -16, 100])
def test_block_size_is_a_positive_multiple_of_16(size):
    with pytest.raises(ValidationError, match="16"):
        schema.CoatOptimizerConfig(block_size=size)


def test_an_unknown_saving_policy_is_answered_with_the_nearest():
    with pytest.raises(
        ValidationError, match="unknown saving policy 'coat.recomp', the nearest is 'coat.recompute'"
    ):
        schema.CoatActivationConfig(policy="coat+recomp")
    with pytest.raises(ValidationError):
        schema.CoatActivationConfig(policy=3)
    for policy in ("none", "coat", "coat+recompute", "coat+recompute+attention"):
        assert schema.CoatActivationConfig(policy=policy).policy == policy


def test_caption_ext_takes_the_dot_or_not():
    for ext in ("txt", ".txt"):
        assert schema.DatasetConfig(folder_path="d", caption_ext=ext).caption_ext == "txt"
    with pytest.raises(ValidationError):
        schema.DatasetConfig(folder_path="d", caption_ext="../txt")


def run_with(*datasets):
    return RunConfig(name="a", model={"name_or_path": "m"}, datasets=list(datasets))


def test_a_list_of_resolutions_becomes_one_dataset_each_and_loads_again():
    config = run_with({"folder_path": "d", "resolution": [512, 64], "flip_x": True}, {"folder_path": "e"})
    assert [(each.folder_path, each.resolution) for each in config.datasets] == [
        ("d", 512),
        ("d", 64),
        ("e", 512),
    ]
    assert config.datasets[1].flip_x and not config.datasets[2].flip_x
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ({"resolution": [512, 100]}, "multiple of 16"),
        ({"resolution": []}, "an empty list"),
        ({"resolution": [True]}, "valid integer"),
        ({"resolution": [512, 64], "bucket_step": 128}, "bucket_step 128 is more than resolution 64"),
        ({"is_reg": True}, "every folder is is_reg"),
        ({"trigger_word": "[name]"}, "must not hold"),
    ],
)
def test_impossible_datasets_are_refused(dataset, part):
    with pytest.raises(ValidationError, match=part):
        run_with({"folder_path": "d", **dataset})


def test_the_cache_lies_in_the_run_folder_unless_told_otherwise():
    config = run_with({"folder_path": "d"})
    assert config.cache_folder == config.run_dir / "cache"
    assert str(config.model_copy(update={"cache_dir": "c"}).cache_folder) == "c"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("use_fp8", [True, False])
def test_stochastic_rounding_is_refused_before_anything_is_loaded(enabled, use_fp8):
    """Adapters are float32 whatever the base is."""
    given = {
        "name": "shirts",
        "model": {"name_or_path": "models/flux"},
        "datasets": [{"folder_path": "photos"}],
        "coat": {"enabled": enabled, "optimizer": {"use_fp8": use_fp8, "stochastic_rounding": True}},
    }
    with pytest.raises(ValidationError, match=r"stochastic_rounding: true is for bfloat16 .* leave it out"):
        RunConfig.model_validate(given)
