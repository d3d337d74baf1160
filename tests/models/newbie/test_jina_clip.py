from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import load_jina_clip
from ppcoat.models.newbie.jina_clip import JINA_PAD_ID, JinaClipConfig, JinaClipTextModel

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5
# config.json of jinaai/jina-clip-v2 leaves the sizes to the model that it names.
JINA_CLIP_V2 = {
    "text_config": {
        "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
        "hf_model_config_kwargs": {"lora_rank": 4, "lora_alpha": 4},
        "pooler_type": "mean_pooler",
    }
}


@pytest.fixture(scope="module")
def model():
    return load_jina_clip(FOLDER / "clip_model", "float32")


@pytest.mark.parametrize("name", ["jina", "jina_empty", "jina_long"])
def test_pooled_vectors_are_those_of_the_original(model, refs, name):
    with paddle.no_grad():
        pooled = model(paddle.to_tensor(refs[f"{name}_ids"])).numpy()
    np.testing.assert_allclose(pooled, refs[f"{name}_pooled"], rtol=0, atol=TOLERANCE)


def test_hidden_states_are_those_of_the_original(model, refs):
    mask = refs["jina_mask"] == 1
    with paddle.no_grad():
        hidden = model.hidden_states(paddle.to_tensor(refs["jina_ids"])).numpy()
    np.testing.assert_allclose(hidden[mask], refs["jina_hidden"][mask], rtol=0, atol=TOLERANCE)


def test_padding_changes_nothing_and_the_vector_is_not_normalised(model, refs):
    ids = refs["jina_empty_ids"]
    with paddle.no_grad():
        padded = np.pad(ids, ((0, 0), (0, 30)), constant_values=JINA_PAD_ID)
        pooled = model(paddle.to_tensor(padded)).numpy()
    np.testing.assert_allclose(pooled, refs["jina_empty_pooled"], rtol=0, atol=TOLERANCE)
    assert abs(np.linalg.norm(pooled) - 1) > 0.1


def test_v2_config_is_completed_and_has_its_parameters():
    config = JinaClipConfig.from_dict(JINA_CLIP_V2)
    assert config.rotary_emb_base == 20000 and config.num_attention_heads == 16
    with paddle.LazyGuard():
        shapes = [parameter.shape for parameter in JinaClipTextModel(config).state_dict().values()]
    layer = 12 * 1024**2 + (3 + 1 + 4 + 1 + 4) * 1024  # matrices; biases and the two norms
    assert sum(int(np.prod(shape)) for shape in shapes) == (250002 + 1 + 2) * 1024 + 24 * layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hf_model_name_or_path": "someone/else"}, "vocab_size"),
        ({"pooler_type": "cls_pooler"}, "pooler_type is 'cls_pooler'"),
        ({"hf_model_config_kwargs": {"position_embedding_type": "absolute"}}, "position_embedding_type"),
        ({"hf_model_config_kwargs": {"hidden_act": "relu"}}, "hidden_act"),
    ],
)
def test_what_is_not_known_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        JinaClipConfig.from_dict({"text_config": {**JINA_CLIP_V2["text_config"], **change}})
