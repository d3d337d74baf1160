"""What a run holds whatever it saves for backward: base weights, LoRA, optimizer, encoders. Bytes by shape.

Nothing is allocated: the transformer is built without memory, the encoders are read from file headers. A
model folder that is not there is taken for FLUX.1-dev.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import paddle

from ppcoat.coat import chosen_modules, lokr_settings, state_config
from ppcoat.config.schema import NetworkConfig, RunConfig
from ppcoat.config.training_sections import TrainConfig
from ppcoat.data.buckets import AREA_TOLERANCE
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.data.pairs import aside
from ppcoat.lora.layer import linear_paths
from ppcoat.lora.lokr import new_factors
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.prompt_encoding import MAX_T5_TOKENS
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import check_without_control
from ppcoat.models.quantized_base import BAND
from ppcoat.models.tensor_files import Component, component_config, tensor_infos
from ppcoat.nn.base_weight import BASES
from ppcoat.nn.convert import sublayer_at
from ppcoat.optim import (
    Adafactor,
    AdafactorSettings,
    Lion,
    Prodigy,
    ProdigySettings,
    ScheduleFreeAdamW,
    update_bytes,
)
from ppcoat.reading import read_json

DEV_TOKEN_SIDE = 16  # pixels along a side of the square that a token of FLUX.1-dev stands for
FLOAT32, BFLOAT16 = 4, 2  # bytes of a value
FLUX_DEV = {"guidance_embeds": True}  # all else is FluxTransformer2DModel's default
# Parameters of FLUX.1-dev's encoders, T5's heads and inner width, the VAE's channels at full resolution.
_DEV_TEXT, DEV_VAE = 4_762_310_656 + 123_060_480, 83_819_683
_DEV_T5, DEV_VAE_CHANNELS = (64, 10240), 128
_DEV_T5_BLOCK = 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096
RESIDENT_SWAPPED = 2  # of the swapped blocks one computes while the next one comes
# While a product makes a quantised weight anew: weights, and bytes beside them. A kernel holds one weight;
# this is the reference, measured with Paddle's allocator on the CPU, as what follows.
DECODING = {"fp8": (2.0, 0), "int8": (2.5, 0), "nf4": (2.0, 2_300_000), "fp4": (2.0, 2_300_000)}
# While the base is read, beside it: bands of rows of the largest weight in float32, and bytes, to quantise
# it; of a base that is not quantised the largest weight, read and cast.
QUANTISING = {"fp8": (2.0, 0), "int8": (2.0, 0), "nf4": (0.1, 4_500_000), "fp4": (0.1, 5_500_000)}
CASTING = 2.0


@dataclass(frozen=True)
class EncoderSizes:
    """Parameters of both text encoders and of the VAE; what decides their working memory: heads and inner
    width of the larger text encoder, the VAE's channels at full resolution. token_side: pixels along a side
    of the square that an image token stands for. streamed: parameters of the text encoders that are on the
    device while the blocks of the larger one visit it."""

    text: int
    vae: int
    text_heads: int
    text_inner: int
    vae_channels: int
    token_side: int = DEV_TOKEN_SIDE
    streamed: int = 0

    def text_working(self, captions: int, tokens: int, itemsize: int) -> int:
        """Bytes while T5 or Gemma3 reads so many captions: its scores (before, after softmax, bias) and inner
        layer."""
        return captions * (3 * self.text_heads * tokens**2 + 3 * self.text_inner * tokens) * itemsize

    def vae_working(self, pixels: int, itemsize: int, decode: bool, on_gpu: bool) -> int:
        """Bytes while the VAE works on so many pixels. Measured on Paddle's CPU in units of channels at full
        resolution: 13.1 encoding, 23.5 decoding, of which 9 and 18 are the unfolded input of a 3 x 3
        convolution; a GPU needs none, but cuDNN may take 512 MB.
        """
        units = (23.5 if decode else 13.1) - ((18 if decode else 9) if on_gpu else 0)
        return int(units * pixels * self.vae_channels * itemsize) + (512_000_000 if on_gpu else 0)


@dataclass(frozen=True)
class BaseModel:
    """A model folder by its shapes; also of NewBie-image, whose `layers` are the blocks (all of them count as
    double).

    transformer: its settings, as its config.json has them. linears: path -> (in, out). blocks: paths of the
    double blocks, then of the single ones. others: path of a block, or "" -> values that are no Linear
    weight. width: channels of a token inside the blocks; heads: of attention. of_picture: parts of the paths
    of Linears that see one row a picture, not its tokens. assumed: the folder is not there, and the published
    model's shapes stand in.
    """

    transformer: dict
    linears: dict[str, tuple[int, int]]
    blocks: tuple[str, ...]
    double: int
    others: dict[str, int]
    lora_paths: tuple[str, ...]
    encoders: EncoderSizes
    text_tokens: int
    width: int
    heads: int
    assumed: bool
    of_picture: tuple[str, ...] = ("norm",)

    @cached_property
    def parameters(self) -> int:
        """Values of the transformer."""
        return sum(self.others.values()) + sum(a * b for a, b in self.linears.values())

    def weight_bytes(self, quantize: str | Literal[False], itemsize: int) -> tuple[int, list[int]]:
        """Bytes of the base outside its blocks, and of each block. quantize: the format of Linears' weights,
        False for itemsize bytes each."""
        held = {path: count * itemsize for path, count in self.others.items()}
        for path, (rows, columns) in self.linears.items():
            block = _block_of(path, self.blocks)
            one = (rows, columns)
            held[block] += BASES[quantize].bytes_of(one) if quantize else itemsize * math.prod(one)
        return held[""], [held[path] for path in self.blocks]

    @cached_property
    def of_tokens(self) -> dict[str, int]:
        """Values of the Linears that every token goes through."""
        return {
            path: rows * columns
            for path, (rows, columns) in self.linears.items()
            if not any(part in path for part in self.of_picture)
        }

    @cached_property
    def largest_weight(self) -> int:
        """Values of the largest of these in a block."""
        return max(values for path, values in self.of_tokens.items() if _block_of(path, self.blocks))

    @cached_property
    def largest_read(self) -> tuple[int, int]:
        """Values of the largest weight in a block, and the most that are quantised at once: others are read
        before the blocks are there."""
        shapes = [shape for path, shape in self.linears.items() if _block_of(path, self.blocks)]
        return max(map(math.prod, shapes)), max(rows * min(BAND, columns) for rows, columns in shapes)

    def decoding_bytes(
        self, quantize: str | Literal[False], itemsize: int, by_kernel: bool
    ) -> tuple[int, int]:
        """Of the largest weight that is made anew for a product, itemsize bytes a value: of itself, and all
        while it is made. Zeros for a base that is not quantised."""
        if not quantize:
            return 0, 0
        made = itemsize * self.largest_weight
        weights, beside = (1.0, 0) if by_kernel else DECODING[quantize]
        return made, int(weights * made) + beside

    def reading_bytes(self, quantize: str | Literal[False], itemsize: int) -> int:
        """What is there beside the base while that is read from disk."""
        whole, band = self.largest_read
        if not quantize:
            return int(CASTING * itemsize * whole)
        bands, beside = QUANTISING[quantize]
        return int(bands * FLOAT32 * band) + beside

    def adapter_shapes(self, network: NetworkConfig) -> list[tuple[int, int]]:
        """Shapes of all that is trained: lora_A and lora_B, and of DoRAs the lengths; or the matrices of the
        LoKrs."""
        pairs, rank = [self.linears[path] for path in self.lora_paths], network.linear
        if network.type == "lora":
            return [shape for rows, columns in pairs for shape in ((rows, rank), (rank, columns))]
        if network.type == "dora":
            return [shape for rows, columns in pairs for shape in ((rows, rank), (rank, columns), (columns,))]
        settings = lokr_settings(network)
        of_pairs = {pair: [f.shape for f in new_factors(*pair, settings, 0).values()] for pair in set(pairs)}
        return [shape for pair in pairs for shape in of_pairs[pair]]


def read_model(config: RunConfig, transformer: dict | None = None, control: bool = False) -> BaseModel:
    """The model of a run; with `transformer`, one of these settings instead of the folder's, and FLUX.1-dev's
    encoders. control: one that draws after a picture, and is not trained, is taken too.

    Raises ConfigError for a model that is there but not complete or cannot be trained, and for a LoRA that
    fits no Linear.
    """
    assumed, given, files = not Path(config.model.name_or_path).exists(), transformer is not None, None
    if not assumed and not given:
        files = FluxFiles.found(config.model.name_or_path, "model.name_or_path", **config.model.beside)
    if transformer is None:
        transformer = component_config(files["transformer"], "transformer") if files else FLUX_DEV
    model = without_memory(FluxTransformer2DModel, json.dumps(transformer, sort_keys=True))
    if files and not control:
        check_without_control(model, files, fill=True)
    blocks = tuple(model.named_blocks())
    linears, others = weights_by_block(model, blocks)
    return BaseModel(
        transformer=dict(model.config),
        linears=linears,
        blocks=blocks,
        double=len(model.transformer_blocks),
        others=others,
        lora_paths=tuple(chosen_modules(config.network, model)),
        encoders=_encoders(files) if files else _dev_encoders(),
        text_tokens=_text_tokens(config, files),
        width=model.config.attention_head_dim * model.config.num_attention_heads,
        heads=model.config.num_attention_heads,
        assumed=assumed,
    )


@lru_cache(maxsize=4)
def without_memory(kind: type[paddle.nn.Layer], settings: str) -> paddle.nn.Layer:
    """The model of this kind with these settings (JSON), whose parameters have a shape and no memory. Kept,
    because a table plans one model many times: to be looked at only."""
    with paddle.LazyGuard():
        return kind.from_config(json.loads(settings))


def weights_by_block(
    model: paddle.nn.Layer, blocks: tuple[str, ...]
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """A model without memory -> `linears` and `others` of BaseModel."""
    linears = {path: tuple(sublayer_at(model, path).weight.shape) for path in linear_paths(model)}
    others = dict.fromkeys(("", *blocks), 0)
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if not (last == "weight" and path in linears):
            others[_block_of(name, blocks)] += parameter.size
    return linears, others


def image_tokens(config: RunConfig, token_side: int) -> tuple[int, int]:
    """Of the picture that has most together with its references, and how many of these are the references'
    beside the largest picture; token_side as in EncoderSizes. Where a folder is not there, the resolution
    tells, and the 5 % that a bucket may be larger."""
    if all(Path(folder).exists() for data in config.datasets for folder in (data.folder_path, *aside(data))):
        examples = all_examples(scan_datasets(config))
        sizes = [[each.size, *(size for _, size in each.references)] for each in examples]
        tokens = [[width * height // token_side**2 for width, height in each] for each in sizes]
        most = max(map(sum, tokens))
        return most, most - max(own for own, *_ in tokens)
    larger = 1 + (AREA_TOLERANCE if any(d.bucket_rule == "aspect" for d in config.datasets) else 0)
    of_picture = int(larger * max(data.resolution for data in config.datasets) ** 2) // token_side**2
    references = of_picture * max(len(data.control_path) for data in config.datasets)
    return of_picture + references, references


_OTHERS: dict[str, tuple[type, Callable[[TrainConfig], object] | None]] = {
    "lion": (Lion, None),
    "schedulefree_adamw": (ScheduleFreeAdamW, None),
    "prodigy": (Prodigy, lambda train: ProdigySettings(slice_p=train.prodigy.slice_p)),
    "adafactor": (Adafactor, lambda train: AdafactorSettings(beta1=train.adafactor.beta1)),
}


def optimizer_bytes(config: RunConfig, shapes: list[tuple[int, int]], on_gpu: bool) -> tuple[int, int]:
    """States of the config's optimizer for parameters of these shapes; transient bytes of an update."""
    parameters, train = FLOAT32 * sum(map(math.prod, shapes)), config.train
    states = state_config(config.coat, config.uses_fp8_optimizer)
    if train.optimizer in _OTHERS:
        optimizer, rule = _OTHERS[train.optimizer]
        held = optimizer.planned_bytes(shapes, states, None if rule is None else rule(train))
        return held, update_bytes(parameters // FLOAT32, on_gpu, train.optimizer)
    if not config.uses_fp8_optimizer:
        return 2 * parameters, parameters if train.max_grad_norm else 0
    return states.state_bytes(shapes, train.beta1), update_bytes(parameters // FLOAT32, on_gpu)


def _block_of(name: str, blocks: tuple[str, ...]) -> str:
    """The block that a path lies in, "" for none."""
    path = ".".join(name.split(".")[:2])
    return path if path in blocks else ""


def _dev_encoders() -> EncoderSizes:
    streamed = text_streamed(_DEV_TEXT, [_DEV_T5_BLOCK] * 24)
    return EncoderSizes(_DEV_TEXT, DEV_VAE, *_DEV_T5, DEV_VAE_CHANNELS, streamed=streamed)


def text_streamed(text: int, blocks: list[int]) -> int:
    """Of so many parameters of text encoders those on the device while these blocks visit it."""
    return text - sum(sorted(blocks)[:-RESIDENT_SWAPPED])


def stored_values(component: Component) -> int:
    """Numbers in the weights of a component, by file headers."""
    return sum(math.prod(info.shape) for info in tensor_infos(component).values())


def _encoders(files: FluxFiles) -> EncoderSizes:
    t5, vae = (component_config(files[name], name) for name in ("text_encoder_2", "vae"))
    text = stored_values(files["text_encoder"]) + stored_values(files["text_encoder_2"])
    blocks: Counter[str] = Counter()
    for name, info in tensor_infos(files["text_encoder_2"]).items():
        if block := re.match(r".*\bblock\.\d+\.", name):
            blocks[block[0]] += math.prod(info.shape)
    return EncoderSizes(
        text=text,
        streamed=text_streamed(text, list(blocks.values())),
        vae=stored_values(files["vae"]),
        text_heads=t5["num_heads"],
        text_inner=t5["d_ff"],
        vae_channels=vae["block_out_channels"][0],
        token_side=2 ** len(vae["block_out_channels"]),  # each stage but the last halves, packing once more
    )


def _text_tokens(config: RunConfig, files: FluxFiles | None) -> int:
    if config.train.max_sequence_length:
        return config.train.max_sequence_length
    file = Path(files["tokenizer_2"]) / "tokenizer_config.json" if files else None
    limit = (
        read_json(file).get("model_max_length", MAX_T5_TOKENS) if file and file.exists() else MAX_T5_TOKENS
    )
    return min(int(limit), MAX_T5_TOKENS)
