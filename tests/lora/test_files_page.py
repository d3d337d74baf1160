"""docs/files.md's table of kinds is what the code does, row by row."""

from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.lora import merge_lora, put_adapters, read_fitting, read_lora_file, remove_lora, write_lora_file
from ppcoat.lora.writing import FORMATS
from ppcoat.models.loading import load_transformer, parameter_shapes

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
BASE, FOLDER, PAGE = FIXTURES / "tiny_flux_fp32", FIXTURES / "adapters", ROOT / "docs" / "files.md"
# Row -> a file of that kind, and network.type of what is trained.
KINDS = {
    "LoRA (any rank, alpha, rsLoRA)": ("split_kohya", "lora"),
    "LoRA of CLIP and T5": ("dense_kohya", None),
    "bias of a LoRA (`lora_bias`)": ("lora_bias", None),
    'whole bias (PEFT\'s `bias="lora_only"`)': ("bias_lora_only", None),
    "DoRA, PEFT's rule": ("dora", "dora"),
    "DoRA, LyCORIS' rule": ("dora_out", None),
    "LoKr": ("lokr_unbalanced", "lokr"),
    "LoHa": ("loha", None),
    "OFT": ("oft", None),
    "BOFT": ("boft", None),
    "GLoRA": ("glora", None),
    "IA3": ("ia3", None),
    "difference (`diff`, `diff_b`)": ("full", None),
    "Control LoRA (Canny, Depth), norms": ("control_bfl", None),
}
STEMS = ("lora_unet_double_blocks_1_img_attn_proj", "lora_unet_double_blocks_0_txt_attn_proj")


@pytest.fixture(scope="module")
def model():
    return load_transformer(BASE / "transformer", "float32")


def on_bfls_modules(name, folder):
    """A file with the 64 x 64 modules of LyCORIS' file, under names of BFL's that are not fused."""
    modules = {}
    for key, value in load_file(FOLDER / f"{name}.safetensors").items():
        stem, _, role = key.partition(".")
        if not stem.endswith(("proj_out", "proj_mlp")):
            modules.setdefault(stem, {})[role] = value
    tensors = {
        f"{new}.{role}": value
        for new, own in zip(STEMS, modules.values(), strict=False)
        for role, value in own.items()
    }
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def of_one_module(file, part, folder):
    """What a file has of a module that Black Forest Labs have, too; its others are parts of fused ones."""
    tensors = {key: value for key, value in load_file(file).items() if f".{part}." in key}
    save_file(tensors, folder / file.name)
    return folder / file.name


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


def row_of(kind, model, folder):
    name, network = KINDS[kind]
    file = FOLDER / f"{name}.safetensors"
    if next(iter(load_file(file))).startswith("lycoris_"):
        file = on_bfls_modules(name, folder)
    if name == "dora":
        file = of_one_module(file, "to_out.0", folder)
    lora = read_lora_file(file)
    shapes = parameter_shapes(BASE, "transformer", "text_encoder", "text_encoder_2")

    def put():
        put_adapters({"transformer": model}, [(read_fitting(file, shapes), 1.0)])
        remove_lora(model)

    def merge():
        put_adapters({"transformer": model}, [(read_fitting(file, shapes), 0.0)])
        merge_lora(model)

    drawn, merged = done(put), done(merge)
    out = folder / "out.safetensors"
    written = [
        done(partial(write_lora_file, out, lora.modules, {}, each, others=lora.others)) for each in FORMATS
    ]
    return f"| {' | '.join([kind, drawn, merged, *written, trained(network)])} |"


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_says_what_is_done(model, tmp_path, kind):
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {kind} |")]
    assert rows == [row_of(kind, model, tmp_path)]


def test_the_table_has_no_other_rows_and_the_formats_in_order():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    head = f"| kind | draw | merge | {' | '.join(f'convert to {each}' for each in FORMATS)} | train |"
    start = lines.index(head) + 2
    count = next(i for i, line in enumerate([*lines[start:], ""]) if not line.startswith("|"))
    assert count == len(KINDS)
