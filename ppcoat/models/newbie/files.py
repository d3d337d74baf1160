"""Reads the folder of a NewBie-image model, as its converter writes it, into Paddle models.

    transformer/ text_encoder/ (Gemma3 and its tokenizer) clip_model/ (Jina CLIP and its tokenizer) vae/

Only safetensors and JSON are read, tensor by tensor (models/loading.py). Names and shapes are compared before
the first weight is read, and tensors that do not fit are counted and named: nothing is loaded in part. The
transformer with its Linears in FP8 is read, and written for the next start, as models/quantized_base.py says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import paddle
from paddle import nn
from ppdiffusers import AutoencoderKL

from ppcoat.errors import ConfigError
from ppcoat.models.loading import (
    check_tensors,
    fill,
    linear_weights,
    load_vae,
    opened,
    read_tensors,
    shape_on_disk,
    unfilled,
)
from ppcoat.models.newbie.gemma3 import Gemma3Config, Gemma3TextEncoder
from ppcoat.models.newbie.jina_clip import (
    JinaClipConfig,
    JinaClipTextModel,
    load_gemma3_tokenizer,
    load_jina_clip_tokenizer,
)
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.models.quantized_base import QuantizedCopy, load_quantized
from ppcoat.models.tensor_files import (
    TensorInfo,
    check_index,
    check_there,
    component_config,
    known_config,
    sizes_of,
    tensor_infos,
)
from ppcoat.nn.swap import last_blocks
from ppcoat.reading import shown

NEWBIE_COMPONENTS = ("transformer", "text_encoder", "clip_model", "vae")
LATENT_CHANNELS = 16
# What a FLUX VAE's config.json may leave out.
FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
# Keys of transformer/config.json that say nothing about the computation; clip_img_dim is of a part that the
# original never creates.
_IGNORED_KEYS = {"model_type", "clip_img_dim", "_class_name", "_diffusers_version"}
# Parts of a name that say that a tensor is not of the text tower.
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "vision_model.", "logit_scale", "lm_head.")
# How torch names the three tensors of a weight with an adapter: `<layer>` + _LORA + a part.
_LORA = ".parametrizations.weight."
_LORA_PARTS = ("original", "0.lora_A", "0.lora_B")


@dataclass(frozen=True)
class _Source:
    """Where the parameters of a model lie. tensors: file tensor -> parameter; a weight whose LoRA is to be
    folded comes from three file tensors. infos: the file tensors that have to do with the model."""

    infos: dict[str, TensorInfo]
    tensors: dict[str, str]
    lora_rank: int = 0
    lora_scale: float = 0.0


def check_newbie_folder(folder: str | Path, setting: str = "the model") -> None:
    """Checks a NewBie folder by its JSON files and safetensors headers; reads no weight.

    setting: the flag or key that named it. Raises ConfigError: no such folder, no model_index.json or one of
    another pipeline, a missing part or tokenizer, missing, unexpected or wrongly shaped tensors (all are
    counted), a VAE without 16 latent channels, text encoders of other widths than the transformer wants.
    """
    folder = Path(folder)
    check_there(folder, setting)
    check_index(folder, "NewbiePipeline")
    missing = [name for name in NEWBIE_COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise ConfigError(
            f"{folder / missing[0]} is missing: the folder of a NewbiePipeline has "
            f"{', '.join(NEWBIE_COMPONENTS)}"
        )
    check_newbie_vae(folder / "vae")
    unfilled(AutoencoderKL, folder / "vae")
    models: list = []
    for name, build, source_of in (
        ("transformer", _nextdit, _nextdit_source),
        ("text_encoder", _gemma3, _gemma3_source),
        ("clip_model", _jina_clip, _jina_clip_source),
    ):
        with paddle.LazyGuard():  # parameters get a shape and no memory
            models.append(build(folder / name))
        _check(models[-1], source_of(models[-1], folder / name), folder / name)
    transformer, gemma3, jina_clip = models
    load_gemma3_tokenizer(folder / "text_encoder").check_ids(gemma3.config.vocab_size)
    load_jina_clip_tokenizer(folder / "clip_model").check_ids(jina_clip.config.vocab_size)
    for key, encoder in (("cap_feat_dim", gemma3), ("clip_text_dim", jina_clip)):
        wanted, width = transformer.config[key], encoder.config.hidden_size
        if wanted != width:
            raise ConfigError(
                f"the transformer's {key} is {wanted}, but {type(encoder).__name__} gives {width}: "
                f"the parts of {folder} do not belong together"
            )


def unfilled_nextdit(folder: str | Path) -> NextDiT_CLIP:
    """The transformer of a component folder with parameters that have a shape and no memory."""
    with paddle.LazyGuard():
        return _nextdit(Path(folder))


def open_nextdit(folder: str | Path, dtype: str | None = None) -> tuple[NextDiT_CLIP, dict[str, TensorInfo]]:
    """`unfilled_nextdit` with parameters of `dtype`, and where their tensors lie. Raises ConfigError unless
    names and shapes in the files are exactly the model's."""
    folder = Path(folder)
    model = opened(unfilled_nextdit, folder, "nextdit", dtype)
    source = _nextdit_source(model, folder)
    _check(model, source, folder)
    return model, source.infos


def load_nextdit(folder: str | Path, dtype: str | None = None) -> NextDiT_CLIP:
    """The transformer of a component folder, in `dtype` (None: see device.default_dtype), in eval mode."""
    return _loaded(_nextdit, _nextdit_source, folder, dtype)


def load_quantized_nextdit(
    folder: str | Path,
    dtype: str | None = None,
    copy: QuantizedCopy | None = None,
    blocks_to_swap: int = 0,
    base: str = "fp8",
) -> NextDiT_CLIP:
    """The transformer of a component folder in eval mode, the weight of every Linear in a format of `BASES`.

    All 246 Linears of the 3B model are quantised; biases and norms are in `dtype` (None: float32 on CPU,
    bfloat16 on GPU). copy, and what else is raised: see `load_quantized`. blocks_to_swap: the last so many
    `layers` are left in host memory. Raises ConfigError as `open_nextdit` and `last_blocks`.
    """
    return load_quantized(
        lambda: open_nextdit(folder, dtype), copy, lambda model: last_blocks(model, blocks_to_swap), base
    )


def load_gemma3(folder: str | Path, dtype: str | None = None) -> Gemma3TextEncoder:
    """The text layers of a Gemma3 folder but the last, in eval mode; the vision tower is skipped.

    Accepts every prefix that transformers' versions and ComfyUI's single file give the names. Raises
    ConfigError for float16, whose range Gemma3 leaves.
    """
    if dtype == "float16":
        raise ConfigError("Gemma3 overflows in float16: load it in bfloat16 or float32")
    return _loaded(_gemma3, _gemma3_source, folder, dtype)


def load_jina_clip(folder: str | Path, dtype: str | None = None) -> JinaClipTextModel:
    """The text tower of a Jina CLIP v2 folder, its task LoRA folded into the weights (in float32), in eval
    mode; the vision tower is skipped. A file whose LoRA was folded by others loads as it is."""
    return _loaded(_jina_clip, _jina_clip_source, folder, dtype)


def load_newbie_vae(folder: str | Path, dtype: str | None = None) -> AutoencoderKL:
    """The FLUX autoencoder of a component folder, in eval mode. Raises ConfigError for another number of
    latent channels than 16."""
    config = check_newbie_vae(folder)
    vae = load_vae(folder, dtype)
    absent = {key: value for key, value in FLUX_LATENTS.items() if config.get(key) is None}
    vae.register_to_config(**absent)
    return vae


def check_newbie_vae(folder: str | Path) -> dict:
    """config.json of a component folder. Raises ConfigError for another number of latent channels than 16."""
    config = component_config(folder, "vae")
    channels = config.get("latent_channels")
    if channels != LATENT_CHANNELS:
        raise ConfigError(
            f"the VAE in {folder} has {channels} latent channels, wanted {LATENT_CHANNELS}: take FLUX.1's VAE"
        )
    return config


def _loaded(build: Callable, source_of: Callable, folder: str | Path, dtype: str | None) -> nn.Layer:
    model = opened(build, folder, build.__name__.removeprefix("_"), dtype)
    source = source_of(model, Path(folder))
    _check(model, source, Path(folder))
    return fill(model, _tensors_of(model, source))


def _nextdit(folder: Path) -> NextDiT_CLIP:
    config, sizes = component_config(folder, "nextdit"), sizes_of(folder, "nextdit")
    known = inspect.signature(NextDiT_CLIP).parameters
    unknown = sorted(config.keys() - known.keys() - _IGNORED_KEYS)
    if unknown:
        named = ", ".join(map(shown, unknown))
        raise ConfigError(f"{folder}/config.json has keys that a NextDiT_CLIP lacks: {named}")
    _check_layers(folder, "n_layers", sizes.n_layers, r"layers\.(\d+)\.")
    _check_layers(folder, "n_refiner_layers", sizes.n_refiner_layers, r"noise_refiner\.(\d+)\.")
    return NextDiT_CLIP(**known_config(folder, "nextdit"))


def _gemma3(folder: Path) -> Gemma3TextEncoder:
    config = Gemma3Config.from_dict(component_config(folder, "gemma3"))
    layers = config.num_hidden_layers - 1  # of the last there may be nothing
    _check_layers(folder, "num_hidden_layers", layers, r"(?:.*\.)?layers\.(\d+)\.")
    return Gemma3TextEncoder(config)


def _jina_clip(folder: Path) -> JinaClipTextModel:
    config = JinaClipConfig.from_dict(component_config(folder, "jina_clip"))
    _check_layers(folder, "num_hidden_layers", config.num_hidden_layers, r".*\blayers\.(\d+)\.")
    return JinaClipTextModel(config)


def _check_layers(folder: Path, key: str, wanted: int, pattern: str) -> None:
    """Raises ConfigError for more layers than there are weights of, before they are built. pattern: what
    names of tensors begin with, its group being the layer."""
    names = (name for name in tensor_infos(folder) if not _is_vision(name))
    there = {match[1] for name in names if (match := re.match(pattern, name))}
    if wanted > len(there):
        raise ConfigError(
            f"{folder}/config.json: {key} wants {wanted} layers, but the weights are of {len(there)}: take "
            "config.json and all weights from one model"
        )


def _nextdit_source(model: NextDiT_CLIP, folder: Path) -> _Source:
    return _Source(tensor_infos(folder), {name: name for name in model.state_dict()})


def _gemma3_source(model: Gemma3TextEncoder, folder: Path) -> _Source:
    infos = {name: info for name, info in tensor_infos(folder).items() if not _is_vision(name)}
    prefix = _prefix(infos, "layers.0.self_attn.q_norm.weight", folder)
    # hidden_states[-2] is taken before the last layer and the final norm.
    unused = (f"{prefix}layers.{len(model.layers)}.", f"{prefix}norm.weight")
    infos = {name: info for name, info in infos.items() if not name.startswith(unused)}
    return _Source(infos, {prefix + name: name for name in model.state_dict()})


def _jina_clip_source(model: JinaClipTextModel, folder: Path) -> _Source:
    infos = {name: info for name, info in tensor_infos(folder).items() if not _is_vision(name)}
    prefix, config = _prefix(infos, "emb_ln.weight", folder), model.config
    if not any(_LORA in name for name in infos):
        return _Source(infos, {prefix + name: name for name in model.state_dict()})
    if not config.lora_rank or config.lora_alpha is None:
        raise ConfigError(
            f"{folder}/config.json has no lora_rank and lora_alpha in text_config.hf_model_config_kwargs, "
            "but the weights have a task LoRA: take config.json from the original model"
        )
    matrices = linear_weights(model) | {
        f"embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type")
    }
    tensors = {}
    for name in model.state_dict():
        path = prefix + name.removesuffix(".weight") + _LORA
        sources = [path + part for part in _LORA_PARTS] if name in matrices else [prefix + name]
        tensors |= dict.fromkeys(sources, name)
    return _Source(infos, tensors, config.lora_rank, config.lora_alpha / config.lora_rank)


def _is_vision(name: str) -> bool:
    return any(part in name for part in _NOT_TEXT)


def _prefix(infos: dict[str, TensorInfo], suffix: str, folder: Path) -> str:
    """What stands before `suffix` in the one name that ends with it."""
    found = [name for name in infos if name == suffix or name.endswith("." + suffix)]
    if len(found) != 1:
        raise ConfigError(
            f"{folder} has {len(found)} tensors named [...]{suffix}, wanted one: {shown(found)}"
        )
    return found[0].removesuffix(suffix)


def _check(model: nn.Layer, source: _Source, folder: Path) -> None:
    """`check_tensors` for the tensors of a source; those of a LoRA have shapes of their own."""
    parameters, linears, wanted = model.state_dict(), linear_weights(model), {}
    for file_name, name in source.tensors.items():
        shape, part = list(parameters[name].shape), file_name.rpartition(_LORA)[2]
        if part in _LORA_PARTS[1:]:
            wanted[file_name] = _factor_shape(shape, name in linears, part, source.lora_rank)
        else:
            wanted[file_name] = shape_on_disk(name, shape, linears, source.infos.get(file_name))
    check_tensors(model, folder, source.infos, wanted)


def _factor_shape(weight: list[int], is_linear: bool, part: str, rank: int) -> list[int]:
    """Shape in the file of a LoRA factor of a parameter [first, second]: a Linear's [in, out] has A
    [1, rank, in] and B [1, out, rank]; an embedding's [entries, dim] has A [1, entries, rank] and B
    [1, rank, dim]."""
    first, second = weight
    if part == "0.lora_A":
        return [1, rank, first] if is_linear else [1, first, rank]
    return [1, second, rank] if is_linear else [1, rank, second]


def _tensors_of(model: nn.Layer, source: _Source) -> Iterator[tuple[str, paddle.Tensor]]:
    """The tensors of a source by the names of the parameters, each in the shape of its parameter."""
    linears = linear_weights(model)
    wanted = {name: source.infos[name] for name in source.tensors}
    transposed = {name for name, parameter in source.tensors.items() if parameter in linears}
    transposed = {name for name in transposed if ".lora_" not in name}
    unfolded: dict[str, dict[str, paddle.Tensor]] = {}
    for file_name, tensor in read_tensors(wanted, transposed):
        name, part = source.tensors[file_name], file_name.rpartition(_LORA)[2]
        if part in _LORA_PARTS:
            parts = unfolded.setdefault(name, {})
            parts[part] = tensor.astype("float32")
            if len(parts) < len(_LORA_PARTS):
                continue
            tensor = _folded(unfolded.pop(name), name in linears, source.lora_scale)
        yield name, tensor


def _folded(parts: dict[str, paddle.Tensor], is_linear: bool, scale: float) -> paddle.Tensor:
    """weight + scale * (B A)^T for a Linear [in, out], weight + scale * A B for an embedding; float32."""
    weight, a, b = (parts[part] for part in _LORA_PARTS)
    delta = paddle.matmul(b[0], a[0]).t() if is_linear else paddle.matmul(a[0], b[0])
    return weight + scale * delta
