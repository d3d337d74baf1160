"""What the sections of a run's settings share: strictness, and the types of more than one of them."""

from __future__ import annotations

import os
import unicodedata
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from ppcoat.config.flags import built_in_model
from ppcoat.errors import check_whole

# YAML gives lists and frozen models hold tuples: the one place where a value may change its type
Strings = Annotated[tuple[str, ...], Strict(False)]
# one latent token covers 16 x 16 pixels (8 by the VAE, 2 by patchify)
Pixels = Annotated[int, Field(ge=16, le=8192, multiple_of=16)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_CONTROLS = {"\n": "a line end", "\t": "a tab", "\r": "a carriage return", "\b": "a backspace",
             "\a": "a bell", "\f": "a form feed", "\v": "a vertical tab"}  # fmt: skip


def _path(value: str) -> str:
    """~ stands for the home folder. Raises ValueError for control characters, which no path of a user has."""
    marks = dict.fromkeys(mark for mark in value if unicodedata.category(mark) in ("Cc", "Zl", "Zp"))
    if marks:
        found = " and ".join(_CONTROLS.get(mark, "a control character") for mark in marks)
        raise ValueError(
            f"came {value!r}, in which a backslash in double quotes has become {found}; write the path with "
            "forward slashes or in single quotes"
        )
    return os.path.expanduser(value)


PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
# a model's folder or file; tiny_flux: the built-in one
ModelText = Annotated[PathText, AfterValidator(built_in_model)]
_SOME = BeforeValidator(lambda value: [] if value is None else [value] if isinstance(value, str) else value)
# one path, or a list of several; null: none
PathTexts = Annotated[tuple[PathText, ...], Strict(False), _SOME]
_ModelTexts = Annotated[tuple[ModelText, ...], Strict(False), _SOME]


class Section(BaseModel):
    """What all sections share: frozen, unknown keys refused, no silent conversion, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked_trigger_word(value: str | None) -> str | None:
    check_whole("the word", value)
    if value is not None and (not value.strip() or value != " ".join(value.split())):
        raise ValueError("the trigger word must not be blank or have extra spaces; leave it out for none")
    if value is not None and ("[trigger]" in value or "[name]" in value):
        raise ValueError("the trigger word must not hold [trigger] or [name], which it replaces")
    return value


# Where the components of a model are that its file lacks.
TextEncoderPlaces = Annotated[
    _ModelTexts,
    Field(description="CLIP and T5 that a FLUX file lacks: a FLUX folder, or a file for each"),
]
VAEPlace = Annotated[
    ModelText | None,
    Field(description="autoencoder that a FLUX file lacks: a FLUX folder, or its file"),
]
TokenizerPlaces = Annotated[
    _ModelTexts,
    Field(description="tokenizers, if they are in none of these: a FLUX folder, or a folder for each"),
]
BaseFormat = Literal["fp8", "int8", "nf4", "fp4"]
# Names that ai-toolkit, diffusers and OneTrainer have, in small letters without underscores.
_BASE_NAMES: dict[str, BaseFormat] = {
    **dict.fromkeys(("float8", "qfloat8", "float8e4m3fn"), "fp8"),
    **{"qint8": "int8", "nfloat4": "nf4"},
}


def base_format(name: str) -> BaseFormat | None:
    """The format of base weights that is called so here or in another program; None for an unknown name."""
    plain = name.lower().replace("_", "")
    return plain if plain in get_args(BaseFormat) else _BASE_NAMES.get(plain)


def _quantize(value: object) -> object:
    """true is fp8; capitals and underscores do not matter; a flag's false comes as text."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), base_format(value) or value)
    return "fp8" if value is True else value


Quantize = Annotated[
    Literal[False, "fp8", "int8", "nf4", "fp4"],
    BeforeValidator(_quantize),
    Field(
        description="store the frozen Linears in fp8 (true; 8 bits a weight), int8 (8.25), nf4 (4.13) or fp4 "
        "(4.5); their errors: docs/accuracy.md"
    ),
]
