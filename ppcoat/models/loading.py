"""Reads a diffusers-format FLUX folder tensor by tensor into Paddle models, and writes nothing.

Each component folder holds config.json and safetensors: one file, or an index and shards. A weight goes
from disk to its parameter on its own (transposed for Linears, cast), through a map of its bytes alone, so
the peak is the model and one tensor. Everything that headers can tell (missing shards, missing tensors,
wrong shapes) is checked before the first weight is read; tensor_files.py reads them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn
from ppdiffusers import AutoencoderKL

from ppcoat.device import default_dtype
from ppcoat.errors import ConfigError
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.tensor_files import (
    TensorInfo,
    check_there,
    in_file_order,
    map_tensor,
    read_json,
    tensor_infos,
)
from ppcoat.nn.linear import FrozenLinear

# Constants that older CLIP files carry beside the weights.
_IGNORED = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
# T5 reads one table under two names; the file has the first.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
MOST_NAMED = 4  # tensors of one kind that an error names
# diffusers' classes of FLUX.1 folders that FluxPipeline draws with; the second sees a control picture.
FLUX_CLASSES = ("FluxPipeline", "FluxControlPipeline")
FLUX_COMPONENTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "transformer",
    "vae",
)


def check_components(folder: Path, pipeline: str, components: Sequence[str]) -> None:
    """Raise ConfigError unless `folder` says that it is of this pipeline class and has all its parts."""
    index = read_json(folder / "model_index.json", f"the folder of a {pipeline} has one")
    if index.get("_class_name") not in (FLUX_CLASSES if pipeline in FLUX_CLASSES else (pipeline,)):
        raise ConfigError(
            f"{folder}/model_index.json is of a {index.get('_class_name')}, not of a {pipeline}"
        )
    for name in components:
        if not (folder / name).is_dir():
            raise ConfigError(
                f"{folder / name} is missing: the folder of a {pipeline} has {', '.join(components)}"
            )


def check_folder(folder: str | Path, setting: str = "the model") -> None:
    """Checks a FLUX pipeline folder by its JSON files and safetensors headers; reads no weight.

    setting: the flag or key that named it. Raises ConfigError naming the folder, file or tensor: a missing
    component, config, shard or tokenizer file; a cut-off or unreadable file; a missing, unexpected or wrongly
    shaped tensor of the transformer or the VAE (the text encoders' shapes are checked when they are loaded,
    before their weights are read).
    """
    folder = Path(folder)
    check_there(folder, setting)
    check_components(folder, "FluxPipeline", FLUX_COMPONENTS)
    for name in ("text_encoder", "text_encoder_2"):
        read_json(folder / name / "config.json")
        tensor_infos(folder / name)
    _tokenizer_files(folder / "tokenizer", "vocab.json", "merges.txt")
    _tokenizer_files(folder / "tokenizer_2", "spiece.model")
    FlowMatchEulerDiscreteScheduler.from_config(_scheduler_config(folder / "scheduler"))
    for name, model_class in (("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL)):
        unfilled(model_class, folder / name)


def parameter_shapes(folder: str | Path, *parts: str) -> dict[str, dict[str, list[int]]]:
    """{part: {parameter: its shape in torch's order}} of these component folders, from the headers of their
    files. Raises ConfigError as `tensor_infos` does."""
    found = {part: tensor_infos(Path(folder) / part) for part in parts}
    return {
        part: {name: info.shape if info.torch_layout or len(info.shape) != 2 else info.shape[::-1]
               for name, info in infos.items()}
        for part, infos in found.items()
    }  # fmt: skip


def load_transformer(folder: str | Path, dtype: str | None = None) -> FluxTransformer2DModel:
    """The FLUX transformer of a component folder, in `dtype` (None: see `default_dtype`), in eval mode."""
    return load_weights(opened(_from_config(FluxTransformer2DModel), folder, dtype), folder)


def unfilled(
    model_class: type, folder: str | Path, dtype: str | None = None
) -> tuple[nn.Layer, dict[str, TensorInfo]]:
    """A model whose parameters (of `dtype`) have a shape and no memory yet, and where its tensors lie.

    Raises ConfigError unless names and shapes in the files are exactly the model's.
    """
    with paddle.LazyGuard():
        model = opened(_from_config(model_class), folder, dtype)
    infos = tensor_infos(folder)
    _check_model(model, infos, Path(folder))
    return model, infos


def load_vae(folder: str | Path, dtype: str | None = None) -> AutoencoderKL:
    """The autoencoder of a component folder, in `dtype` (None: see `default_dtype`), in eval mode."""
    return load_weights(opened(_from_config(AutoencoderKL), folder, dtype), folder)


def load_clip(folder: str | Path, dtype: str | None = None) -> nn.Layer:
    """The CLIP text encoder (ppdiffusers' CLIPTextModel) of a component folder, in eval mode."""
    from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel

    return _load_text_encoder(CLIPTextModel, CLIPTextConfig, folder, dtype)


def load_t5(folder: str | Path, dtype: str | None = None) -> nn.Layer:
    """The T5 encoder (ppdiffusers' T5EncoderModel) of a component folder, in eval mode."""
    from ppdiffusers.transformers import T5Config, T5EncoderModel

    return _load_text_encoder(T5EncoderModel, T5Config, folder, dtype)


def load_clip_tokenizer(folder: str | Path) -> Any:
    """paddlenlp's CLIPTokenizer from vocab.json and merges.txt."""
    from ppdiffusers.transformers import CLIPTokenizer

    _tokenizer_files(folder, "vocab.json", "merges.txt")
    return CLIPTokenizer.from_pretrained(str(folder))


def load_t5_tokenizer(folder: str | Path) -> Any:
    """paddlenlp's T5Tokenizer from spiece.model."""
    from ppdiffusers.transformers import T5Tokenizer

    _tokenizer_files(folder, "spiece.model")
    return T5Tokenizer.from_pretrained(str(folder))


def load_scheduler(folder: str | Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a component folder with scheduler_config.json."""
    return FlowMatchEulerDiscreteScheduler.from_config(_scheduler_config(folder))


def opened(build: Callable[[Path], nn.Layer], folder: str | Path, dtype: str | None) -> nn.Layer:
    """The model that build(folder) makes, with parameters of `dtype` (None: see `default_dtype`), and with
    `source_config`: config.json as found, which writing.py writes again."""
    with weights_in(dtype):
        model = build(Path(folder))
    model.source_config = read_json(Path(folder) / "config.json")
    return model


def load_weights(model: nn.Layer, folder: str | Path) -> nn.Layer:
    """Fills `model` from the safetensors of `folder`, casting to the dtype of each parameter; returns it in
    eval mode.

    Raises ConfigError naming file and tensor unless names and shapes agree exactly, before any weight is
    read.
    """
    infos = tensor_infos(folder)
    _check_model(model, infos, Path(folder))
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
    for name, info in in_file_order(infos):
        tensor = paddle.to_tensor(map_tensor(info))
        yield name, tensor.t() if name in linears and info.torch_layout else tensor


def linear_weights(model: nn.Layer) -> set[str]:
    """Names of the parameters that Paddle stores [in, out] and torch [out, in]."""
    linears = (nn.Linear, FrozenLinear)
    return {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, linears)}


def check_tensors(
    model: nn.Layer, folder: Path, infos: dict[str, TensorInfo], wanted: dict[str, list[int]]
) -> None:
    """Raises ConfigError unless the files of `folder` hold exactly the tensors that the model wants.

    infos: the tensors in the files, without those that have nothing to do with the model. wanted: name in the
    files -> shape there. The error counts all differences and names at most MOST_NAMED of each kind.
    """
    missing = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in infos]
    unexpected = [f"unexpected {name} {info.shape}" for name, info in infos.items() if name not in wanted]
    misshapen = [
        f"{name} in {infos[name].file.name} has shape {infos[name].shape}, config.json wants {shape}"
        for name, shape in wanted.items()
        if name in infos and infos[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
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


def _check_model(model: nn.Layer, infos: dict[str, TensorInfo], folder: Path) -> None:
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
    model_class: type, config_class: type, folder: str | Path, dtype: str | None
) -> nn.Layer:
    def build(folder: Path) -> nn.Layer:
        return model_class(config_class.from_dict(read_json(folder / "config.json")))

    return load_weights(opened(build, folder, dtype), folder)


def _from_config(model_class: type) -> Callable[[Path], nn.Layer]:
    """What makes a model of a ppdiffusers class from a component folder."""
    return lambda folder: model_class.from_config(_model_config(folder))


def _model_config(folder: Path) -> dict:
    """Drops a key that only repeats a default and that older ppdiffusers would warn of."""
    config = read_json(folder / "config.json")
    if config.get("mid_block_add_attention") is True:
        del config["mid_block_add_attention"]
    return config


def _scheduler_config(folder: str | Path) -> dict:
    return read_json(Path(folder) / "scheduler_config.json")


def _tokenizer_files(folder: str | Path, *names: str) -> None:
    for name in names:
        if not (Path(folder) / name).is_file():
            also = (
                "; tokenizer.json alone is not enough" if (Path(folder) / "tokenizer.json").is_file() else ""
            )
            raise ConfigError(
                f"{Path(folder) / name} is missing{also}: take it from the original model folder"
            )


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
