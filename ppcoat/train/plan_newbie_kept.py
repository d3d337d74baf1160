"""How many bytes NextDiT_CLIP keeps for backward: what is different from FLUX in plan_kept.py.

The small copy has two of the `layers` and all refiners. A checkpointed layer keeps its input, whose bytes are
known; so "checkpointed" counts here what a layer holds while it is computed again, unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import paddle

from ppcoat.config.schema import NetworkConfig
from ppcoat.lora import LoKrSettings, inject_lokr, inject_lora
from ppcoat.models.nextdit import NextDiT_CLIP
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.policy import get_policy
from ppcoat.nn.saved import SavedTensors, count_saved_tensors, kept_as_they_are
from ppcoat.train.coat import COATTrainer
from ppcoat.train.plan_kept import SIDE, TracedModel
from ppcoat.train.transport import Transport

WIDE_ENOUGH = 256  # channels of a small copy, so that no tensor of its tokens is too small to be packed


@dataclass(frozen=True)
class TracedNextDiT(TracedModel):
    """settings: of NextDiT_CLIP. lora_paths: of block 0 of `layers`, and of all outside. network: the kind of
    adapter. quantize: an FP8 base, whose Linears keep nothing. hidden: inner width of a feed-forward."""

    network: NetworkConfig
    quantize: bool
    hidden: int
    own_sizes: ClassVar[tuple[str, ...]] = ("n_layers",)

    @property
    def heads(self) -> int:
        """Of the queries."""
        return self.setting("n_heads")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.setting("dim") // self.heads

    def small_heads(self) -> tuple[int, ...]:
        """Multiples of the query heads that share a key head."""
        shared = self.heads // self.setting("n_kv_heads")
        few = shared * -(-WIDE_ENOUGH // (shared * self.head_dim))
        return (few, 2 * few) if self.heads > 2 * few else (self.heads,)

    def small_model(self, heads: int, checkpointed: bool) -> paddle.nn.Layer:
        """Two layers, made ready as for training; the widths of heads and feed-forward shrink alike."""
        own, dim = dict(self.settings), heads * self.head_dim
        sizes = own | {"n_layers": 2, "n_heads": heads, "dim": dim, "multiple_of": 1}
        sizes["n_kv_heads"] = heads * own["n_kv_heads"] // own["n_heads"]
        sizes["ffn_dim_multiplier"] = self.hidden / (4 * own["dim"])
        model, coat = NextDiT_CLIP(**sizes), COATTrainer(self.coat, checkpointed)
        if self.quantize:
            quantize_linears(model)
        others = [path.replace(".0.", ".1.", 1) for path in self.lora_paths if path.startswith("layers.")]
        targets, rank = [*self.lora_paths, *others], self.rank
        if self.network.type == "lokr":
            settings = LoKrSettings(rank, self.network.linear_alpha, self.network.lokr_factor)
            inject_lokr(model, settings, targets)
        else:
            inject_lora(model, rank, rank, 0.0, targets, coat.policy, group_size=coat.linear_group_size)
        coat.convert(model)
        model.train()
        return model

    def small_blocks(self, model: paddle.nn.Layer) -> list[paddle.nn.Layer]:
        """The two layers."""
        return list(model.layers)

    def shapes(self, config: Mapping, columns: int, words: int) -> dict[str, tuple[int, ...]]:
        """Of the batch of one picture that a small model of this config is given."""
        return {
            "latents": (1, config["in_channels"], 2 * SIDE, 2 * columns),
            "cap_feats": (1, words, config["cap_feat_dim"]),
            "clip_text_pooled": (1, config["clip_text_dim"]),
        }

    def batch(self, config: Mapping, columns: int, words: int) -> dict[str, paddle.Tensor]:
        """These, and a mask without padding."""
        return super().batch(config, columns, words) | {"cap_mask": paddle.ones([1, words], dtype="int64")}

    def objective(self) -> Transport:
        """What the pass computes."""
        return Transport()

    @contextmanager
    def saving(self, checkpointed: bool = False) -> Iterator[SavedTensors]:
        """Nothing is packed in what is computed again."""
        if not checkpointed:
            with COATTrainer(self.coat).saved_tensors() as saved:
                yield saved
            return
        with count_saved_tensors() as saved, kept_as_they_are():
            yield saved

    def written_attention(self, heads: int, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What written-out attention keeps of the numbers of KeptBytes."""
        if self._leaves_out_attention(checkpointed):
            return np.zeros(4)

        def scores(tokens: int) -> int:
            return self.scores_bytes(heads, tokens, checkpointed)

        return self._of_parts(scores(image), scores(text), scores(image + text))

    def true_attention(self, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What attention keeps of these numbers at the true size; on a GPU q, k, v, the output and a float32
        per row (flash attention), and what RMSNorms keep in float32 where a CPU counts bfloat16."""
        if self._leaves_out_attention(checkpointed):
            return np.zeros(4)

        def of_block(tokens: int) -> float:
            if not self.half:
                return self.large_scores_bytes(tokens, checkpointed)
            width, plain = self.setting("dim"), checkpointed or self.uses_autograd
            groups = -(-self.head_dim // self.coat.activation.group_size)
            of_head = 2 * self.head_dim if plain else self.head_dim + 4 * groups
            keys = self.setting("n_kv_heads") * self.head_dim
            norms = 2 * (4 * width + width + keys) if plain else 0
            return tokens * (self.heads * (4 * of_head + 4) + norms)

        return self._of_parts(of_block(image), of_block(text), of_block(image + text))

    def _leaves_out_attention(self, checkpointed: bool) -> bool:
        """Whether it is computed again: what it reads is counted with the block."""
        return not checkpointed and get_policy(COATTrainer(self.coat).policy).recompute

    def _of_parts(self, image: float, text: float, both: float) -> np.ndarray:
        refiners = self.setting("n_refiner_layers")
        return np.array([refiners * (image + text), both, both, 0.0])
