"""Reads a FLUX model tensor by tensor into Paddle models, and writes nothing.

A component is a folder with config.json and safetensors (one file, or an index and shards), or what stands
for one in a single file (flux/files.py). A weight goes from disk to its parameter on its own (decoded,
transposed for Linears, cast), through a map of its bytes alone, so the peak is the model and one tensor.
Everything that headers can tell (missing shards, missing tensors, wrong shapes) is checked before the first
weight is read; tensor_files.py reads them.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn
from ppdiffusers import AutoencoderKL

from ppcoat.device import compute_dtype, default_dtype
from ppcoat.errors import ConfigError
from ppcoat.models.flux.files import FLUX_COMPONENTS, INPUTS_OF_CLASS, FluxFiles
from ppcoat.models.flux.original_names import check_sizes
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.flux.tokenizers import check_tokenizer, load_clip_tokenizer, load_t5_tokenizer
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.pictures import check_options
from ppcoat.models.tensor_files import (
    FLOATS,
    Component,
    FilePart,
    TensorInfo,
    check_there,
    check_variants,
    chosen_weights,
    component_config,
    config_file,
    known_config,
    map_tensor,
    read_by_library,
    tensor_infos,
    with_progress,
)
from ppcoat.nn.linear import FrozenLinear

# Constants that older CLIP files carry beside the weights.
_IGNORED = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
# T5 reads one table under two names; the file has the first.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
MOST_NAMED = 4  # tensors of one kind that an error names
_PARTS = {
    "CLIPTextModel": "text_encoder",
    "T5EncoderModel": "text_encoder_2",
    "FluxTransformer2DModel": "transformer",
    "AutoencoderKL": "vae",
}
_WITH_WEIGHTS = tuple(_PARTS.values())


def check_folder(
    model: str | Path | FluxFiles,
    setting: str = "the model",
    parts: Collection[str] = FLUX_COMPONENTS,
    variant: str | None = None,
    control: bool = False,
) -> dict[str, Component]:
    """Checks the components of a FLUX model by JSON files and the headers of its weights; reads no weight ->
    where each of `parts` lies, for `load_component`.

    model: a pipeline's folder, a file, or where all components lie. setting: the flag or key that named it.
    parts: only these are checked. variant: which weights of folders are read (None: plain files); warns where
    there are only others. control: take a model that draws after a picture, too. Raises ConfigError naming
    the folder, file or tensor: a missing component, config, shard or tokenizer file; a cut-off or unreadable
    file; a missing, unexpected or wrongly shaped tensor of the transformer or the VAE (the text encoders'
    shapes are checked when they are loaded, before their weights are read); components that do not belong
    together.
    """
    files = FluxFiles.found(model, setting)
    files.check(*parts)
    where = {name: files[name] for name in FLUX_COMPONENTS if name in parts}
    weights = {name: chosen_weights(component, variant) for name, component in where.items()
               if name in _WITH_WEIGHTS and not isinstance(component, FilePart)}  # fmt: skip
    check_variants(weights, variant, files.base)
    where |= {name: chosen for name, (_, chosen) in weights.items()}
    for name in _WITH_WEIGHTS:
        if name in parts:
            check_sizes(name, where[name], tensor_infos(where[name]))
    for name, load, encoder in (("tokenizer", load_clip_tokenizer, "text_encoder"),
                                ("tokenizer_2", load_t5_tokenizer, "text_encoder_2")):  # fmt: skip
        if name in parts:
            tokenizer = load(where[name])
            if encoder in parts:
                check_tokenizer(tokenizer, where[encoder], encoder)
    if "scheduler" in parts:
        load_scheduler(where["scheduler"])
    models = {
        name: unfilled(model_class, where[name])[0]
        for name, model_class in (("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL))
        if name in parts
    }
    if "vae" in parts:
        _check_latents(where["vae"])
    if "transformer" in models:
        _check_widths(models["transformer"], files, parts)
        if not control:
            check_without_control(models["transformer"], files)
    return where


def _check_widths(transformer: FluxTransformer2DModel, files: FluxFiles, parts: Collection[str]) -> None:
    """Raise ConfigError for components of other widths than the transformer's config wants: those of another
    model."""
    for name, key, wanted in (
        ("text_encoder", "hidden_size", transformer.config.pooled_projection_dim),
        ("text_encoder_2", "d_model", transformer.config.joint_attention_dim),
        ("vae", "latent_channels", transformer.out_channels // 4),
    ):
        came = component_config(files[name], name).get(key, wanted) if name in parts else wanted
        if came != wanted:
            raise ConfigError(
                f"{files[name]} has {key} {came}, but the transformer of {files.base} wants {wanted}: take "
                "components of one model"
            )


def _check_latents(vae: Component) -> None:
    """Raise ConfigError for an autoencoder whose config leaves out what FLUX's latents are scaled by: what
    is meant then is another model's."""
    config = component_config(vae, "vae")
    for key in ("scaling_factor", "shift_factor"):
        if config.get(key) is None:
            raise ConfigError(f"{config_file(vae, 'vae')}: {key} is missing: take FLUX.1's autoencoder")


def check_without_control(transformer: FluxTransformer2DModel, files: FluxFiles, fill: bool = False) -> None:
    """Raise ConfigError for a transformer of more inputs than FLUX.1-dev's, which cannot be trained; fill:
    take FLUX.1 Fill's, too."""
    inputs, channels = transformer.config.in_channels, transformer.out_channels
    if inputs not in (channels, INPUTS_OF_CLASS["FluxFillPipeline"] * channels if fill else channels):
        raise ConfigError(
            f"{files.base} sees a picture beside the noise ({inputs} inputs a token, wanted {channels}): "
            "only generate and merge take such a model, and train FLUX.1 Fill; take FLUX.1-dev or -schnell"
        )


def parameter_shapes(model: str | Path | FluxFiles, *parts: str) -> dict[str, dict[str, list[int]]]:
    """{part: {parameter: its shape in torch's order}} of these components, from the headers of their files.
    Raises ConfigError as `tensor_infos` does."""
    found = {part: tensor_infos(model[part] if isinstance(model, FluxFiles) else Path(model) / part)
             for part in parts}  # fmt: skip
    return {
        part: {name: info.shape if info.torch_layout or len(info.shape) != 2 else info.shape[::-1]
               for name, info in infos.items()}
        for part, infos in found.items()
    }  # fmt: skip


def load_transformer(folder: Component, dtype: str | None = None) -> FluxTransformer2DModel:
    """The FLUX transformer of a component folder, in `dtype` (None: see `default_dtype`), in eval mode. Here
    and below, a folder may be a file that `chosen_weights` gave."""
    return load_weights(_opened(FluxTransformer2DModel, folder, dtype), folder)


def pretrained_transformer(
    folder: Path,
    paddle_dtype: Any = None,
    torch_dtype: Any = None,
    variant: str | None = None,
    **options: Any,
) -> FluxTransformer2DModel:
    """`load_transformer`, also of a model file, with the options of FluxPipeline.from_pretrained. Raises
    ConfigError for those that ask for something else, and for a dtype that the device does not compute in,
    before anything is read."""
    check_options(options, ("subfolder", "paddle_dtype", "torch_dtype", "variant"))
    dtype = compute_dtype(torch_dtype if paddle_dtype is None else paddle_dtype)
    if folder.is_file():
        return load_transformer(FluxFiles.found(folder)["transformer"], dtype)
    check_there(folder, "the first argument")
    return load_transformer(chosen_weights(folder, variant)[1], dtype)


def load_component(component: Component, name: str, dtype: str | None = None) -> Any:
    """A component by its folder's name, as the functions here load it; dtype is that of weights."""
    load: Callable = {
        "scheduler": load_scheduler, "tokenizer": load_clip_tokenizer, "tokenizer_2": load_t5_tokenizer,
        "vae": load_vae, "text_encoder": load_clip, "text_encoder_2": load_t5,
        "transformer": load_transformer}[name]  # fmt: skip
    return load(component, dtype) if name in _WITH_WEIGHTS else load(component)


def unfilled(
    model_class: type, folder: Component, dtype: str | None = None
) -> tuple[nn.Layer, dict[str, TensorInfo]]:
    """A model whose parameters (of `dtype`) have a shape and no memory yet, and where its tensors lie.

    Raises ConfigError unless names and shapes in the files are exactly the model's.
    """
    with paddle.LazyGuard():
        model = _opened(model_class, folder, dtype)
    infos = tensor_infos(folder)
    _check_model(model, infos, folder)
    return model, infos


def load_vae(folder: Component, dtype: str | None = None) -> AutoencoderKL:
    """The autoencoder of a component folder, in `dtype` (None: see `default_dtype`), in eval mode."""
    return load_weights(_opened(AutoencoderKL, folder, dtype), folder)


def load_clip(folder: Component, dtype: str | None = None) -> nn.Layer:
    """The CLIP text encoder (ppdiffusers' CLIPTextModel) of a component folder, in eval mode."""
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel

    return _load_text_encoder(CLIPTextModel, CLIPTextConfig, folder, dtype)


def load_t5(folder: Component, dtype: str | None = None) -> nn.Layer:
    """The T5 encoder (ppdiffusers' T5EncoderModel) of a component folder, in eval mode."""
    from ppdiffusers.transformers import T5Config, T5EncoderModel

    return _load_text_encoder(T5EncoderModel, T5Config, folder, dtype)


def load_scheduler(folder: Component) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a component folder with scheduler_config.json."""
    return FlowMatchEulerDiscreteScheduler.from_config(known_config(folder, "scheduler"))


def opened(
    build: Callable[[Component], nn.Layer], folder: Component, part: str, dtype: str | None
) -> nn.Layer:
    """The model that build(folder) makes, with parameters of `dtype` (None: see `default_dtype`), and with
    `source_config`: config.json as found, which writing.py writes again. A folder comes to it as a Path.
    part: see `limits_of`. Raises ConfigError as `component_config`, and for what `build` stumbles over."""
    config = component_config(folder, part)
    with weights_in(dtype), read_by_library(config_file(folder, part)):
        model = build(folder if isinstance(folder, FilePart) else Path(folder))
    model.source_config = config
    return model


def load_weights(model: nn.Layer, folder: Component) -> nn.Layer:
    """Fills `model` from the safetensors of `folder`, casting to the dtype of each parameter; returns it in
    eval mode.

    Raises ConfigError naming file and tensor unless names and shapes agree exactly, before any weight is
    read.
    """
    infos = tensor_infos(folder)
    _check_model(model, infos, folder)
    return fill(model, _under_names_of(model, read_tensors(infos, linear_weights(model))))


def fill(model: nn.Layer, tensors: Iterable[tuple[str, paddle.Tensor]]) -> nn.Layer:
    """Gives the parameters of `model` their values by name, as `set_parameter` does; returns it in eval mode.

    tensors: (name, tensor of any shape and dtype, the shape being that of its parameter).
    """
    parameters = model.state_dict()
    for name, tensor in tensors:
        set_parameter(parameters[name], tensor)
    return model.eval()


def set_parameter(parameter: paddle.Tensor, tensor: paddle.Tensor) -> None:
    """Gives a parameter, of any shape, the values of a tensor of the same shape, cast to its dtype. One that
    has no memory yet, made under LazyGuard, gets it now."""
    if not parameter._is_initialized():
        parameter.initialize()
    parameter.set_value(tensor.astype(parameter.dtype))


def read_tensors(infos: dict[str, TensorInfo], linears: set[str]) -> Iterator[tuple[str, paddle.Tensor]]:
    """Yields (name, tensor) one at a time, file by file, in the dtype of the file and Paddle's layout.

    linears: names of the 2-D weights of Linears, which come as [in, out] and which a file in torch's layout
    stores as [out, in]. Every other tensor has its shape in the file.
    """
    for name, info in with_progress(infos):
        tensor = paddle.to_tensor(map_tensor(info))
        yield name, tensor.t() if name in linears and info.torch_layout else tensor


def linear_weights(model: nn.Layer) -> set[str]:
    """Names of the parameters that Paddle stores [in, out] and torch [out, in]."""
    linears = (nn.Linear, FrozenLinear)
    return {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, linears)}


def check_tensors(
    model: nn.Layer, folder: Component, infos: dict[str, TensorInfo], wanted: dict[str, list[int]]
) -> None:
    """Raises ConfigError unless the files of `folder` hold exactly the tensors that the model wants.

    infos: the tensors in the files, without those that have nothing to do with the model. wanted: name in the
    files -> shape there. The error counts all differences and names at most MOST_NAMED of each kind.
    """
    missing = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in infos]
    unexpected = [f"unexpected {name} {info.shape}" for name, info in infos.items() if name not in wanted]
    numberless = [
        f"{name} in {infos[name].file.name} holds {infos[name].dtype}, wanted one of {', '.join(FLOATS)}"
        for name in wanted
        if name in infos and infos[name].dtype not in FLOATS
    ]
    misshapen = [
        f"{name} in {infos[name].file.name} has shape {infos[name].shape}, config.json wants {shape}"
        for name, shape in wanted.items()
        if name in infos and infos[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen,
             "not of floating numbers": numberless}  # fmt: skip
    count = sum(map(len, kinds.values()))
    if count:
        named = [each for differences in kinds.values() for each in differences[:MOST_NAMED]]
        named += [f"{len(rest)} more {kind}" for kind, each in kinds.items() if (rest := each[MOST_NAMED:])]
        raise ConfigError(
            f"the weights in {folder} are not those of a {type(model).__name__} of its config.json "
            f"({count} difference{'s' * (count > 1)}): {'; '.join(named)}: take config.json and all weights "
            "from one model"
        )


def shape_on_disk(name: str, shape: list[int], linears: set[str], info: TensorInfo | None) -> list[int]:
    """Shape in the file of the parameter `name`: a Linear's [in, out] is [out, in] in torch's layout, which
    is assumed where the tensor is missing. linears: as `linear_weights` gives them."""
    return list(shape)[::-1] if name in linears and (info is None or info.torch_layout) else list(shape)


def _check_model(model: nn.Layer, infos: dict[str, TensorInfo], folder: Component) -> None:
    """`check_tensors` where the files name tensors as the model does, but for TIED and _IGNORED."""
    linears, wanted = linear_weights(model), {}
    for name, parameter in model.state_dict().items():
        source = name if name in infos else TIED.get(name, name)
        wanted[source] = shape_on_disk(name, parameter.shape, linears, infos.get(source))
    infos = {name: info for name, info in infos.items() if name in wanted or name not in _IGNORED}
    check_tensors(model, folder, infos, wanted)


def _under_names_of(
    model: nn.Layer, tensors: Iterable[tuple[str, paddle.Tensor]]
) -> Iterator[tuple[str, paddle.Tensor]]:
    """The tensors that the model has, each under every name that it has there."""
    names = model.state_dict().keys()
    for name, tensor in tensors:
        for target in (name, *(tied for tied, source in TIED.items() if source == name)):
            if target in names:
                yield target, tensor


def _load_text_encoder(
    model_class: type, config_class: type, folder: Component, dtype: str | None
) -> nn.Layer:
    return load_weights(_opened(model_class, folder, dtype, config_class), folder)


def _opened(
    model_class: type, folder: Component, dtype: str | None, config_class: type | None = None
) -> nn.Layer:
    """`opened` by a class of ppdiffusers; its sizes are compared with the weights before."""
    part = _PARTS[model_class.__name__]

    def build(folder: Component) -> nn.Layer:
        check_sizes(part, folder, tensor_infos(folder))
        config = known_config(folder, part)
        config.pop("mid_block_add_attention", None)  # of newer ones, and true, which these classes are
        return (
            model_class(config_class.from_dict(config)) if config_class else model_class.from_config(config)
        )

    return opened(build, folder, part, dtype)


@contextmanager
def weights_in(dtype: str | None) -> Iterator[None]:
    """Context manager: parameters that are made have `dtype` (None: see `default_dtype`) from the start, so
    that a model is never in memory twice."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype or default_dtype())
    try:
        yield
    finally:
        paddle.set_default_dtype(before)
