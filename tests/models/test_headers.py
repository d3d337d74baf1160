"""Damaged headers of safetensors files: each is refused in one line, before anything is mapped."""

import json

import numpy as np
import pytest
from model_mutations import HEADERS, damaged_file
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.models.headers import read_entries
from ppcoat.models.tensor_files import map_tensor, read_header

REFUSED_HERE = ("a name twice", "an empty name", "a name with NUL", "a name with a line break",
                "a name of 10^6 letters", "a shape of nothing", "a shape of 1000 axes")  # fmt: skip


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (4, 4), "b.weight": (4, 4), "c": (3,), "d": ()}
    tensors = {name: rng.standard_normal(shape, "float32") for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_what_lies_where_is_as_the_library_reads_it(file):
    save_file({"x": np.arange(6, dtype="int64"), "none": np.zeros([0, 5], "float16")} | load_file(file), file)
    infos, wanted = read_header(file), load_file(file)
    assert infos.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(map_tensor(infos[name]), values)


@pytest.mark.parametrize("kind", sorted(HEADERS.keys() - {"10^5 tensors without bytes"}))
def test_a_damaged_header_is_refused_where_the_library_refuses_it(file, kind):
    """And in more cases: a name that stands twice or is too long, sides beyond any file."""
    next(each for each in damaged_file(file) if each.name.endswith(f"header, {kind}")).mutate(file)
    try:
        load_file(file)
        whole = True
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError):
        whole = False
    try:
        read_entries(file)
        read = True
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 600
        read = False
    assert whole or not read
    if whole and not read:
        assert kind in REFUSED_HERE


def test_more_tensors_than_any_model_has_are_refused(file):
    header = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20001)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ConfigError, match="20001 tensors, wanted at most 20000"):
        read_entries(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F128"}, "a.weight: dtype came F128, wanted one of F64"),
        ({"shape": [4, -4]}, r"a.weight: shape came \[4, -4\], wanted whole numbers from 0"),
        ({"shape": [True, 16]}, r"shape came \[True, 16\]"),
        ({"data_offsets": [0, 60]}, r"a.weight has 60 bytes, which are not those of F32 \[4, 4\]"),
        ({"data_offsets": [4, 68]}, "a.weight begins at byte|b.weight begins at byte"),
        ({"data_offsets": [0]}, r"data_offsets came \[0\], wanted two whole numbers"),
    ],
)
def test_what_is_wrong_is_named(file, change, said):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a.weight"] |= change
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ConfigError, match=said):
        read_entries(file)
