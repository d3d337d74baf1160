"""The plan of a NewBie-image run: what is different from FLUX in model.py, phases.py and saved_bytes.py.

All three encoders are loaded together, the VAE in float32. Gradient checkpointing covers the first of the
`layers`. A model folder that is not there is taken for NewBie-image 3B with Gemma3-4B and Jina CLIP v2.

What is saved for backward is counted on a small copy with two of the `layers` and all refiners. A
checkpointed layer saves its input, whose bytes are known; so "checkpointed" counts here what a layer holds
while it is computed again, without FP8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import paddle

from ppcoat.coat import COATTrainer, chosen_modules, prepare
from ppcoat.config.schema import RunConfig
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.models.newbie.files import check_newbie_vae, unfilled_nextdit
from ppcoat.models.newbie.gemma3 import Gemma3Config, Gemma3TextEncoder
from ppcoat.models.newbie.jina_clip import (
    MAX_GEMMA_TOKENS,
    JinaClipConfig,
    JinaClipTextModel,
    load_gemma3_tokenizer,
)
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.models.newbie.pipeline import PROMPT_PREFIX, with_prefix
from ppcoat.models.tensor_files import component_config
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.policy import POLICIES
from ppcoat.nn.saved_tensors import SavedTensors, count_saved_tensors, saved_as_they_are
from ppcoat.objective import NewbieFlowMatching
from ppcoat.plan.model import (
    DEV_VAE,
    DEV_VAE_CHANNELS,
    FLOAT32,
    BaseModel,
    EncoderSizes,
    stored_values,
    text_streamed,
    weights_by_block,
    without_memory,
)
from ppcoat.plan.phases import MemoryModel, Settings
from ppcoat.plan.saved_bytes import SIDE, TracedModel

# As WORKING in phases.py; "checkpointed" is beside what a layer saves that has been computed again.
# Measured with Paddle's allocator.
NEWBIE_WORKING = {
    "none": ((9.2, 0.0), (-3.4, 2.0)),
    "coat": ((18.4, 0.3), (2.0, 3.0)),
    "coat+recompute": ((19.6, 0.3), (3.5, 3.0)),
    "coat+recompute+attention": ((19.6, 0.3), (5.5, 3.0)),
    "checkpointed": ((12.0, 0.3), (-9.0, 3.0)),
}
NEWBIE_FORWARD_WORKING = ((18.0, 0.0), (11.0, 2.0))
# Linears that see one row a picture.
OF_PICTURE = ("adaLN", "t_embedder", "time_text_embed", "clip_text_pooled")
WIDE_ENOUGH = 256  # channels of a small copy, so that no tensor of its tokens is too small for FP8


class NewbieMemoryModel(MemoryModel):
    """A MemoryModel of a config with model.family newbie. transformer: settings of NextDiT_CLIP."""

    assumed_name = "NewBie-image 3B"
    forward_working = NEWBIE_FORWARD_WORKING
    before_product, fullest_without_weight = 13.0, tuple(policy for policy in POLICIES if policy != "none")
    drawn_at_once = 2  # with the prompt and without

    def __init__(self, config: RunConfig, on_gpu: bool, transformer: dict | None = None) -> None:
        super().__init__(config, on_gpu, transformer)
        self.vae_itemsize = FLOAT32

    def read_model(self, transformer: dict | None) -> BaseModel:
        """The shapes of the config's folder, or of a NextDiT_CLIP with these settings and the published
        encoders. Raises ConfigError for a folder that is not complete and for targets that fit no Linear."""
        folder = Path(self.config.model.name_or_path)
        assumed = not folder.exists()
        if assumed or transformer is not None:
            model = without_memory(NextDiT_CLIP, json.dumps(transformer or {}, sort_keys=True))
        else:
            model = unfilled_nextdit(folder / "transformer")
        blocks = tuple(f"layers.{i}" for i in range(len(model.layers)))
        linears, others = weights_by_block(model, blocks)
        return BaseModel(
            transformer=dict(model.config),
            linears=linears,
            blocks=blocks,
            double=len(blocks),
            others=others,
            lora_paths=tuple(chosen_modules(self.config.network, model)),
            encoders=_encoders(None if assumed or transformer is not None else folder),
            text_tokens=self._text_tokens(folder, model.config["axes_lens"][0]),
            width=model.config["dim"],
            heads=model.config["n_heads"],
            assumed=assumed,
            of_picture=OF_PICTURE,
        )

    def preparing(self, settings: Settings) -> list[tuple[str, dict[str, int]]]:
        """Encoding with all encoders on the device, or in turns where they are streamed."""
        phases = super().preparing(settings)
        if settings.stream_encoders and self.on_gpu:
            return phases
        together = self._text_bytes(settings.stream_encoders) + self._vae_bytes
        return [(name, parts | {"encoders": together}) for name, parts in phases]

    def activations(self, settings: Settings) -> tuple[int, int]:
        """Bytes saved for backward and working memory at the fullest moment of a step: at the end of the
        forward pass, or where backward comes to the checkpointed layers and computes one again.
        """
        batch, checkpointed, moments = settings.batch_size, settings.checkpoint_blocks, []
        if checkpointed < len(self.model.blocks):
            working = self._working(NEWBIE_WORKING[settings.policy], batch)
            moments.append((self.saved_after_forward(settings, len(self.model.blocks)), working))
        if checkpointed:
            again = self.saved(settings, True).double
            working = self._working(NEWBIE_WORKING["checkpointed"], batch) + round(batch * again)
            moments.append((self.saved_after_forward(settings, checkpointed), working))
        saved, working = max(moments, key=sum)
        return saved, self._with_weight(working, settings)

    def saved_after_forward(self, settings: Settings, layers: int) -> int:
        """Bytes saved for backward by the first `layers` and what stands outside them."""
        of = self.saved(settings)
        saved = of.of_blocks(layers, 0, settings.checkpoint_blocks)
        if settings.checkpoint_blocks:
            tables = max(0, of.first - of.double)  # of rotation, which the first layer is to save
            saved += settings.checkpoint_blocks * self._input_bytes + tables
        return round(settings.batch_size * saved)

    @property
    def _input_bytes(self) -> int:
        """Of one picture's tokens, as a checkpointed layer saves them."""
        coat, width = self.config.coat, self.model.width
        if not (coat.enabled and coat.memory.enable_efficient_checkpoint):
            return self.tokens * width * self.itemsize
        per_group = coat.activation.nonlinear_granularity == "per_group"
        scales = math.ceil(width / coat.activation.group_size) if per_group else 0
        return self.tokens * (width + FLOAT32 * scales)

    def saved_by_all_blocks(self, settings: Settings) -> int:
        """Bytes of one picture that go through FP8 if no layer is checkpointed."""
        return self.saved(settings).of_blocks(len(self.model.blocks), 0)

    def traced(self, settings: Settings, checkpointed: bool) -> TracedNextDiT:
        """The model whose saved bytes are counted. What a checkpointed layer saves while it is computed again
        depends on whether ops save by hand, not on the policy."""
        policy = settings.policy
        if checkpointed:
            policy = "none" if policy == "none" else "coat"
        return TracedNextDiT(
            **self.traced_facts(policy),
            quantized=bool(settings.quantize),
            hidden=self.model.linears[f"{self.model.blocks[0]}.feed_forward.w2"][0],
        )

    def _text_tokens(self, folder: Path, positions: int) -> int:
        """Of the longest caption with its prefix, or the limit where captions or tokenizer are not here."""
        limit = self.config.train.max_sequence_length or MAX_GEMMA_TOKENS
        pictures = [Path(data.folder_path) for data in self.config.datasets]
        if not all(path.exists() for path in (folder / "text_encoder" / "tokenizer.json", *pictures)):
            return min(limit, positions - 1)
        prefix = self.config.model.prompt_prefix
        captions = [caption for each in all_examples(scan_datasets(self.config)) for caption in each.texts]
        texts = with_prefix(captions, PROMPT_PREFIX if prefix is None else prefix)
        tokens = load_gemma3_tokenizer(folder / "text_encoder")(texts, limit)
        return int(tokens.mask.sum(-1).max())


def _encoders(folder: Path | None) -> EncoderSizes:
    """Those of a folder, None: Gemma3-4B, Jina CLIP v2 and FLUX.1's VAE."""
    gemma3, jina_clip, vae, channels = Gemma3Config(), JinaClipConfig(), DEV_VAE, DEV_VAE_CHANNELS
    if folder is not None:
        gemma3 = Gemma3Config.from_dict(component_config(folder / "text_encoder", "gemma3"))
        jina_clip = JinaClipConfig.from_dict(component_config(folder / "clip_model", "jina_clip"))
        vae, channels = (
            stored_values(folder / "vae"),
            check_newbie_vae(folder / "vae")["block_out_channels"][0],
        )
    text, *layers = _text_parameters(gemma3, jina_clip)
    streamed = text_streamed(text, layers)
    return EncoderSizes(
        text, vae, gemma3.num_attention_heads, gemma3.intermediate_size, channels, streamed=streamed
    )


@lru_cache(maxsize=4)
def _text_parameters(gemma3: Gemma3Config, jina_clip: JinaClipConfig) -> list[int]:
    """Parameters of both text encoders, and of each layer of Gemma3."""
    with paddle.LazyGuard():
        models = Gemma3TextEncoder(gemma3), JinaClipTextModel(jina_clip)
    return [
        sum(math.prod(p.shape) for model in some for p in model.parameters())
        for some in (models, *([layer] for layer in models[0].layers))
    ]


@dataclass(frozen=True)
class TracedNextDiT(TracedModel):
    """settings: of NextDiT_CLIP. lora_paths: of block 0 of `layers`, and of all outside. quantized: the base
    is, in any format: its Linears save nothing. hidden: inner width of a feed-forward."""

    quantized: bool
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

    @property
    def key_heads(self) -> int:
        """Of the keys and values."""
        return self.setting("n_kv_heads")

    @property
    def norm_inputs(self) -> int:
        """Values per token of a layer that autograd saves in float32 before a norm: four inputs, q and k."""
        return (5 * self.heads + self.key_heads) * self.head_dim

    def counts_remainder(self, checkpointed: bool) -> bool:
        """Also in a checkpointed layer, whose ops save by hand while it is computed again."""
        return checkpointed or super().counts_remainder(checkpointed)

    def small_heads(self) -> tuple[int, ...]:
        """Multiples of the query heads that share a key head."""
        shared = self.heads // self.setting("n_kv_heads")
        few = shared * -(-WIDE_ENOUGH // (shared * self.head_dim))
        return (few, 2 * few) if self.heads > 2 * few else (self.heads,)

    def small_model(self, heads: int, checkpointed: bool) -> paddle.nn.Layer:
        """Two layers, made ready as for training; the widths of heads and feed-forward shrink alike."""
        own: dict[str, Any] = dict(self.settings)
        dim = heads * self.head_dim
        sizes = own | {"n_layers": 2, "n_heads": heads, "dim": dim, "multiple_of": 1}
        sizes["n_kv_heads"] = heads * own["n_kv_heads"] // own["n_heads"]
        sizes["ffn_dim_multiplier"] = self.hidden / (4 * own["dim"])
        model, coat = NextDiT_CLIP(**sizes), COATTrainer(self.coat)
        if self.quantized:
            quantize_linears(model)
        others = [path.replace(".0.", ".1.", 1) for path in self.lora_paths if path.startswith("layers.")]
        prepare(model, coat, self.without_dropout, paths=[*self.lora_paths, *others])
        return model

    def shapes(self, config: Mapping, columns: int, words: int) -> dict[str, tuple[int, ...]]:
        """Of the batch of one picture that a small model of this config is given."""
        return {
            "latents": (1, config["in_channels"], 2 * SIDE, 2 * columns),
            "cap_feats": (1, words, config["cap_feat_dim"]),
            "clip_text_pooled": (1, config["clip_text_dim"]),
        }

    def batch(self, config: Mapping, columns: int, words: int) -> dict[str, paddle.Tensor]:
        """These, and a mask [1, words] without padding."""
        return super().batch(config, columns, words) | {"cap_mask": paddle.ones([1, words], dtype="int64")}

    def objective(self) -> NewbieFlowMatching:
        """What the pass computes."""
        return NewbieFlowMatching()

    @contextmanager
    def saving(self, checkpointed: bool = False) -> Iterator[SavedTensors]:
        """Context manager of the pass: nothing is in FP8 in what is computed again."""
        if not checkpointed:
            with COATTrainer(self.coat).saved_tensors() as saved:
                yield saved
            return
        with count_saved_tensors() as saved, saved_as_they_are():
            yield saved

    def written_attention(self, heads: int, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What written-out attention saves of the numbers of SavedBytes."""
        if self.attention_is_counted(checkpointed):
            return np.zeros(4)
        return self._of_parts(*(self.scores_bytes(heads, n) for n in (image, text, image + text)))

    def true_attention(self, image: int, text: int, checkpointed: bool) -> np.ndarray:
        """What attention saves of these numbers at the true size, or what the counters are off by."""
        return self._of_parts(*(self.attention_bytes(n, checkpointed) for n in (image, text, image + text)))

    def _of_parts(self, image: float, text: float, both: float) -> np.ndarray:
        refiners = self.setting("n_refiner_layers")
        return np.array([refiners * (image + text), both, both, 0.0])
