"""How many bytes a model saves for backward, counted by the counters of training on a small one.

TracedModel is FLUX; newbie.py says what is different for NewBie-image.

A small copy (three blocks, one or two groups of heads, 128 to 192 tokens) takes a forward pass through the
very code that trains, and `SavedTensors` counts before and after each block. Every count is a constant plus a
multiple of the image tokens, the text tokens and the heads, so three numbers of tokens and two of heads tell
it for any size. Only Paddle's written-out attention saves more (its scores), and that is counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import paddle
from paddle.nn.initializer import Constant, set_global_initializer

from ppcoat.coat import COATTrainer, prepare
from ppcoat.config.schema import CoatConfig, NetworkConfig
from ppcoat.device import set_device
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.nn.attention import MATH, attention, fused_remainder
from ppcoat.nn.saved_tensors import SavedTensors, count_saved_tensors
from ppcoat.objective import FlowMatching, Objective
from ppcoat.plan.model import BFLOAT16, FLOAT32

SIDE = 8  # rows of image tokens of the small model: enough that no tensor is too small for FP8
TEXT = 64  # its text tokens
RANK = 256  # from twice this rank on, a LoRA is not traced itself
SCORES_AT = 128  # tokens, and twice as many, from which the scores of any number are known


@dataclass(frozen=True)
class TracedModel:
    """What the trace wants to know. settings: of FluxTransformer2DModel, hashable; lora_paths: inside the
    blocks of a model of one block of each kind, from `small_lora_paths`. half: it computes in bfloat16, on a
    GPU. kernel: of attention, by its name in nn/attention.py. network: the kind of adapter.
    """

    settings: tuple[tuple[str, object], ...]
    lora_paths: tuple[str, ...]
    network: NetworkConfig
    coat: CoatConfig
    half: bool
    kernel: str
    own_sizes: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers", "num_attention_heads")

    def setting(self, name: str) -> int:
        """One number of the settings."""
        return dict(self.settings)[name]

    @property
    def heads(self) -> int:
        """Of the large model."""
        return self.setting("num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.setting("attention_head_dim")

    @property
    def key_heads(self) -> int:
        """Of the large model."""
        return self.heads

    def attention_is_counted(self, checkpointed: bool) -> bool:
        """Whether attention is an op that saves by hand, whose bytes are those of a large model: always but
        where blocks save what autograd saves."""
        return checkpointed or COATTrainer(self.coat).policy != "none"

    def small_heads(self) -> tuple[int, ...]:
        """Heads of the small models: head counts for which groups divide rows exactly, as at full width."""
        group = self.coat.activation.group_size
        few = math.lcm(128, self.head_dim, group if group <= 512 else 1) // self.head_dim
        return (few, 2 * few) if self.heads > 2 * few else (self.heads,)

    def without_own_sizes(self) -> TracedModel:
        """What one trace serves: without the settings that `small_model` sets by itself, and without the
        kernel, which is not traced."""
        shared = tuple(pair for pair in self.settings if pair[0] not in self.own_sizes)
        return replace(self, settings=shared, kernel=MATH)

    def small_model(self, heads: int, checkpointed: bool) -> paddle.nn.Layer:
        """Two double blocks and a single one, made ready as for training."""
        sizes = {name: value for name, value in self.settings if not name.startswith("_")}
        flux = FluxTransformer2DModel(
            **(sizes | {"num_layers": 2, "num_single_layers": 1, "num_attention_heads": heads})
        )
        memory = self.coat.memory.model_copy(update={"checkpoint_blocks": None})
        coat = COATTrainer(self.coat.model_copy(update={"memory": memory}), checkpointed)
        others = [
            path.replace(".0.", ".1.", 1)
            for path in self.lora_paths
            if path.startswith("transformer_blocks.")
        ]
        prepare(flux, coat, self.without_dropout, paths=[*self.lora_paths, *others])
        return flux

    @property
    def without_dropout(self) -> NetworkConfig:
        """The adapter; what is dropped is counted as if it stayed."""
        whole = dict.fromkeys(("dropout", "lokr_rank_dropout", "lokr_module_dropout"), 0.0)
        return self.network.model_copy(update=whole)

    def shapes(self, config: Mapping, columns: int, words: int) -> dict[str, tuple[int, ...]]:
        """Of the batch of one picture that a small model of this config is given."""
        channels = (config["out_channels"] or config["in_channels"]) // 4
        latents = (1, channels, 2 * SIDE, 2 * columns)
        fill = {"masked_latents": latents, "mask": (1, 1, 16 * SIDE, 16 * columns)}
        return {
            "latents": latents,
            "prompt_embeds": (1, words, config["joint_attention_dim"]),
            "pooled": (1, config["pooled_projection_dim"]),
            **(fill if config["in_channels"] > 4 * channels else {}),
        }

    def batch(self, config: Mapping, columns: int, words: int) -> dict[str, paddle.Tensor]:
        """Random float32 numbers in the shape that `shapes` has for each name, latents [1, C, h, w]."""
        rng = np.random.default_rng(0)
        shapes = self.shapes(config, columns, words)
        return {
            name: paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))
            for name, shape in shapes.items()
        }

    def saving(self, checkpointed: bool = False) -> AbstractContextManager:
        """The context of the pass."""
        return COATTrainer(self.coat).saved_tensors()

    def objective(self) -> Objective:
        """What the pass computes."""
        return FlowMatching()

    def written_attention(self, heads: int, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What written-out attention saves, as the four numbers of SavedBytes."""
        if self.attention_is_counted(checkpointed):
            return np.zeros(4)
        return np.array([0, *[self.scores_bytes(heads, image + text)] * 3])

    def true_attention(self, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What attention saves at the true size, or what the counters are off by, as these numbers."""
        return np.array([0, *[self.attention_bytes(image + text, checkpointed)] * 3])

    def attention_bytes(self, tokens: int, checkpointed: bool) -> float:
        """Of one block over so many tokens. A fused kernel saves q, k, v, the output and a float32 per row
        and head, the written-out form its scores; on top comes what norms save in float32 where a CPU counts
        bfloat16. Where attention is an op, counters in bfloat16 count what a fused kernel saves beside q, k
        and v, those in float32 do not.
        """
        itemsize = BFLOAT16 if self.half else FLOAT32
        remainder = fused_remainder(self.heads, self.key_heads, self.head_dim, itemsize)
        if self.attention_is_counted(checkpointed):
            counted = remainder if self.half else 0
            true = 0 if self.kernel == MATH else remainder
            return tokens * (true - counted) if self.counts_remainder(checkpointed) else 0
        norms = tokens * (FLOAT32 - BFLOAT16) * self.norm_inputs if self.half else 0
        if self.kernel == MATH:
            return self.large_scores_bytes(tokens) + norms
        qkv = (self.heads + 2 * self.key_heads) * itemsize * self.head_dim
        return tokens * (qkv + remainder) + norms

    def counts_remainder(self, checkpointed: bool) -> bool:
        """Whether the pass counts what a fused kernel saves beside q, k and v."""
        return not checkpointed and COATTrainer(self.coat).policy == "coat"

    @property
    def norm_inputs(self) -> int:
        """Values per token of a block that autograd saves in float32 before a norm: q and k."""
        return 2 * self.heads * self.head_dim

    def large_scores_bytes(self, tokens: int) -> float:
        """`scores_bytes` of all heads for any number of tokens: a multiple of them, for copies of q, k, v,
        and one of their square, for the scores."""
        few = SCORES_AT
        one, two = (self.scores_bytes(self.heads, n) for n in (few, 2 * few))
        square = (two - 2 * one) / (2 * few**2)
        return square * tokens**2 + (one / few - square * few) * tokens

    def scores_bytes(self, heads: int, tokens: int) -> int:
        """What autograd saves of written-out attention over one picture's tokens."""
        q, k, v = (paddle.ones([1, tokens, heads, self.head_dim]) for _ in range(3))
        for x in (q, k, v):
            x.stop_gradient = False
        with count_saved_tensors() as saved:
            attention(q, k, v)
        return self.bytes(saved)

    def bytes(self, saved: SavedTensors) -> int:
        """What was counted, in the dtype of the large model."""
        return saved.bytes_kept_bf16 if self.half else saved.bytes_kept


@dataclass(frozen=True)
class SavedBytes:
    """Of one picture: outside the blocks, of the first block (nothing before it is trained), of any other
    double block, of a single block.
    """

    outside: float
    first: float
    double: float
    single: float

    def of_blocks(self, double: int, single: int, checkpointed: int = 0) -> int:
        """Bytes that a model with these blocks saves outside them, and in those from number `checkpointed` on
        (double blocks come before single ones)."""
        whole = max(0, double - checkpointed) * self.double
        whole += min(single, double + single - checkpointed) * self.single
        return round(self.outside + whole + (0 if checkpointed else self.first - self.double))

    def of_inputs(self, double: int, checkpointed: int) -> int:
        """Bytes that the first `checkpointed` blocks save, where this was counted with checkpointing."""
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


def count_saved_bytes(
    model: TracedModel, image_tokens: int, text_tokens: int, checkpointed: bool
) -> SavedBytes:
    """What one picture of so many tokens saves under model.coat, all blocks checkpointed or none; counted
    on the CPU, with weights that are all the same.
    """
    before = paddle.get_device()
    set_device("cpu")
    try:
        heads, own = model.small_heads(), model.heads
        counts = [_at_tokens(model, n, checkpointed, image_tokens, text_tokens) for n in heads]
        share = (own - heads[0]) / (heads[-1] - heads[0]) if len(heads) > 1 else 0
        counts = counts[0] + (counts[-1] - counts[0]) * share
        return SavedBytes(*(counts + model.true_attention(image_tokens, text_tokens, checkpointed)))
    finally:
        paddle.set_device(before)


def _at_tokens(model: TracedModel, heads: int, checkpointed: bool, image: int, text: int) -> np.ndarray:
    """The four numbers of SavedBytes with so many heads; what attention saves by itself is left out."""
    start, by_image, by_text = _lines(model.without_own_sizes(), heads, checkpointed)
    return start + by_image * (image - SIDE**2) + by_text * (text - TEXT)


@lru_cache(maxsize=64)
def _lines(model: TracedModel, heads: int, checkpointed: bool) -> tuple[np.ndarray, ...]:
    """These numbers for SIDE x SIDE image tokens and TEXT text tokens, and per token more of each kind. What
    a LoRA saves grows evenly with its rank, so that no LoRA of a large one need be made."""
    rank = model.network.linear
    if rank > 2 * RANK:
        one, two = (_lines(replace(model, network=model.network.model_copy(update={"linear": each})),
                           heads, checkpointed) for each in (RANK, 2 * RANK))  # fmt: skip
        return tuple(a + (b - a) * ((rank - RANK) / RANK) for a, b in zip(one, two, strict=True))
    weight = Constant(0.01)  # bytes do not depend on it, and to draw random weights takes longer
    set_global_initializer(weight, weight)
    try:
        small = model.small_model(heads, checkpointed)
    finally:
        set_global_initializer(None)

    def at(columns: int, words: int) -> np.ndarray:
        counts = _count(model, small, checkpointed, columns, words)
        return counts - model.written_attention(heads, SIDE * columns, words, checkpointed)

    start = at(SIDE, TEXT)
    by_image = (at(2 * SIDE, TEXT) - start) / SIDE**2
    by_text = (at(SIDE, 2 * TEXT) - start) / TEXT
    return start, by_image, by_text


def _count(
    model: TracedModel, small: paddle.nn.Layer, checkpointed: bool, columns: int, words: int
) -> np.ndarray:
    """One forward pass -> bytes saved outside the blocks, and in each of three (0 if it is not there)."""
    batch = model.batch(small.config, columns, words)
    run_block, of_blocks = small.run_block, []

    def counted(*args: object, **settings: object) -> object:
        before = model.bytes(saved)
        result = run_block(*args, **settings)
        of_blocks.append(model.bytes(saved) - before)
        return result

    small.run_block = counted
    with model.saving(checkpointed) as saved:
        model.objective().loss(small, batch, np.random.default_rng(1))
    small.run_block = run_block
    blocks = np.zeros(3)
    blocks[: len(of_blocks)] = of_blocks
    return np.array([model.bytes(saved) - blocks.sum(), *blocks], dtype=np.float64)
