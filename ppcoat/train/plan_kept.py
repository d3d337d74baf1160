"""How many bytes a FLUX model keeps for backward, counted by the counters of training on a small model.

A small copy (three blocks, one or two groups of heads, 128 to 192 tokens) takes a forward pass through the
very code that trains, and `SavedTensors` counts before and after each block. Every count is a constant plus a
multiple of the image tokens, the text tokens and the heads, so three numbers of tokens and two of heads tell
it for any size. Only Paddle's written-out attention keeps more (its scores), and that is counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle

from ppcoat.config.schema import CoatConfig
from ppcoat.host import set_device
from ppcoat.lora import inject_lora
from ppcoat.models.flux import FluxTransformer2DModel
from ppcoat.nn.attention import attention
from ppcoat.nn.saved import count_saved_tensors
from ppcoat.train.coat import COATTrainer
from ppcoat.train.objective import FlowMatching

SIDE = 8  # rows of image tokens of the small model: enough that no tensor is too small to be packed
TEXT = 64  # its text tokens


@dataclass(frozen=True)
class TracedModel:
    """What the trace wants to know. settings: of FluxTransformer2DModel, hashable; lora_paths: inside the
    blocks of a model of one block of each kind, from `small_lora_paths`. half: it computes in bfloat16 on a
    GPU, with flash attention.
    """

    settings: tuple[tuple[str, object], ...]
    lora_paths: tuple[str, ...]
    rank: int
    coat: CoatConfig
    half: bool

    def setting(self, name: str) -> int:
        """One number of the settings."""
        return dict(self.settings)[name]


@dataclass(frozen=True)
class KeptBytes:
    """Of one picture: outside the blocks, of the first block (nothing before it is trained), of any other
    double block, of a single block.
    """

    outside: float
    first: float
    double: float
    single: float

    def of_blocks(self, double: int, single: int, checkpointed: int = 0) -> int:
        """Bytes that a model with these blocks keeps outside them, and in those from number `checkpointed` on
        (double blocks come before single ones)."""
        whole = max(0, double - checkpointed) * self.double
        whole += min(single, double + single - checkpointed) * self.single
        return round(self.outside + whole + (0 if checkpointed else self.first - self.double))

    def of_inputs(self, double: int, checkpointed: int) -> int:
        """Bytes that the first `checkpointed` blocks keep, where this was counted with checkpointing."""
        return round(min(double, checkpointed) * self.double + max(0, checkpointed - double) * self.single)


def small_lora_paths(paths: Sequence[str], blocks: Sequence[str]) -> tuple[str, ...]:
    """Paths of LoRAs in the large model -> those of block 0 of each kind (a LoRA in any block counts for
    all, so a range of blocks is planned as if it were all) and those outside the blocks.
    """
    small = {}
    for path in paths:
        parts = path.split(".")
        if ".".join(parts[:2]) in blocks:
            parts[1] = "0"
        small[".".join(parts)] = None
    return tuple(small)


def kept_bytes(model: TracedModel, image_tokens: int, text_tokens: int, checkpointed: bool) -> KeptBytes:
    """What one picture of so many tokens keeps under model.coat, all blocks checkpointed or none; counted
    with random weights on the CPU.
    """
    before = paddle.get_device()
    set_device("cpu")
    try:
        heads, own = _head_counts(model), model.setting("num_attention_heads")
        counts = [_at_tokens(model, n, checkpointed, image_tokens, text_tokens) for n in heads]
        share = (own - heads[0]) / (heads[-1] - heads[0]) if len(heads) > 1 else 0
        counts = counts[0] + (counts[-1] - counts[0]) * share
        if not checkpointed and _uses_autograd(model):
            counts[1:] += _attention_bytes(model, image_tokens + text_tokens)
        return KeptBytes(*counts)
    finally:
        paddle.set_device(before)


def _at_tokens(model: TracedModel, heads: int, checkpointed: bool, image: int, text: int) -> np.ndarray:
    """The four numbers of KeptBytes with so many heads; what attention keeps by itself is left out."""
    start, by_image, by_text = _lines(model, heads, checkpointed)
    return start + by_image * (image - SIDE**2) + by_text * (text - TEXT)


@lru_cache(maxsize=64)
def _lines(model: TracedModel, heads: int, checkpointed: bool) -> tuple[np.ndarray, ...]:
    """These numbers for SIDE x SIDE image tokens and TEXT text tokens, and per token more of each kind."""
    flux, coat = _small_model(model, heads, checkpointed)

    def at(columns: int, words: int) -> np.ndarray:
        counts = _count(model, flux, coat, columns, words)
        if not checkpointed and _uses_autograd(model):
            counts[1:] -= _scores_bytes(model, heads, SIDE * columns + words)
        return counts

    start = at(SIDE, TEXT)
    by_image = (at(2 * SIDE, TEXT) - start) / SIDE**2
    by_text = (at(SIDE, 2 * TEXT) - start) / TEXT
    return start, by_image, by_text


def _small_model(
    model: TracedModel, heads: int, checkpointed: bool
) -> tuple[FluxTransformer2DModel, COATTrainer]:
    """Two double blocks and a single one, made ready as for training."""
    sizes = {name: value for name, value in model.settings if not name.startswith("_")}
    flux = FluxTransformer2DModel(
        **(sizes | {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": heads})
    )
    memory = model.coat.memory.model_copy(update={"checkpoint_blocks": None})
    coat = COATTrainer(model.coat.model_copy(update={"memory": memory}), checkpointed)
    others = [
        path.replace(".0.", ".1.", 1) for path in model.lora_paths if path.startswith("transformer_blocks.")
    ]
    inject_lora(
        flux,
        model.rank,
        model.rank,
        targets=[*model.lora_paths, *others],
        policy=coat.policy,
        group_size=coat.linear_group_size,
    )
    coat.convert(flux)
    flux.train()
    return flux, coat


def _count(
    model: TracedModel, flux: FluxTransformer2DModel, coat: COATTrainer, columns: int, words: int
) -> np.ndarray:
    """One forward pass -> bytes kept outside the blocks, in the two double blocks, in the single one."""
    rng, config = np.random.default_rng(0), flux.config
    shapes = {
        "latents": (1, config.in_channels // 4, 2 * SIDE, 2 * columns),
        "prompt_embeds": (1, words, config.joint_attention_dim),
        "pooled": (1, config.pooled_projection_dim),
    }
    batch = {
        name: paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()
    }
    marks, hooks = [], []

    def mark(*_: object) -> None:
        marks.append(_bytes(model, saved))

    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        hooks += [block.register_forward_pre_hook(mark), block.register_forward_post_hook(mark)]
    with coat.saved_tensors() as saved:
        FlowMatching().loss(flux, batch, rng)
    for hook in hooks:
        hook.remove()
    blocks = np.subtract(marks[1::2], marks[::2])
    return np.array([_bytes(model, saved) - blocks.sum(), *blocks], dtype=np.float64)


def _scores_bytes(model: TracedModel, heads: int, tokens: int) -> int:
    """What written-out attention over one picture's tokens keeps, by itself."""
    shape = [1, tokens, heads, model.setting("attention_head_dim")]
    q, k, v = (paddle.ones(shape) for _ in range(3))
    for x in (q, k, v):
        x.stop_gradient = False
    with count_saved_tensors() as saved:
        attention(q, k, v)
    return _bytes(model, saved)


def _attention_bytes(model: TracedModel, tokens: int) -> float:
    """What attention in one block keeps at the true size. On a GPU: q, k, v, the output and a float32 per
    row (flash attention), and q and k in float32 before their norm, where a CPU counts bfloat16.
    """
    heads, head_dim = model.setting("num_attention_heads"), model.setting("attention_head_dim")
    if model.half:
        return tokens * heads * (4 * 2 * head_dim + 4 + 2 * 2 * head_dim)
    # a multiple of the tokens, for copies of q, k, v, and one of their square, for the scores
    one, two = (_scores_bytes(model, heads, n) for n in (16, 32))
    square = (two - 2 * one) / (32**2 - 2 * 16**2)
    return square * tokens**2 + (one / 16 - square * 16) * tokens


def _bytes(model: TracedModel, saved) -> int:
    return saved.bytes_kept_bf16 if model.half else saved.bytes_kept


def _uses_autograd(model: TracedModel) -> bool:
    """Whether blocks that are not checkpointed keep what autograd keeps."""
    return COATTrainer(model.coat).policy == "none"


def _head_counts(model: TracedModel) -> tuple[int, ...]:
    """Heads of the small models: so many that groups fill rows as they do at full width."""
    heads, head_dim = model.setting("num_attention_heads"), model.setting("attention_head_dim")
    group = model.coat.activation.group_size
    few = math.lcm(128, head_dim, group if group <= 512 else 1) // head_dim
    return (few, 2 * few) if heads > 2 * few else (heads,)
