"""What each phase of a run holds under given settings, in bytes by component, and how long an update takes.

Weights and states are counted from shapes (model.py), saved activations by the counters of training
(saved_bytes.py); the working memory of a block was measured. Each phase counts only the models it needs:
encoders leave the device after use, and the transformer comes after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.data.cache import ENCODED_AT_ONCE, ENCODED_PIXELS
from ppcoat.device import LARGEST_KEPT, gpu_place
from ppcoat.models.offload import Placement
from ppcoat.nn.attention import EFFICIENT, FLASH, MATH, kernel_of_paddle
from ppcoat.nn.policy import POLICIES
from ppcoat.nn.swap import check_count
from ppcoat.plan.model import (
    BFLOAT16,
    FLOAT32,
    RESIDENT_SWAPPED,
    BaseModel,
    image_tokens,
    optimizer_bytes,
    read_model,
)
from ppcoat.plan.saved_bytes import SavedBytes, TracedModel, count_saved_bytes, small_lora_paths

# Working memory of the block that goes backward, in tensors of tokens x width (a) and, where attention is
# written out, in scores (b): the larger of the two a + b * scores. Measured with Paddle's allocator.
WORKING = {
    "none": ((10.5, 0.0), (-2.0, 1.5)),
    "coat": ((22.0, 0.3), (9.6, 3.0)),
    "coat+recompute": ((23.6, 0.7), (10.8, 3.0)),
    "coat+recompute+attention": ((26.6, 0.7), (13.8, 3.0)),
    "checkpointed": ((31.0, 0.3), (22.0, 3.0)),
}
FORWARD_WORKING = ((11.0, 2.0),)  # the same without gradients
# What stands beside the tensors: CUDA's context and libraries; Python, Paddle and theirs.
GPU_CONTEXT, HOST_PROCESS = 1_000_000_000, 450_000_000
ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}
# Rates of the time model, per second, of a card of the RTX 4090's class: arithmetic, its memory, PCIe.
FLOPS, MEMORY_RATE, PCIE_RATE = 80e12, 0.9e12, 20e9


@dataclass(frozen=True)
class Settings:
    """The settings that decide memory. checkpoint_blocks: from the first one; blocks_to_swap: the last ones;
    quantize: the format of the base's weights, False for none.
    """

    policy: str
    checkpoint_blocks: int
    quantize: str | bool
    blocks_to_swap: int
    batch_size: int
    gradient_accumulation: int
    stream_encoders: bool = False

    def __str__(self) -> str:
        return (
            f"policy {self.policy}, {self.checkpoint_blocks} blocks checkpointed, {self.blocks_to_swap} "
            f"swapped, {base_name(self.quantize)}, batch {self.batch_size} x {self.gradient_accumulation}"
            f"{', text encoders streamed' * self.stream_encoders}"
        )


def base_name(quantize: str | bool) -> str:
    """A format of the base, for users."""
    return f"{quantize.upper()} base" if quantize else "base not quantised"


@dataclass(frozen=True)
class Phase:
    """A part of a run and what it holds at its fullest, in bytes by component."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts.values())


class MemoryModel:
    """The facts of one config, read once. `phases` and `seconds` take any settings.

    transformer: settings of one that has no folder. Raises ConfigError as `read_model` and `image_tokens` do.
    This is FLUX; newbie.py says what is different for NewBie-image.
    """

    assumed_name = "FLUX.1-dev"
    forward_working = FORWARD_WORKING
    # Tensors of WORKING that come only after a quantised weight is made anew for a product; policies under
    # which a block is at its fullest without such a weight. Measured.
    before_product, fullest_without_weight = 10.0, ("coat",)
    drawn_at_once = 1  # pictures that the transformer sees in a step of a preview
    reference_tokens = 0  # of the image tokens

    def __init__(self, config: RunConfig, on_gpu: bool, transformer: dict | None = None) -> None:
        self.config, self.on_gpu = config, on_gpu
        self.half = on_gpu and config.model.dtype != "float32"
        self.itemsize = BFLOAT16 if self.half else FLOAT32
        self.model: BaseModel = self.read_model(transformer)
        self.kernel, self.kernel_is_assumed = self._attention_kernel()
        self.token_side = self.model.encoders.token_side
        self.image_tokens, self.reference_tokens = image_tokens(config, self.token_side)
        self.text_tokens = self.model.text_tokens
        self.tokens = self.image_tokens + self.text_tokens
        self.vae_itemsize = self.itemsize
        self.lora = self.model.adapter_shapes(config.network)
        self.lora_bytes = FLOAT32 * sum(map(math.prod, self.lora))
        self.optimizer, self.update_working = optimizer_bytes(config, self.lora, on_gpu)
        self.previews = config.sample.previews if config.sample.wanted else []
        self._base: dict[str | bool, list[int]] = {}
        self._weights: dict[str | bool, tuple[int, list[int]]] = {}
        self._saved: dict[tuple[str, bool, bool], SavedBytes] = {}

    def read_model(self, transformer: dict | None) -> BaseModel:
        """The shapes of the config's model, or of one with these settings."""
        return read_model(self.config, transformer)

    @property
    def float_name(self) -> str:
        """Of the dtype of a base that is not quantised."""
        return "bf16" if self.half else "float32"

    @property
    def policies(self) -> tuple[str, ...]:
        """Saving policies between which a plan may choose."""
        coat = self.config.coat
        return tuple(POLICIES) if coat.enabled and coat.activation.use_fp8 else ("none",)

    @property
    def checkpoint_counts(self) -> Sequence[int]:
        """How many blocks can be checkpointed."""
        return range(len(self.model.blocks) + 1)

    def phases(self, settings: Settings) -> tuple[Phase, ...]:
        """All phases of a run, in order. Raises ConfigError for more swapped blocks than there are."""
        base = self.base_by_swapped(settings.quantize)
        check_count(settings.blocks_to_swap, len(base) - 1)
        beside = {"context": GPU_CONTEXT if self.on_gpu else HOST_PROCESS}
        held = {"base": base[settings.blocks_to_swap], "LoRA": self.lora_bytes, "optimizer": self.optimizer}
        if self.config.train.ema.use_ema:
            held["EMA"] = self.lora_bytes
        if self.config.network.type == "dora":  # |w|^2 of each column
            held["LoRA"] += FLOAT32 * sum(self.model.linears[path][1] for path in self.model.lora_paths)
        if self.half and self.config.network.type != "lokr":
            held["LoRA"] += self.lora_bytes // 2  # FactorCopies of nn/linear.py
        learning = held | {"gradients": self.lora_bytes}
        saved, working = self.activations(settings)
        phases = [
            *self.preparing(settings),
            ("loading", {"base": held["base"], "working": self._reading(settings)}),
            ("forward, backward", learning | {"kept": saved, "working": working}),
            ("update", learning | {"working": self.update_working}),
        ]
        if self.previews:
            drawing = {"encoders": self._vae_bytes, "working": self._preview_working(settings)}
            phases.append(("previews", held | drawing))
        return tuple(Phase(name, beside | parts) for name, parts in phases)

    def preparing(self, settings: Settings) -> list[tuple[str, dict[str, int]]]:
        """What encoders hold, by phase, before the transformer comes: beside the context."""
        encoders = self.model.encoders
        largest = self.token_side**2 * (self.image_tokens - self.reference_tokens)
        reading = encoders.text_working(ENCODED_AT_ONCE, self.text_tokens, self.itemsize)
        # one of the largest pictures, or smaller ones up to the limit
        pixels = max(largest, min(ENCODED_AT_ONCE * largest, ENCODED_PIXELS))
        seeing = encoders.vae_working(pixels, self.vae_itemsize, False, self.on_gpu)
        return [
            ("captions", {"encoders": self._text_bytes(settings.stream_encoders), "working": reading}),
            ("pictures", {"encoders": self._vae_bytes, "working": seeing}),
        ]

    def base_by_swapped(self, quantize: str | bool) -> list[int]:
        """Bytes of the frozen weights on the device if 0, 1, ... all blocks are swapped, the last ones first;
        those have room for RESIDENT_SWAPPED of them.
        """
        if quantize not in self._base:
            outside, blocks = self.weight_bytes(quantize)
            swapped = [blocks[len(blocks) - n :] for n in range(len(blocks) + 1)]
            self._base[quantize] = [
                outside + sum(blocks) - sum(some) + sum(sorted(some)[-RESIDENT_SWAPPED:]) for some in swapped
            ]
        return self._base[quantize]

    def weight_bytes(self, quantize: str | bool) -> tuple[int, list[int]]:
        """Bytes of the base outside its blocks, and of each block."""
        if quantize not in self._weights:
            self._weights[quantize] = self.model.weight_bytes(quantize, self.itemsize)
        return self._weights[quantize]

    def activations(self, settings: Settings) -> tuple[int, int]:
        """Bytes saved for backward and working memory at the fullest moment of a step: at the end of the
        forward pass, or where backward comes to the checkpointed blocks.
        """
        double, count = self.model.double, len(self.model.blocks)
        batch, checkpointed = settings.batch_size, settings.checkpoint_blocks
        of_checkpointed = 0
        if checkpointed:
            of_checkpointed = self.saved(settings, True).of_inputs(double, checkpointed)
        saved = of_checkpointed + self.saved(settings).of_blocks(double, count - double, checkpointed)
        moments = []
        if checkpointed < count:
            moments.append((saved * batch, self._working(WORKING[settings.policy], batch)))
        if checkpointed:
            moments.append((of_checkpointed * batch, self._working(WORKING["checkpointed"], batch)))
        saved, working = max(moments, key=sum)
        return saved, self._with_weight(working, settings)

    def saved(self, settings: Settings, checkpointed: bool = False) -> SavedBytes:
        """Of one picture, counted once for all settings that save as much. checkpointed: of such blocks."""
        key = (settings.policy, bool(settings.quantize), checkpointed)
        if key not in self._saved:
            traced = self.traced(settings, checkpointed)
            self._saved[key] = count_saved_bytes(traced, self.image_tokens, self.text_tokens, checkpointed)
        return self._saved[key]

    def traced(self, settings: Settings, checkpointed: bool) -> TracedModel:
        """The model whose saved bytes are counted. What checkpointed blocks save does not depend on the
        policy."""
        return TracedModel(**self.traced_facts("none" if checkpointed else settings.policy))

    def traced_facts(self, policy: str) -> dict:
        """The fields of TracedModel under a saving policy."""
        coat = self.config.coat
        activation = coat.activation.model_copy(update={"policy": policy})
        return {
            "settings": hashable(self.model.transformer),
            "lora_paths": small_lora_paths(self.model.lora_paths, self.model.blocks),
            "network": self.config.network,
            "coat": coat.model_copy(update={"activation": activation}),
            "half": self.half,
            "kernel": self.kernel,
        }

    def saved_by_all_blocks(self, settings: Settings) -> int:
        """Bytes of one picture that go through FP8 if no block is checkpointed."""
        double = self.model.double
        return self.saved(settings).of_blocks(double, len(self.model.blocks) - double)

    def seconds(self, settings: Settings) -> float:
        """Time of an update on a GPU by a simple model, to compare settings by: products of matrices at FLOPS
        (one forward, one backward without weight gradients, one more forward of what is recomputed), FP8
        tensors through memory three times, quantised weights as they are stored and as they are made anew,
        swapped blocks over PCIe, as if nothing of that ran beside the computing. To decode 4 bits takes a
        dozen instructions a value, which hide behind its bytes. FP8 products count as those of bfloat16. To
        preserve the model's own output takes all of that again and one more forward.
        """
        model, passes = self.model, settings.gradient_accumulation
        turns, forwards = self._turns
        rows = settings.batch_size * self.tokens
        count = len(model.blocks)
        again = settings.checkpoint_blocks / count
        linears = 2 * rows * sum(model.of_tokens.values())
        attention = 4 * rows * self.tokens * model.width * count
        # attention's backward takes 2.5 forwards; +recompute takes its forward again
        attentions = 3.5 + (again if "recompute" not in settings.policy else 1.0)
        once_more = self.config.network.type == "dora"  # for the gradient of the lengths
        compute = linears * (turns * (2 + again + once_more) + forwards)
        compute += attention * (turns * attentions + forwards)
        moved = 0
        if settings.policy != "none":
            moved += turns * 3 * 2 * self.saved_by_all_blocks(settings) * settings.batch_size * (1 - again)
        outside, blocks = self.weight_bytes(settings.quantize)
        if settings.quantize:  # read as stored, written as it is multiplied
            read = turns * (2 + again) + forwards
            moved += read * (outside + sum(blocks) + 2 * model.parameters)
        return passes * (compute / FLOPS + moved / MEMORY_RATE) + self.sent_bytes(settings) / PCIE_RATE

    @property
    def _turns(self) -> tuple[int, int]:
        """Of each pass: how often forward and backward, and how many forwards alone."""
        return (2, 1) if self.config.train.preservation_weight else (1, 0)

    def sent_bytes(self, settings: Settings) -> int:
        """Bytes of the base that go to the device in an update: each swapped block in forward and backward,
        but for those that are there from the turn before."""
        _, blocks = self.weight_bytes(settings.quantize)
        swapped = blocks[len(blocks) - settings.blocks_to_swap :]
        there = RESIDENT_SWAPPED
        sent = sum(swapped[there:]) + sum(swapped[: max(0, len(swapped) - there)])
        turns, forwards = self._turns
        return settings.gradient_accumulation * (turns * sent + forwards * sent // 2)

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """What is planned, for the head of a table."""
        model, config = self.model, self.config
        source = f"{self.assumed_name}'s shapes, as the folder is not here" if model.assumed else "its shapes"
        rank = "full rank" if config.network.lokr_full_rank else f"rank {config.network.linear}"
        adapter = f"{ADAPTERS[config.network.type]} {rank}"
        device = f"{'GPU' if self.on_gpu else 'CPU'}, {'bfloat16' if self.half else 'float32'}"
        shown = f" ({self.reference_tokens} of references)" if self.reference_tokens else ""
        facts = (
            f"{config.model.name_or_path} by {source}: {model.parameters:,} parameters; {device}",
            f"at most {self.image_tokens} image tokens{shown} and {self.text_tokens} text tokens a picture; "
            f"{adapter} on {len(model.lora_paths)} Linears",
        )
        if self.on_gpu:
            return *facts, self._attention_fact
        return *facts, (
            "on a CPU 'kept for backward' and 'working memory' may count twice: freed blocks below "
            f"{LARGEST_KEPT >> 20} MiB stay with it"
        )

    def _attention_kernel(self) -> tuple[str, bool]:
        """What computes attention, and whether that is assumed: Paddle says it of a card that is at hand; of
        another one it takes flash attention in bfloat16, and memory-efficient attention in float32."""
        if not self.on_gpu:
            return MATH, False
        place = gpu_place(self.config.device)
        if place is None:
            return FLASH if self.half else EFFICIENT, True
        dtype = paddle.bfloat16 if self.half else paddle.float32
        return kernel_of_paddle(place, self.model.width // self.model.heads, dtype), False

    @property
    def _attention_fact(self) -> str:
        if self.kernel == MATH:
            scores = self.itemsize * self.model.heads * self.tokens**2 / 1e9
            what = f"attention written out in matmuls ({scores:.2f} GB of scores for a picture and block)"
        else:
            what = {FLASH: "flash attention", EFFICIENT: "memory-efficient attention"}[self.kernel]
        return what + (
            ", assumed: no card is at hand" if self.kernel_is_assumed else ", Paddle's choice here"
        )

    def _working(self, lines: tuple[tuple[float, float], ...], batch: int, tokens: int | None = None) -> int:
        tokens = self.tokens if tokens is None else tokens
        scores = self.model.heads * tokens**2 if self.kernel == MATH else 0
        values = max(a * tokens * self.model.width + b * scores for a, b in lines)
        return int(batch * self.itemsize * values)

    def _text_bytes(self, streamed: bool) -> int:
        """Of the text encoders while they read, streamed by blocks; on a CPU host and device are one."""
        encoders = self.model.encoders
        return self.itemsize * (encoders.streamed if streamed and self.on_gpu else encoders.text)

    @property
    def _vae_bytes(self) -> int:
        return self.model.encoders.vae * self.vae_itemsize

    def _reading(self, settings: Settings) -> int:
        return self.model.reading_bytes(settings.quantize, self.itemsize)

    def _with_weight(self, working: int, settings: Settings) -> int:
        """Working memory of a block that goes backward, and of its largest weight if that is made anew: the
        latter while it is made, and when it is there."""
        made, making = self.model.decoding_bytes(settings.quantize, self.itemsize, self.on_gpu)
        before = self._working(((self.before_product, 0.0),), settings.batch_size)
        held = (
            0 if settings.policy in self.fullest_without_weight and not settings.checkpoint_blocks else made
        )
        return max(working + held, working - before + making)

    def _drawing_working(self, settings: Settings | Placement, batch: int, tokens: int | None = None) -> int:
        """Working memory of a pass without gradients, with the largest weight if that is made anew."""
        making = self.model.decoding_bytes(settings.quantize, self.itemsize, self.on_gpu)[1]
        return self._working(self.forward_working, batch, tokens) + making

    def _preview_working(self, settings: Settings) -> int:
        areas = [(preview.width * preview.height, 1 + len(preview.ctrl_img)) for preview in self.previews]
        pixels, most = max(areas)[0], max(area * pictures for area, pictures in areas)
        tokens = most // self.token_side**2 + self.text_tokens
        denoise = self._drawing_working(settings, self.drawn_at_once, tokens)
        decode = self.model.encoders.vae_working(pixels, self.vae_itemsize, True, self.on_gpu)
        return max(denoise, decode)


def hashable(settings: dict) -> tuple[tuple[str, object], ...]:
    """A model's settings without the private ones, as TracedModel takes them."""
    pairs = ((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items())
    return tuple(pair for pair in pairs if not pair[0].startswith("_"))
