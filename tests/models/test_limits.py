"""Each limit of a model's JSON files, once: what came, and the key that the one line names."""

import inspect
import json
from pathlib import Path

import pytest
from ppdiffusers import AutoencoderKL
from ppdiffusers.transformers import CLIPTextConfig, T5Config

from ppcoat.errors import ConfigError
from ppcoat.models import limits
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.limits import TokenizerSettings, WeightIndex, limits_of, within
from ppcoat.models.newbie.gemma3 import Gemma3Config
from ppcoat.models.newbie.jina_clip import JinaClipConfig
from ppcoat.models.newbie.nextdit import NextDiT_CLIP

FIXTURES = Path(__file__).parent.parent / "fixtures"
FLUX, NEWBIE = FIXTURES / "tiny_flux_fp32", FIXTURES / "tiny_newbie"
FILES = {
    "transformer": FLUX / "transformer/config.json",
    "vae": FLUX / "vae/config.json",
    "text_encoder": FLUX / "text_encoder/config.json",
    "text_encoder_2": FLUX / "text_encoder_2/config.json",
    "scheduler": FLUX / "scheduler/scheduler_config.json",
    "nextdit": NEWBIE / "transformer/config.json",
    "gemma3": NEWBIE / "text_encoder/config.json",
    "jina_clip": NEWBIE / "clip_model/config.json",
}
NUMBERS = {"wrong": "abc", "text": "2", "true": True, "-1": -1, "huge": 10**30, "nan": float("nan")}


def config_of(part):
    return json.loads(FILES[part].read_text())


def check(part, config):
    return within(limits_of(part, config), config, "the/file.json")


@pytest.mark.parametrize("part", FILES)
def test_configs_of_real_programs_are_within_the_limits(part):
    """Those of fixtures, which diffusers, transformers and NewBie's trainer wrote, with a key more."""
    check(part, config_of(part) | {"a_key_of_tomorrow": {"any": [1, None]}})


def text(part, config):
    """Where the flat keys of a part stand."""
    inside = config.get("text_config", config) if part in ("gemma3", "jina_clip") else config
    return inside["hf_model_config_kwargs"] if part == "jina_clip" else inside


@pytest.mark.parametrize("part", FILES)
def test_no_number_may_be_something_else(part):
    """Every number that is read here, by each of NUMBERS; true and texts by a list."""
    fields = limits.Gemma3Text if part == "gemma3" else limits.JinaSizes if part == "jina_clip" else None
    fields = (fields or limits.LIMITS[part]).model_fields
    tried = 0
    for key, value in text(part, config_of(part)).items():
        if key not in fields or value is None:
            continue
        wrong = NUMBERS if type(value) in (int, float) else {"list": [[]], "number": 5}
        for came in wrong.values():
            if key in ("base_shift", "max_shift", "shift_factor") and came == -1:
                continue  # possible
            config = config_of(part)
            text(part, config)[key] = came
            with pytest.raises(ConfigError, match=rf"^the/file.json: [\w.]*{key}\S*[: ]") as caught:
                check(part, config)
            assert "\n" not in str(caught.value)
            tried += 1
    assert tried > 10


@pytest.mark.parametrize(
    ("part", "key", "came", "said"),
    [
        ("transformer", "_class_name", "PixArtTransformer2DModel", "wanted 'FluxTransformer2DModel'"),
        ("transformer", "num_layers", 0, "came 0, wanted greater than or equal to 1"),
        ("transformer", "num_layers", 10**9, "wanted less than or equal to 1000"),
        ("transformer", "num_attention_heads", 2**21, "wanted less than or equal to 1048576"),
        ("transformer", "patch_size", 2, "wanted less than or equal to 1"),
        ("transformer", "axes_dims_rope", [16, 16], "at least 3"),
        ("transformer", "axes_dims_rope", [-100, 128, 4], "axes_dims_rope.0: came -100"),
        ("vae", "_class_name", "AutoencoderTiny", "wanted 'AutoencoderKL'"),
        ("vae", "norm_num_groups", 3, r"block_out_channels \[.*\] must be multiples of norm_num_groups 3"),
        ("vae", "block_out_channels", [32], "down_block_types has . entries, block_out_channels 1"),
        ("vae", "block_out_channels", [], "at least 1"),
        ("vae", "up_block_types", ["UpBlock"], "up_block_types.0: came UpBlock"),
        ("vae", "in_channels", 4, "wanted 3"),
        ("vae", "act_fn", "tanh", "wanted 'silu' or 'swish'"),
        ("vae", "scaling_factor", 0, "wanted greater than or equal to 0.001"),
        ("vae", "sample_size", 10**9, "wanted less than or equal to 8192"),
        ("vae", "latents_mean", [0.5], "latents_mean: came"),
        ("vae", "mid_block_add_attention", False, "wanted True"),
        ("text_encoder", "num_attention_heads", 3, "hidden_size .* multiple of num_attention_heads"),
        ("text_encoder", "eos_token_id", 10**6, "is beyond vocab_size"),
        ("text_encoder", "hidden_act", "relu", "hidden_act: came relu"),
        ("text_encoder", "layer_norm_eps", 0, "greater than 0"),
        ("text_encoder_2", "feed_forward_proj", "relu", "wanted 'gated-gelu'"),
        ("text_encoder_2", "dense_act_fn", "relu", "wanted 'gelu_new'"),
        ("text_encoder_2", "relative_attention_max_distance", 4, "more than a quarter"),
        ("scheduler", "_class_name", "EulerDiscreteScheduler", "wanted 'FlowMatchEulerDiscreteScheduler'"),
        ("scheduler", "num_train_timesteps", 10**9, "wanted less than or equal to 100000"),
        ("scheduler", "shift", 0, "greater than 0"),
        ("scheduler", "max_image_seq_len", 256, "must be less than max_image_seq_len 256"),
        ("nextdit", "n_layers", 10**9, "wanted less than or equal to 1000"),
        ("nextdit", "ffn_dim_multiplier", float("inf"), "ffn_dim_multiplier: came inf"),
    ],
)  # fmt: skip
def test_a_limit_is_named(part, key, came, said):
    with pytest.raises(ConfigError, match=said):
        check(part, config_of(part) | {key: came})


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("gemma3", {"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 8"),
        ("gemma3", {"layer_types": ["other"] * 8}, "layer_types.0: came other"),
        ("gemma3", {"head_dim": 15}, "multiple of 2"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear"}}, "linear scaling wants a factor"),
        ("gemma3", {"rope_scaling": "linear"}, "rope_scaling: came linear, wanted an object"),
        ("gemma3", {"rope_parameters": {"full_attention": 5}}, "rope_parameters.full_attention: came 5"),
        ("jina_clip", {"num_attention_heads": 32}, "must be an even multiple"),
    ],
)
def test_a_limit_of_a_text_model_is_named(part, change, said):
    config = config_of(part)
    text(part, config).update(change)
    with pytest.raises(ConfigError, match=said):
        check(part, config)


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (TokenizerSettings, {"model_max_length": 0}, "model_max_length: came 0"),
        (TokenizerSettings, {"model_max_length": "77"}, "wanted a number"),
        (TokenizerSettings, {"pad_token": 5}, "pad_token"),
        (TokenizerSettings, {"pad_token": {"lstrip": True}}, "pad_token"),
        (TokenizerSettings, {"added_tokens_decoder": {"-1": {"content": "a"}}}, "added_tokens_decoder.-1"),
        (TokenizerSettings, {"extra_ids": 10**9}, "extra_ids: came 1000000000"),
        (TokenizerSettings, {"additional_special_tokens": "a"}, "wanted a list"),
        (TokenizerSettings, {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
        (TokenizerSettings, {"errors": "none"}, "errors: came none"),
        (WeightIndex, {}, "weight_map: is missing"),
        (WeightIndex, {"weight_map": {}}, "weight_map: came {}"),
        (WeightIndex, {"weight_map": {"a": "../b.safetensors"}}, "weight_map.a: came ../b.safetensors"),
        (WeightIndex, {"weight_map": {"a": "x" * 201}}, "weight_map.a: came x{77}[.]{3}"),
        (WeightIndex, {"weight_map": {"a": "b"}, "metadata": {"crc32": {"a": -1}}}, "metadata.crc32.a"),
    ],
)  # fmt: skip
def test_a_limit_of_tokenizers_and_indices_is_named(kind, content, said):
    with pytest.raises(ConfigError, match=said):
        within(kind, content, "the/file.json")


@pytest.mark.parametrize(
    ("kind", "built"),
    [
        (limits.FluxTransformer, FluxTransformer2DModel),
        (limits.Autoencoder, AutoencoderKL),
        (limits.ClipText, CLIPTextConfig),
        (limits.T5Text, T5Config),
        (limits.Scheduler, FlowMatchEulerDiscreteScheduler),
        (limits.NextDiT, NextDiT_CLIP),
        (limits.Gemma3Text, Gemma3Config),
        (limits.JinaSizes, JinaClipConfig),
    ],
)
def test_a_key_that_is_not_given_is_what_the_class_that_is_built_takes(kind, built):
    """T5's own default is no FLUX's: what it builds then is refused for its weights."""
    taken = inspect.signature(built.__init__).parameters
    for key, field in kind.model_fields.items():
        default = taken[key].default if key in taken else None
        if key in taken and key != "feed_forward_proj" and field.default is not None:
            assert field.default == (list(default) if isinstance(default, tuple) else default), key
