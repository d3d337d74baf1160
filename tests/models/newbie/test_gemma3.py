import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import load_gemma3
from ppcoat.models.newbie.gemma3 import Gemma3Config, Gemma3TextEncoder

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5
# config.json of google/gemma-3-4b-it says this much of the text model, and no more.
GEMMA3_4B = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
}


@pytest.fixture(scope="module")
def encoder():
    return load_gemma3(FOLDER / "text_encoder", "float32")


@paddle.no_grad()
def encode(encoder, ids, mask):
    return encoder(paddle.to_tensor(ids), paddle.to_tensor(mask)).numpy()


@pytest.mark.parametrize("name", ["gemma", "gemma_long", "gemma_empty"])  # long: longer than the window
def test_hidden_states_are_those_of_transformers(encoder, refs, name):
    mask = refs[f"{name}_mask"]
    hidden = encode(encoder, refs[f"{name}_ids"], mask)
    np.testing.assert_allclose(hidden[mask == 1], refs[f"{name}_hidden"][mask == 1], rtol=0, atol=TOLERANCE)


def test_each_layer_is_that_of_transformers_and_the_last_is_not_run(encoder, refs):
    seen = []

    def keep(layer, args):
        seen.append(args[0].numpy()[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in encoder.layers]
    mask = refs["gemma_one_mask"]
    seen.append(encode(encoder, refs["gemma_one_ids"], mask)[0])
    for hook in hooks:
        hook.remove()
    wanted, valid = refs["gemma_one_all_hidden"], int(mask.sum())
    assert len(seen) == len(wanted) - 1 == encoder.config.num_hidden_layers
    for i, (ours, theirs) in enumerate(zip(seen, wanted[:-1], strict=True)):
        np.testing.assert_allclose(ours[:valid], theirs[:valid], rtol=0, atol=TOLERANCE, err_msg=str(i))


def test_padding_changes_nothing_and_stays_finite(encoder, refs):
    ids, valid = refs["gemma_one_ids"], int(refs["gemma_one_mask"].sum())
    alone = encode(encoder, ids[:, :valid], np.ones([1, valid], "int64"))
    longer = np.pad(ids[:, :valid], ((0, 0), (0, 100)), constant_values=5)
    padded = encode(encoder, longer, (np.arange(valid + 100) < valid)[None].astype("int64"))
    np.testing.assert_allclose(padded[:, :valid], alone, rtol=0, atol=TOLERANCE)
    assert np.isfinite(padded).all()  # the last rows see no key through the window


def test_a_token_sees_nothing_that_follows(encoder, refs):
    ids, mask = refs["gemma_long_ids"][:, :40], refs["gemma_long_mask"][:, :40]
    changed = ids.copy()
    changed[:, 30:] = 11
    before, after = encode(encoder, ids, mask), encode(encoder, changed, mask)
    np.testing.assert_array_equal(before[:, :30], after[:, :30])
    assert np.abs(before[:, 30:] - after[:, 30:]).max() > 0.1


def test_4b_config_is_completed_and_has_its_layers_and_parameters():
    config = Gemma3Config.from_dict(GEMMA3_4B)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert [i for i in range(33) if config.is_global(i)] == [5, 11, 17, 23, 29]
    with paddle.LazyGuard():
        encoder = Gemma3TextEncoder(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in encoder.state_dict().items()}
    assert len(encoder.layers) == 33
    assert shapes["layers.32.self_attn.q_proj.weight"] == (2560, 2048)
    assert shapes["layers.0.self_attn.v_proj.weight"] == (2560, 1024)
    assert shapes["embed_tokens.weight"] == (262208, 2560)
    # Per layer: q and o, k and v, the three of the feed-forward, four norms and two head norms.
    layer = 2 * 2560 * 2048 + 2 * 2560 * 1024 + 3 * 2560 * 10240 + 4 * 2560 + 2 * 256
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 262208 * 2560 + 33 * layer


def test_rope_settings_of_newer_transformers_are_the_same():
    old = json.loads((FOLDER / "text_encoder" / "config.json").read_text())
    new = {**old["text_config"]}
    for key in ("rope_scaling", "rope_theta", "rope_local_base_freq"):
        del new[key]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert Gemma3Config.from_dict(new) == Gemma3Config.from_dict(old)


def test_no_rope_scaling_is_factor_one():
    assert Gemma3Config.from_dict({"rope_scaling": None}).rope_factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Gemma3Config.from_dict({**GEMMA3_4B["text_config"], **change})


def test_float16_is_refused():
    with pytest.raises(ConfigError, match="float16"):
        load_gemma3(FOLDER / "text_encoder", "float16")
