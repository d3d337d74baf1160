"""CLIP from a folder in the transformers layout against its published formulas in float64 NumPy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ppcoat.errors import ConfigError
from ppcoat.infer.scores import CLIP, centre_square

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32" / "tokenizer"
WIDTH, HEADS, SIZE, PATCH, OUT, TOKENS, VOCABULARY = 16, 2, 16, 8, 6, 12, 678


def layer(prefix):
    """Shapes of an encoder layer as torch stores them: [out, in]."""
    square = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    linears = {**square, "mlp.fc1": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 2 * WIDTH)}
    norms = {f"layer_norm{i}": (WIDTH,) for i in (1, 2)}
    shapes = {f"{name}.weight": shape for name, shape in (linears | norms).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in (linears | norms).items()}
    return {f"{prefix}.encoder.layers.0.{name}": shape for name, shape in shapes.items()}


SHAPES = {
    "logit_scale": (),
    "text_model.embeddings.token_embedding.weight": (VOCABULARY, WIDTH),
    "text_model.embeddings.position_embedding.weight": (TOKENS, WIDTH),
    "vision_model.embeddings.class_embedding": (WIDTH,),
    "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "vision_model.embeddings.position_embedding.weight": (1 + (SIZE // PATCH) ** 2, WIDTH),
    "text_projection.weight": (OUT, WIDTH),
    "visual_projection.weight": (OUT, WIDTH),
    **layer("text_model"),
    **layer("vision_model"),
}
for norm in ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"):
    SHAPES |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) * 0.3).astype("float32") for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    # Older files carry these constants too.
    positions = {
        "text_model.embeddings.position_ids": np.arange(TOKENS)[None],
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    arrays = {name: np.asarray(array) for name, array in (weights | positions).items()}
    save_file(arrays, str(folder / "model.safetensors"), metadata={"format": "pt"})
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1}
    size |= {"num_attention_heads": HEADS, "projection_dim": OUT}
    config = {
        "model_type": "clip",
        "projection_dim": OUT,
        "text_config": size
        | {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, "eos_token_id": 2},
        "vision_config": size | {"image_size": SIZE, "patch_size": PATCH},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return CLIP(folder)


def norm(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def encoder(x, weights, prefix, mask):
    """One pre-norm layer of [tokens, WIDTH] with quick-GELU (CLIP, model.py)."""

    def linear(x, name):
        return x @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    y = norm(x, weights, f"{prefix}.layer_norm1")
    q, k, v = (
        linear(y, f"self_attn.{name}_proj").reshape(len(x), HEADS, -1).swapaxes(0, 1) for name in "qkv"
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + mask
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    heads = (shares / shares.sum(-1, keepdims=True)) @ v
    x = x + linear(heads.swapaxes(0, 1).reshape(len(x), WIDTH), "self_attn.out_proj")
    y = linear(norm(x, weights, f"{prefix}.layer_norm2"), "mlp.fc1")
    return x + linear(y / (1 + np.exp(-1.702 * y)), "mlp.fc2")


def picture_embedding(pixels, weights):
    """pixels: uint8 [SIZE, SIZE, 3]."""
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = (pixels / 255 - mean) / deviation
    side = SIZE // PATCH
    patches = x.reshape(side, PATCH, side, PATCH, 3).transpose(0, 2, 4, 1, 3).reshape(side * side, -1)
    tokens = patches @ weights["vision_model.embeddings.patch_embedding.weight"].reshape(WIDTH, -1).T
    tokens = np.concatenate([weights["vision_model.embeddings.class_embedding"][None], tokens])
    tokens = tokens + weights["vision_model.embeddings.position_embedding.weight"]
    tokens = norm(tokens, weights, "vision_model.pre_layrnorm")
    tokens = encoder(tokens, weights, "vision_model.encoder.layers.0", 0)
    return norm(tokens[0], weights, "vision_model.post_layernorm") @ weights["visual_projection.weight"].T


def text_embedding(ids, weights):
    x = weights["text_model.embeddings.token_embedding.weight"][ids]
    x = x + weights["text_model.embeddings.position_embedding.weight"][: len(ids)]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    x = norm(encoder(x, weights, "text_model.encoder.layers.0", mask), weights, "text_model.final_layer_norm")
    return x[-1] @ weights["text_projection.weight"].T  # the last token is the end of the text


def test_pictures_are_embedded_as_published(clip, weights):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    wanted = np.stack([picture_embedding(one, exact) for one in pixels])
    found = clip.embed_pictures([Image.fromarray(one) for one in pixels])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_prompts_are_embedded_as_published_whatever_stands_after_their_end(clip, weights):
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    prompts = ["a red dress", "hat", "a " * 40]
    found = clip.embed_prompts(prompts)
    for prompt, embedding in zip(prompts, found, strict=True):
        ids = clip.tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= TOKENS else [*ids[: TOKENS - 1], ids[-1]]
        np.testing.assert_allclose(embedding, text_embedding(np.array(ids), exact), rtol=0, atol=2e-5)


def test_the_middle_of_a_picture_is_seen():
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("red", (10, 0, 30, 20))
    np.testing.assert_array_equal(centre_square(wide, 20), np.float32([[[1, 0, 0]] * 20] * 20))
    tall = centre_square(wide.transpose(Image.ROTATE_90).resize((80, 160)), 16)
    assert tall.shape == (16, 16, 3) and tall[4:-4, :, 0].min() > 0.99


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="config.json is missing: give the local folder of a CLIP"):
        CLIP(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is of a bert, wanted a clip"):
        CLIP(other)
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        CLIP(torn)
    (torn / "vocab.json").unlink()
    with pytest.raises(ConfigError, match="vocab.json is missing"):
        CLIP(torn)
