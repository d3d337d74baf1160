"""The plan of a NewBie-image run: what is different from FLUX in plan_model.py and plan_phases.py.

All three encoders are loaded together, the VAE in float32. Gradient checkpointing covers the first of the
`layers`. A model folder that is not there is taken for NewBie-image 3B with Gemma3-4B and Jina CLIP v2.
"""

from __future__ import annotations

import math
from pathlib import Path

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from ppcoat.models.jina_clip import JinaClipConfig, JinaClipTextModel
from ppcoat.models.loading import read_json
from ppcoat.models.newbie_loading import check_newbie_vae, unfilled_nextdit
from ppcoat.models.newbie_pipeline import PROMPT_PREFIX, with_prefix
from ppcoat.models.newbie_tokens import MAX_GEMMA_TOKENS, load_gemma3_tokenizer
from ppcoat.models.nextdit import NextDiT_CLIP
from ppcoat.train.plan_kept import KeptBytes, kept_bytes, small_lora_paths
from ppcoat.train.plan_model import (
    DEV_VAE,
    DEV_VAE_CHANNELS,
    FLOAT32,
    BaseModel,
    Encoders,
    stored_values,
    weights_by_block,
)
from ppcoat.train.plan_newbie_kept import TracedNextDiT
from ppcoat.train.plan_phases import Choice, Footprint, hashable
from ppcoat.train.targets import chosen_modules

# As WORKING in plan_phases.py; "checkpointed" is beside what a layer keeps that has been computed again.
# Measured with Paddle's allocator.
NEWBIE_WORKING = {
    "none": ((9.2, 0.0), (-3.4, 2.0)),
    "coat": ((26.0, 0.0), (19.7, 2.3)),
    "coat+recompute": ((27.4, 0.0), (26.9, 2.3)),
    "coat+recompute+attention": ((27.4, 0.0), (26.9, 2.3)),
    "checkpointed": ((5.3, 0.0), (4.0, 2.0)),
}
NEWBIE_FORWARD_WORKING = ((18.0, 0.0), (11.0, 2.0))
# Linears that see one row a picture.
OF_PICTURE = ("adaLN", "t_embedder", "time_text_embed", "clip_text_pooled")


class NewbieFootprint(Footprint):
    """A Footprint of a config with model.family newbie. settings: of NextDiT_CLIP."""

    assumed_name = "NewBie-image 3B"
    forward_working = NEWBIE_FORWARD_WORKING
    drawn_at_once = 2  # with the prompt and without

    def __init__(self, config: RunConfig, on_gpu: bool, settings: dict | None = None) -> None:
        super().__init__(config, on_gpu, settings)
        self.vae_itemsize = FLOAT32

    def read_model(self, settings: dict | None) -> BaseModel:
        """The shapes of the config's folder, or of a NextDiT_CLIP with these settings and the published
        encoders. Raises ConfigError for a folder that is not complete and for targets that fit no Linear."""
        folder = Path(self.config.model.name_or_path)
        assumed = not folder.exists()
        if assumed or settings is not None:
            with paddle.LazyGuard():  # parameters get a shape and no memory
                model = NextDiT_CLIP(**(settings or {}))
        else:
            model = unfilled_nextdit(folder / "transformer")
        blocks = tuple(f"layers.{i}" for i in range(len(model.layers)))
        linears, others = weights_by_block(model, blocks)
        return BaseModel(
            settings=dict(model.config),
            linears=linears,
            blocks=blocks,
            double=len(blocks),
            others=others,
            lora_paths=tuple(chosen_modules(self.config.network, model)),
            encoders=_encoders(None if assumed or settings is not None else folder),
            text_tokens=self._text_tokens(folder, model.config["axes_lens"][0]),
            width=model.config["dim"],
            heads=model.config["n_heads"],
            assumed=assumed,
            of_picture=OF_PICTURE,
        )

    def preparing(self, choice: Choice) -> list[tuple[str, dict[str, int]]]:
        """Encoding with all encoders on the device."""
        text = self.model.encoders.text * self.itemsize
        return [
            (name, parts | {"encoders": text + self._vae_bytes}) for name, parts in super().preparing(choice)
        ]

    def activations(self, choice: Choice) -> tuple[int, int]:
        """Bytes kept for backward and working memory at the fullest moment of a step: at the end of the
        forward pass, or where backward comes to the checkpointed layers and computes one again.
        """
        batch, checkpointed, moments = choice.batch_size, choice.checkpoint_blocks, []
        if checkpointed < len(self.model.blocks):
            working = self._working(NEWBIE_WORKING[choice.policy], batch)
            moments.append((self.kept_after_forward(choice, len(self.model.blocks)), working))
        if checkpointed:
            again = self.kept("none" if choice.policy == "none" else "coat", True, choice.quantize).double
            working = self._working(NEWBIE_WORKING["checkpointed"], batch) + round(batch * again)
            moments.append((self.kept_after_forward(choice, checkpointed), working))
        kept, working = max(moments, key=sum)
        return kept, working + self._largest_weight(choice)

    def kept_after_forward(self, choice: Choice, layers: int) -> int:
        """Bytes kept for backward by the first `layers` and what stands outside them."""
        of = self.kept(choice.policy, False, choice.quantize)
        kept = of.of_blocks(layers, 0, choice.checkpoint_blocks)
        if choice.checkpoint_blocks:
            tables = max(0, of.first - of.double)  # of rotation, which the first layer is to keep
            kept += choice.checkpoint_blocks * self._input_bytes + tables
        return round(choice.batch_size * kept)

    @property
    def _input_bytes(self) -> int:
        """Of one picture's tokens, as a checkpointed layer keeps them."""
        coat, width = self.config.coat, self.model.width
        if not (coat.enabled and coat.memory.enable_efficient_checkpoint):
            return self.tokens * width * self.itemsize
        per_group = coat.activation.nonlinear_granularity == "per_group"
        scales = math.ceil(width / coat.activation.group_size) if per_group else 0
        return self.tokens * (width + FLOAT32 * scales)

    def packed(self, choice: Choice) -> int:
        """Bytes of one picture that go through FP8 if no layer is checkpointed."""
        return self.kept(choice.policy, False, choice.quantize).of_blocks(len(self.model.blocks), 0)

    def kept(self, policy: str, checkpointed: bool = False, quantize: bool = False) -> KeptBytes:
        """Of one picture, counted once."""
        if (policy, checkpointed, quantize) not in self._kept:
            coat, model = self.config.coat, self.model
            activation = coat.activation.model_copy(update={"policy": policy})
            feed_forward = model.linears[f"{model.blocks[0]}.feed_forward.w2"]
            traced = TracedNextDiT(
                settings=hashable(model.settings),
                lora_paths=small_lora_paths(model.lora_paths, model.blocks),
                rank=self.config.network.linear,
                coat=coat.model_copy(update={"activation": activation}),
                half=self.half,
                network=self.config.network,
                quantize=quantize,
                hidden=feed_forward[0],
            )
            counted = kept_bytes(traced, self.image_tokens, self.text_tokens, checkpointed)
            self._kept[policy, checkpointed, quantize] = counted
        return self._kept[policy, checkpointed, quantize]

    def _text_tokens(self, folder: Path, positions: int) -> int:
        """Of the longest caption with its prefix, or the limit where captions or tokenizer are not here."""
        limit = self.config.train.max_sequence_length or MAX_GEMMA_TOKENS
        pictures = [Path(data.folder_path) for data in self.config.datasets]
        if not all(path.exists() for path in (folder / "text_encoder" / "tokenizer.json", *pictures)):
            return min(limit, positions - 1)
        prefix = self.config.model.prompt_prefix
        captions = [caption for each in all_examples(scan_datasets(self.config)) for caption in each.captions]
        texts = with_prefix(captions, PROMPT_PREFIX if prefix is None else prefix)
        tokens = load_gemma3_tokenizer(folder / "text_encoder")(texts, limit)
        return int(tokens.mask.sum(-1).max())


def _encoders(folder: Path | None) -> Encoders:
    """Those of a folder, None: Gemma3-4B, Jina CLIP v2 and FLUX.1's VAE."""
    gemma3, jina_clip, vae, channels = Gemma3Config(), JinaClipConfig(), DEV_VAE, DEV_VAE_CHANNELS
    if folder is not None:
        gemma3 = Gemma3Config.from_dict(read_json(folder / "text_encoder" / "config.json"))
        jina_clip = JinaClipConfig.from_dict(read_json(folder / "clip_model" / "config.json"))
        vae, channels = (
            stored_values(folder / "vae"),
            check_newbie_vae(folder / "vae")["block_out_channels"][0],
        )
    with paddle.LazyGuard():
        models = Gemma3TextEncoder(gemma3), JinaClipTextModel(jina_clip)
    text = sum(math.prod(p.shape) for model in models for p in model.parameters())
    return Encoders(text, vae, gemma3.num_attention_heads, gemma3.intermediate_size, channels)
