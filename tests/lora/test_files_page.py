"""docs/files.md's table of kinds is what the code does, row by row: from which programs each kind is read,
and what is done with it then."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.lora import merge_lora, put_adapters, read_fitting, read_lora_file, remove_lora, write_lora_file
from ppcoat.lora.writing import FORMATS
from ppcoat.models.loading import load_transformer, parameter_shapes

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
BASE, FOLDER, PAGE = FIXTURES / "tiny_flux_fp32", FIXTURES / "adapters", ROOT / "docs" / "files.md"
PATH, BFL = "transformer_blocks.1.attn.to_out.0", "double_blocks.1.img_attn.proj"  # one module, 64 -> 64
STEMS = {  # program -> its name of that module
    "diffusers": f"transformer.{PATH}",
    "PEFT": f"base_model.model.{PATH}",
    "kohya": f"lora_unet_{BFL.replace('.', '_')}",
    "ComfyUI": f"diffusion_model.{BFL}",
    "OneTrainer": f"lora_transformer_{PATH.replace('.', '_')}",
    "LyCORIS": f"lycoris_{PATH.replace('.', '_')}",
    "XLabs": "double_blocks.1.processor.proj_lora1",
    "BFL": BFL,
    "Paddle": PATH,
}
NAMES_OF_PAIR = {  # program -> its names of A and B, if they are not lora_A.weight and lora_B.weight
    **dict.fromkeys(("kohya", "OneTrainer", "LyCORIS"), ("lora_down.weight", "lora_up.weight")),
    "XLabs": ("down.weight", "up.weight"),
    "Paddle": ("lora_A", "lora_B"),
}
CLIP = "text_model.encoder.layers.0.mlp.fc1"
STEMS_OF_CLIP = {
    "diffusers": f"text_encoder.{CLIP}",
    "PEFT": f"base_model.model.text_encoder.{CLIP}",
    "kohya": f"lora_te1_{CLIP.replace('.', '_')}",
    "ComfyUI": f"text_encoders.clip_l.transformer.{CLIP}",
    "OneTrainer": f"lora_te1_{CLIP.replace('.', '_')}",
    "Paddle": f"text_encoder.{CLIP}",
}
CONTROL = {"diffusers": "control_diffusers.safetensors", "BFL": "control_bfl.safetensors"}
NORM = {
    "diffusers": "transformer.transformer_blocks.1.attn.norm_q",
    "ComfyUI": "diffusion_model.double_blocks.1.img_attn.norm.query_norm",
    "LyCORIS": "lycoris_transformer_blocks_1_attn_norm_q",
    "BFL": "double_blocks.1.img_attn.norm.query_norm",
}
ALL, LYCORIS, OF_PEFT = tuple(STEMS), ("kohya", "LyCORIS"), ("diffusers", "PEFT")


class Row(NamedTuple):
    """tensors by role, of the module that `stems` name, or the names of fixtures by program; written by these
    programs; network.type of what is trained; peft_type of the config beside a file of PEFT's."""

    tensors: dict
    programs: tuple = LYCORIS
    network: str | None = None
    stems: dict = STEMS
    config: str = ""


RNG = np.random.default_rng(0)
PAIR = {
    "lora_A.weight": RNG.standard_normal([4, 64], "float32"),
    "lora_B.weight": RNG.standard_normal([64, 4], "float32"),
}
LENGTHS, VALUES = np.linspace(0.5, 2, 64, dtype="float32"), RNG.standard_normal([64, 64], "float32")
OF_CLIP = {"lora_A.weight": VALUES[:2, :32], "lora_B.weight": VALUES[:, :2]}
BLOCKS = VALUES.reshape([8, 8, 64])[..., :8].copy()
TWO_PAIRS = {f"hada_w{i}_{side}": PAIR[f"lora_{end}.weight"] for i in (1, 2) for side, end in ("aB", "bA")}
FOUR_FACTORS = {"a1.weight": PAIR["lora_B.weight"], "a2.weight": PAIR["lora_A.weight"],
                "b1.weight": PAIR["lora_B.weight"], "b2.weight": PAIR["lora_A.weight"]}  # fmt: skip
HEAD = np.linspace(0.5, 1.5, 32, dtype="float32")


ROWS = {
    "LoRA (any rank, alpha, rsLoRA)": Row(PAIR, ALL, "lora"),
    "LoRA of CLIP and T5": Row(OF_CLIP, tuple(STEMS_OF_CLIP), None, STEMS_OF_CLIP),
    "bias of a LoRA (`lora_bias`)": Row(PAIR | {"lora_B.bias": LENGTHS}, (*OF_PEFT, "BFL")),
    'whole bias (PEFT\'s `bias="lora_only"`)': Row(PAIR | {"base_layer.bias": LENGTHS}, OF_PEFT),
    "DoRA, PEFT's rule": Row(PAIR | {"lora_magnitude_vector": LENGTHS}, OF_PEFT, "dora"),
    "DoRA, LyCORIS' rule": Row(PAIR | {"dora_scale": LENGTHS[:, None]}, ("diffusers", *LYCORIS)),
    "DoRA, OneTrainer's rule": Row(PAIR | {"dora_scale": LENGTHS[:, None]}, ("OneTrainer",)),
    "DoRA, ComfyUI's rule": Row(PAIR | {"dora_scale": LENGTHS[:, None]}, ("ComfyUI",)),
    "LoKr": Row({"lokr_w1": BLOCKS[0], "lokr_w2": BLOCKS[1]},
                ("diffusers", "PEFT", "ComfyUI", "OneTrainer", *LYCORIS), "lokr"),
    "LoHa": Row(TWO_PAIRS, ("PEFT", "OneTrainer", *LYCORIS)),
    "OFT": Row({"oft_blocks": BLOCKS}),
    "BOFT": Row({"oft_blocks": np.stack([BLOCKS] * 3)}, ("LyCORIS",)),
    "OFT of PEFT": Row({"oft_R.weight": VALUES[:8, :28] / 4}, ("PEFT",), config="OFT"),
    "BOFT of PEFT": Row({"boft_R": BLOCKS[None] / 4, "boft_s": LENGTHS[:, None]}, ("PEFT",), config="BOFT"),
    "GLoRA": Row(FOUR_FACTORS, ("LyCORIS",)),
    "IA3": Row({"weight": LENGTHS, "on_input": np.float32(0)}, ("LyCORIS",)),
    "difference (`diff`, `diff_b`)": Row({"diff": VALUES, "diff_b": LENGTHS}, ("ComfyUI", *LYCORIS)),
    "difference of a norm (`w_norm`)": Row({"w_norm": HEAD}, ("ComfyUI", "LyCORIS"), None, NORM),
    "whole norm": Row({"weight": HEAD}, ("diffusers", "BFL"), None, NORM),
    "control LoRA (Canny, Depth)": Row(CONTROL, tuple(CONTROL)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_transformer(BASE / "transformer", "float32")


@pytest.fixture(scope="module")
def shapes():
    return parameter_shapes(BASE, "transformer", "text_encoder", "text_encoder_2")


def written_by(program, row, folder):
    """The file of a kind under the names of a program."""
    if row.tensors is CONTROL:
        return FOLDER / CONTROL[program]
    tensors = {}
    for role, values in row.tensors.items():
        pair = ("lora_A.weight", "lora_B.weight")
        if role in pair:
            role = NAMES_OF_PAIR.get(program, pair)[pair.index(role)]
            values = values.T if program == "Paddle" else values
        tensors[f"{row.stems[program]}.{role}"] = np.ascontiguousarray(values)
    folder = folder / program
    folder.mkdir()
    header = {"format": "pd" if program == "Paddle" else "pt"}
    save_file(tensors, folder / "adapter_model.safetensors", header)
    if row.config:
        config = {"peft_type": row.config, "oft_block_size": 8}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(source, shapes):
    """{parameter: what is added to a weight of random numbers at strength 0.5}."""
    found, rng = {}, np.random.default_rng(1)
    for change in read_fitting(source, shapes).changes:
        path = change.paths[0]
        if len(change.paths) > 1:  # a bias of a fused module
            continue
        size = [had if own is None else own for own, had in zip(change.kind.shape, (64, 64), strict=False)]
        weight = rng.standard_normal(size).astype("float32")
        found[change.part, path, change.parameter] = change.deltas([weight], 0.5)[0]
    return found


def done(action):
    """ "yes", or "refused" where ConfigError is raised."""
    try:
        action()
    except ConfigError as error:
        assert "\n" not in str(error)
        return "refused"
    return "yes"


def trained(network):
    """The families of models in which a config may ask for this network.type."""
    found = []
    for family, name in {"flux": "FLUX", "newbie": "NewBie"}.items() if network else ():
        try:
            RunConfig.model_validate(
                {
                    "name": "x",
                    "model": {"name_or_path": "m", "family": family},
                    "datasets": [{"folder_path": "d"}],
                    "network": {"type": network},
                }
            )
        except ValidationError:
            continue
        found.append(name)
    return ", ".join(found) or "no"


def row_of(kind, model, shapes, folder):
    row = ROWS[kind]
    files = {program: written_by(program, row, folder) for program in row.programs}
    first, *others = (deltas(file, shapes) for file in files.values())
    assert first and any(value.any() for value in first.values())
    for other in others if row.tensors is not CONTROL else ():  # the same from every program
        assert other.keys() == first.keys()
        for key, value in first.items():
            np.testing.assert_allclose(other[key], value, atol=1e-6)
    file, embedder = next(iter(files.values())), model.x_embedder
    lora = read_lora_file(file)

    def put(strength):
        put_adapters({"transformer": model}, [(read_fitting(file, shapes), strength)])

    drawn, merged = done(partial(put, 1.0)), done(lambda: put(0.0) or merge_lora(model))
    remove_lora(model)
    model.x_embedder = embedder
    model.follow_inputs()
    out = folder / "out.safetensors"
    written = [
        done(partial(write_lora_file, out, lora.modules, {}, each, others=lora.others)) for each in FORMATS
    ]
    programs = "all" if row.programs == ALL else ", ".join(row.programs)
    return f"| {' | '.join([kind, programs, drawn, merged, *written, trained(row.network)])} |"


@pytest.mark.parametrize("kind", ROWS)
def test_the_table_says_what_is_done(model, shapes, tmp_path, kind):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {kind} |")]
    assert rows == [row_of(kind, model, shapes, tmp_path)]


def test_the_table_has_no_other_rows_and_the_formats_in_order():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    converted = " | ".join(f"convert to {each}" for each in FORMATS)
    start = lines.index(f"| kind | read from | draw | merge | {converted} | train |") + 2
    count = next(i for i, line in enumerate([*lines[start:], ""]) if not line.startswith("|"))
    assert count == len(ROWS)
