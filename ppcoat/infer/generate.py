"""Draw pictures with a FLUX or NewBie-image folder and, if wanted, a LoRA, and save them as PNG: of prompts,
or of a list whose lines have settings of their own (prompts.py, batch.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcoat.atomic import check_writable, whole_file
from ppcoat.device import compute_dtype, set_device
from ppcoat.errors import ConfigError
from ppcoat.infer.batch import Batch
from ppcoat.infer.card import flux_within_card, newbie_within_card, placement_of
from ppcoat.infer.drawers import Drawer, FluxDrawer, Loras, NewbieDrawer
from ppcoat.infer.drawing import Drawing, EditFlags, check_given, check_numbers
from ppcoat.infer.editing import (
    Sight,
    check_edit_flags,
    opened_picture,
    prepared_all,
)
from ppcoat.infer.prompts import read_pictures, slug
from ppcoat.lora import info_of, inputs_of, put_adapters, read_fitting, tell
from ppcoat.lora.header import PARTS
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import check_folder, parameter_shapes
from ppcoat.models.newbie.files import check_newbie_folder
from ppcoat.models.offload import Placement
from ppcoat.models.tensor_files import pipeline_class

NOTABLE_STRETCH = 0.02  # of a control picture's width against its height
How = tuple[str | None, Placement]  # the dtype that is asked for, and what lies where


def generate(drawing: Drawing) -> list[Path]:
    """Draw and save; returns the files. Raises ConfigError before any model is loaded for what it can
    check."""
    check_given(drawing)
    kind = _kind(drawing)

    def check(one: Drawing) -> None:
        check_numbers(one)
        kind.check_settings(one)

    if drawing.prompts is None:
        drawings = [replace(drawing, prompt=[prompt]) for prompt in drawing.prompt]
        places = [f"prompt {prompt!r:.42}: " if drawings[1:] else "" for prompt in drawing.prompt]
        check(drawing)
    else:
        pictures = read_pictures(drawing.prompts, drawing, check)
        drawings = [picture.drawing for picture in pictures]
        places = [f"{drawing.prompts}, line {picture.line}: " for picture in pictures]
    model = kind.check(drawing)
    loras = read_loras(drawing, model, *kind.parts)
    drawings = kind.prepare(drawings, places, model, loras)
    set_device(drawing.device)
    dtype = compute_dtype(drawing.dtype)
    folder = output_folder(drawing)
    placement = placement_of(drawings, model)

    def load() -> Drawer:
        return kind.drawer(drawings[0], model, (dtype, placement), loras)

    if drawing.prompts is not None:
        pictures = [replace(each, drawing=one) for each, one in zip(pictures, drawings, strict=True)]
        return Batch(drawing, pictures, folder, model, (dtype, placement)).draw(load)
    files = []
    for number, (one, found) in enumerate(zip(drawings, load().drawn(drawings), strict=True)):
        for i, picture in enumerate(found):
            files.append(save_picture(picture, folder, number, one.prompt[0], one.seed + i))
    return files


def _check_flux_settings(drawing: Drawing) -> None:
    if drawing.negative_prompt and not drawing.true_cfg_scale > 1:
        raise ConfigError("negative_prompt: FLUX sees it only with a true_cfg_scale above 1; give e.g. 3")
    check_edit_flags(drawing)


def _check_newbie_settings(drawing: Drawing) -> None:
    if drawing.true_cfg_scale != 1:
        raise ConfigError("true_cfg_scale is for FLUX; NewBie's classifier-free guidance is guidance_scale")
    for field in fields(EditFlags):
        if getattr(drawing, field.name) is not None:
            raise ConfigError(f"{field.name} is for FLUX: NewBie draws from no picture; leave it out")


def _check_flux(drawing: Drawing) -> FluxFiles:
    files = drawing.files
    check_folder(files, control=True)
    return files


def _check_newbie(drawing: Drawing) -> Path:
    for name in ("text_encoders", "vae", "tokenizers"):
        if getattr(drawing, name):
            raise ConfigError(f"--{name} is for a FLUX file; a NewBie folder has its own, leave it out")
    if drawing.control_image is not None:
        raise ConfigError("control_image is for FLUX: NewBie draws after no picture; leave it out")
    check_newbie_folder(drawing.model)
    return Path(drawing.model)


def read_loras(drawing: Drawing, model: FluxFiles | Path, *parts: str) -> Loras:
    """The LoRAs of a drawing with their strengths, held to these parts of the model, before any is loaded.
    Raises ConfigError for what cannot be applied."""
    shapes = parameter_shapes(model, *parts)
    loras = [
        (read_fitting(path, shapes, None, drawing.ignore_unknown), scale) for path, scale in drawing.loras
    ]
    _check_control(drawing, shapes["transformer"], loras)
    return loras


def _check_control(drawing: Drawing, shapes: Mapping[str, Sequence[int]], loras: Loras) -> None:
    """Raises ConfigError for a control picture that cannot be read or that the model does not see, and for
    none where it wants one. shapes: of the transformer, without the LoRAs."""
    if "proj_out.weight" not in shapes:  # NewBie
        return
    own, seen = shapes["x_embedder.weight"][1], 2 * shapes["proj_out.weight"][0]
    control = [
        path for (path, _), (file, _) in zip(drawing.loras, loras, strict=True) if inputs_of(file) == seen
    ]
    if drawing.control_image is None and (control or own == seen):
        what = f"{control[0]} is a control LoRA" if own < seen else f"{drawing.model} is a control model"
        than = f", that of this model {own}" if own < seen else ""
        raise ConfigError(
            f"{what} (x_embedder takes {seen} inputs{than}): give --control_image, the picture it draws after"
        )
    if drawing.control_image is not None and not (control or own == seen):
        raise ConfigError(
            f"control_image: {drawing.model} sees no picture (x_embedder takes {own} inputs): add a control "
            "LoRA by --path_to_lora, or draw with FLUX.1 Canny or Depth"
        )
    if drawing.control_image is not None:
        opened_picture(drawing.control_image)


def control_picture(drawing: Drawing, pipeline: FluxPipeline) -> Image.Image | None:
    """The control picture of a drawing; tells where it will be stretched."""
    if drawing.control_image is None:
        return None
    picture = opened_picture(drawing.control_image)
    size = pipeline.vae.config.sample_size
    width, height = drawing.width or size, drawing.height or size
    if abs(picture.width * height / (picture.height * width) - 1) > NOTABLE_STRETCH:
        print(
            f"note: {drawing.control_image} is {picture.width}x{picture.height} and is stretched to "
            f"{width}x{height}: --width and --height say another size"
        )
    return picture


def put_loras(pipeline: FluxPipeline, loras: Loras) -> None:
    """Put all LoRAs of a drawing into FLUX, each at its strength, and tell what they do."""
    for i, (file, scale) in enumerate(loras):
        # read_loras has refused what does not fit, or left it out as asked
        tell(pipeline.load_lora_weights(file, f"lora_{i}", scale=scale, ignore_unknown=True))
    if len(loras) > 1:
        pipeline.set_adapters([f"lora_{i}" for i in range(len(loras))], [scale for _, scale in loras])


def _flux_drawer(drawing: Drawing, files: FluxFiles, how: How, loras: Loras) -> Drawer:
    pipeline = flux_within_card(drawing, files, *how)
    put_loras(pipeline, loras)
    return FluxDrawer(pipeline, loras, control_picture(drawing, pipeline), Sight.of(files))


def _newbie_drawer(drawing: Drawing, folder: Path, how: How, loras: Loras) -> Drawer:
    pipeline = newbie_within_card(drawing, folder, *how)
    put_adapters({"transformer": pipeline.transformer}, loras)
    for file, scale in loras:
        tell(info_of(file, scale))
    return NewbieDrawer(pipeline, loras)


class _Kind(NamedTuple):
    """What differs between the models that can draw. check_settings(drawing) and check(drawing) raise
    ConfigError, the second says where the model lies; parts: folders that a LoRA can change;
    prepare(drawings, places, model, loras): with what pictures and model decide; drawer(drawing, model, how,
    loras) loads it."""

    check_settings: Callable[[Drawing], None]
    check: Callable[[Drawing], FluxFiles | Path]
    parts: tuple[str, ...]
    prepare: Callable[[list[Drawing], list[str], FluxFiles | Path, Loras], list[Drawing]]
    drawer: Callable[[Drawing, FluxFiles | Path, How, Loras], Drawer]


_KINDS = {  # class in model_index.json -> kind
    "FluxPipeline": _Kind(
        _check_flux_settings,
        _check_flux,
        PARTS,
        prepared_all,
        _flux_drawer,
    ),
    "NewbiePipeline": _Kind(
        _check_newbie_settings,
        _check_newbie,
        ("transformer",),
        lambda drawings, *_: drawings,
        _newbie_drawer,
    ),
}


def _kind(drawing: Drawing) -> _Kind:
    """A file is of FLUX, a folder of what its model_index.json says, or of FLUX's transformer alone."""
    return _KINDS.get(pipeline_class(Path(drawing.model)), _KINDS["FluxPipeline"])


def save_picture(picture: Image.Image, folder: Path, number: int, prompt: str, seed: int) -> Path:
    """Write a PNG whose name tells number, prompt and seed, with the whole prompt in its text; prints it."""
    file = folder / f"{number:03d}_{slug(prompt)}_{seed}.png"
    note = PngInfo()
    note.add_itxt("prompt", prompt)
    with whole_file(file) as draft:
        picture.save(draft, pnginfo=note)
    print(file)
    return file


def output_folder(drawing: Drawing) -> Path:
    """Where the pictures go, not made yet but writable. Raises ConfigError if a file has that name, OSError
    if it cannot be written."""
    folder = Path(drawing.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file, wanted a folder")
    check_writable(folder)
    return folder
