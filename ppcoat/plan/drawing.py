"""Memory of drawing, by phase: the prompts are encoded, the transformer takes its steps, the VAE decodes; and
what to choose for a card.

    memory = drawing_memory(Drawn("models/FLUX.1-dev", 1024, 1024), on_gpu=True)
    plan_drawing(memory, vram_gb=12).placement

Weights are counted from shapes, working memory was measured with Paddle's allocator on a CPU. On a GPU the
VAE's is calculated: the tensors that stand beside each other, and scores of its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import paddle
from ppdiffusers import AutoencoderKL

from ppcoat.config.newbie import DEFAULT_TARGETS
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.offload import Placement
from ppcoat.models.tensor_files import component_config
from ppcoat.models.vae_tiling import SCORES, decoded_at_once
from ppcoat.nn.swap import check_count
from ppcoat.plan import GB, check_budget
from ppcoat.plan.model import BaseModel, read_model
from ppcoat.plan.newbie import NewbieMemoryModel
from ppcoat.plan.phases import GPU_CONTEXT, HOST_PROCESS, MemoryModel, Phase
from ppcoat.reading import read_json

# Formats between which a plan chooses, the most exact first (errors: docs/accuracy.md).
FORMATS = (False, "int8", "fp4")
FLUX_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
            "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
AS_IT_IS = Placement()
# By whether it is a GPU, the most that the VAE holds at once: in the stages that are not tiled, in tensors of
# what they give; in a tile, in tensors of channels at full resolution. A CPU unfolds a convolution's input.
STAGE_UNITS, TILE_UNITS = {False: 11.5, True: 3.0}, {False: 23.4, True: 6.0}


@dataclass(frozen=True)
class Drawn:
    """What is drawn. model: a pipeline's folder or a file. pictures: of a prompt, at once. beside: places of
    what a file lacks, as FluxFiles.found takes them. max_sequence_length: T5 or Gemma tokens. dtype: "auto"
    or "float32". lora_bytes: of all that LoRAs add. reference_pixels: of all references, which are seen as
    tokens, too."""

    model: str
    height: int
    width: int
    pictures: int = 1
    family: str = "flux"
    beside: tuple[tuple[str, object], ...] = ()
    max_sequence_length: int | None = None
    dtype: str = "auto"
    lora_bytes: int = 0
    reference_pixels: int = 0

    @property
    def config(self) -> RunConfig:
        """A run on such pictures."""
        sides = {"folder_path": "no pictures", "resolution": 1024, "bucket_rule": "square"}
        model = {"name_or_path": self.model, "family": self.family, "dtype": self.dtype, **dict(self.beside)}
        train = {"max_sequence_length": self.max_sequence_length}
        sections = {"name": "drawing", "model": model, "datasets": [sides], "train": train}
        if self.family == "newbie":
            sections["network"] = {"targets": DEFAULT_TARGETS}
        return RunConfig.model_validate(sections)


@dataclass(frozen=True)
class DrawingPlan:
    """placement: planned for. phases: in their order. sent: bytes over PCIe in a step of the transformer.
    facts: what was planned, a line each."""

    placement: Placement
    phases: tuple[Phase, ...]
    sent: int
    facts: tuple[str, ...]

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)


class _DrawingMemory:
    """Beside a MemoryModel: the memory of drawing."""

    def __init__(self, drawn: Drawn, on_gpu: bool, transformer: dict | None = None) -> None:
        self.drawn = drawn
        super().__init__(drawn.config, on_gpu, transformer)  # type: ignore[call-arg]  # MemoryModel's
        self.image_tokens = (drawn.height * drawn.width + drawn.reference_pixels) // self.token_side**2
        self.tokens = self.image_tokens + self.text_tokens

    def drawing_phases(self, placement: Placement) -> tuple[Phase, ...]:
        """What is held while prompts are encoded, steps taken and pictures decoded."""
        base = self.base_by_swapped(placement.quantize)
        check_count(placement.blocks_to_swap, len(base) - 1)
        held = {"base": base[placement.blocks_to_swap]}
        if self.drawn.lora_bytes:
            held["LoRA"] = self.drawn.lora_bytes
        apart = placement.offload and self.on_gpu  # where host and device are one, offloading moves nothing
        text, vae = self._text_bytes(placement.stream_encoders), self._vae_bytes
        there, pictures = 0 if placement.offload else text, self.drawn.pictures * self.drawn_at_once
        phases = (
            (
                "encode",
                ({} if apart else held)
                | {"encoders": text + (0 if apart else vae), "working": self.encoding},
            ),
            (
                "denoise",
                held
                | {
                    "encoders": there + (0 if apart else vae),
                    "working": self._drawing_working(placement, pictures),
                },
            ),
            (
                "decode",
                ({} if apart else held) | {"encoders": there + vae, "working": self.decoding(placement)},
            ),
        )
        context = {"context": GPU_CONTEXT if self.on_gpu else HOST_PROCESS}
        return tuple(Phase(name, context | parts) for name, parts in phases)

    @property
    def encoding(self) -> int:
        """Working memory while a prompt is read."""
        captions = self.drawn_at_once if self.drawn_at_once == 1 else self.drawn_at_once * self.drawn.pictures
        return self.model.encoders.text_working(captions, self.text_tokens, self.itemsize)

    def decoding(self, placement: Placement) -> int:
        """Working memory while the VAE decodes."""
        pictures = 1 if placement.vae_slicing or placement.vae_tiling else self.drawn.pictures
        pixels, item = self.drawn.height * self.drawn.width, self.vae_itemsize
        latents = pixels // (self.token_side // 2) ** 2
        encoders, channels = self.model.encoders, self.model.encoders.vae_channels
        shown = 3 * pixels * (self.drawn.pictures * (item + 2 * 4) + item)
        tiled = decoded_at_once(self.vae, self.drawn.height, self.drawn.width)
        if not placement.vae_tiling or tiled == pixels:
            working = encoders.vae_working(pictures * pixels, item, True, self.on_gpu)
            scores = pictures * latents**2 * (item + 2 * 4)  # softmax in float32
            return max(working, scores) + shown
        map_ = self.vae.config.block_out_channels[-1] * 4 * latents * item  # the first stage's output
        scores = min(latents**2, SCORES) * 2 * 4
        convolution = 512_000_000 if self.on_gpu else 0  # as in EncoderSizes.vae_working
        tile = int(TILE_UNITS[self.on_gpu] * channels * tiled * item)
        stage = int(STAGE_UNITS[self.on_gpu] * map_)
        return max(stage, map_ + tile, scores) + convolution + shown

    def sent(self, placement: Placement) -> int:
        """Bytes that swapped blocks send over PCIe in a step."""
        _, blocks = self.model.weight_bytes(placement.quantize, self.itemsize)
        return sum(blocks[len(blocks) - placement.blocks_to_swap :])

    @cached_property
    def vae(self) -> AutoencoderKL:
        """That of the model, without memory."""
        config = {key: value for key, value in self.vae_config().items() if key != "mid_block_add_attention"}
        with paddle.LazyGuard():
            return AutoencoderKL.from_config(config)

    @property
    def drawing_facts(self) -> tuple[str, ...]:
        """What is planned, for the head of a table."""
        model, drawn = self.model, self.drawn
        source = f"{self.assumed_name}'s shapes, as it is not here" if model.assumed else "its shapes"
        return (
            f"{drawn.model} by {source}: {model.parameters:,} parameters; "
            f"{'GPU' if self.on_gpu else 'CPU'}, {'bfloat16' if self.half else 'float32'}",
            f"{drawn.pictures} picture{'s' * (drawn.pictures > 1)} of {drawn.width} x {drawn.height}: "
            f"{self.image_tokens} image tokens, at most {self.text_tokens} text tokens",
            *([self._attention_fact] if self.on_gpu else []),
        )


class FluxDrawingMemory(_DrawingMemory, MemoryModel):
    """Of FLUX.1."""

    def read_model(self, transformer: dict | None) -> BaseModel:
        """Also of one that draws after a picture."""
        return read_model(self.config, transformer, control=True)

    @cached_property
    def files(self) -> FluxFiles | None:
        """Where its parts lie; None for one that is not here."""
        if self.model.assumed:
            return None
        return FluxFiles.found(self.drawn.model, "--model", **self.config.model.beside)

    def vae_config(self) -> dict:
        """Of its VAE."""
        return FLUX_VAE if self.files is None else component_config(self.files["vae"], "vae")


class NewbieDrawingMemory(_DrawingMemory, NewbieMemoryModel):
    """Of NewBie-image."""

    def vae_config(self) -> dict:
        """Of its VAE."""
        return FLUX_VAE if self.model.assumed else read_json(Path(self.drawn.model) / "vae" / "config.json")


def drawing_memory(drawn: Drawn, on_gpu: bool) -> FluxDrawingMemory | NewbieDrawingMemory:
    """The memory model of what is drawn. Raises ConfigError as `read_model`."""
    return (NewbieDrawingMemory if drawn.family == "newbie" else FluxDrawingMemory)(drawn, on_gpu)


def plan_drawing(
    memory: FluxDrawingMemory | NewbieDrawingMemory,
    vram_gb: float | None = None,
    placement: Placement = AS_IT_IS,
    formats: Sequence[str | bool] = FORMATS,
) -> DrawingPlan:
    """Without vram_gb the plan of `placement`; with it, of what is chosen for so many GB.

    Chosen is first what sends fewest blocks over PCIe, then the most exact of `formats`, then what does
    without tiles, without encoders that visit block by block, without offloading. What `placement` asks for
    is done. Raises ConfigError if nothing fits, naming the smallest need.
    """
    check_budget(vram_gb)
    if vram_gb is None:
        return _planned(memory, placement)
    budget, plans = vram_gb * GB, []
    for each in _candidates(memory, placement, formats):
        plans.append(_planned(memory, _with_fewest_swapped(memory, each, budget)))
    fitting = [each for each in plans if each.peak.total <= budget]
    if not fitting:
        least = min(plans, key=lambda each: each.peak.total)
        raise ConfigError(
            f"nothing fits into {vram_gb:g} GB: the least possible need is {least.peak.total / GB:.1f} GB, "
            f"in the phase {least.peak.name!r}, with: {least.placement}; draw fewer or smaller pictures"
        )
    return min(fitting, key=lambda each: _effort(each, formats))


def _planned(memory: FluxDrawingMemory | NewbieDrawingMemory, placement: Placement) -> DrawingPlan:
    phases = memory.drawing_phases(placement)
    return DrawingPlan(placement, phases, memory.sent(placement), memory.drawing_facts)


def _effort(planned: DrawingPlan, formats: Sequence[str | bool]) -> tuple:
    chosen = planned.placement
    ways = (chosen.vae_tiling, chosen.stream_encoders, chosen.offload)
    return (planned.sent, formats.index(chosen.quantize), *ways)


def _candidates(
    memory: FluxDrawingMemory | NewbieDrawingMemory, asked: Placement, formats: Sequence[str | bool]
) -> Iterator[Placement]:
    slicing = asked.vae_slicing or memory.drawn.pictures > 1
    for quantize in formats:
        for tiling in sorted({asked.vae_tiling, True}):
            for offload, streamed in ((False, False), (True, False), (True, True)):
                if offload or not asked.offload:
                    yield Placement(quantize, offload, streamed, asked.blocks_to_swap, tiling, slicing)


def _with_fewest_swapped(
    memory: FluxDrawingMemory | NewbieDrawingMemory, bare: Placement, budget: float
) -> Placement:
    if not bare.offload:
        return bare
    bases = memory.base_by_swapped(bare.quantize)
    with_base = [phase for phase in memory.drawing_phases(bare) if "base" in phase.parts]
    beside = max(phase.total - phase.parts["base"] for phase in with_base)
    for swapped, base in enumerate(bases):
        if swapped >= bare.blocks_to_swap and beside + base <= budget:
            return replace(bare, blocks_to_swap=swapped)
    return replace(bare, blocks_to_swap=len(bases) - 1)
