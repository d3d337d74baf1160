"""Torch checkpoints: the tensors of a real one, and that nothing in a bad one runs."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppcoat.errors import ConfigError
from ppcoat.models.loading import read_tensors
from ppcoat.models.newbie.convert import tensor_infos_of_pth

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
REAL = FOLDER / "raw" / "consolidated.00-of-01.pth"


def archive(file, program, data=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as opened:
        opened.writestr("archive/data.pkl", program)
        for key, content in (data or {}).items():
            opened.writestr(f"archive/data/{key}", content)
    return file


class Global:
    """Pickled as a bare name, which need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Writer(pickle._Pickler):
    """What torch.save writes for `Tensor` entries."""

    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        else:
            super().save(value, save_persistent_id)


class Storage:
    def __init__(self, kind, key, count):
        self.identity = ("storage", Global("torch", kind), key, "cpu", count)


class Tensor:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return _rebuild, self.arguments


def _rebuild(*_):
    raise AssertionError("called while reading")


def program(content):
    buffer = io.BytesIO()
    Writer(buffer, 2).dump(content)
    module = __name__.encode()
    return buffer.getvalue().replace(b"c" + module + b"\n_rebuild\n", b"ctorch._utils\n_rebuild_tensor_v2\n")


def floats(kind="FloatStorage", offset=0, shape=(2, 2), strides=(2, 1)):
    """A checkpoint of one tensor in a storage of four numbers."""
    return program({"a": Tensor(Storage(kind, "0", 4), offset, shape, strides)})


def test_a_checkpoint_of_torch_has_the_tensors_of_the_converted_folder():
    want = load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    infos = tensor_infos_of_pth(REAL)
    assert infos.keys() == want.keys()
    for name, tensor in read_tensors(infos, set()):
        np.testing.assert_array_equal(tensor.numpy(), want[name], err_msg=name)


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: {"step": 3, "model": d}, lambda d: {"state_dict": d}]
)
def test_dtypes_offsets_and_wrapping(tmp_path, wrap):
    values = np.arange(12, dtype=np.float16)
    content = {
        "a": Tensor(Storage("HalfStorage", "0", 12), 4, (2, 3), (3, 1), False, {}),
        "b": Tensor(Storage("LongStorage", "1", 1), 0, (), (), False, {}),
    }
    file = archive(
        tmp_path / "x.pth", program(wrap(content)), {"0": values.tobytes(), "1": struct.pack("<q", 7)}
    )
    found = dict(read_tensors(tensor_infos_of_pth(file), set()))
    np.testing.assert_array_equal(found["a"].numpy(), values[4:10].reshape(2, 3))
    assert found["b"].item() == 7


class Canary:
    """Run by any real unpickler."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["key", "beside"])
def test_nothing_in_a_checkpoint_runs(tmp_path, protocol, where):
    canary = tmp_path / "canary"
    for number, call in enumerate([
        (os.system, (f"touch {canary}",)),
        (eval, (f"open({str(canary)!r}, 'w').close()",)),
        (getattr, (os, "getcwd")),
    ]):  # fmt: skip
        bad = Canary(call)
        content = {"model": bad} if where == "key" else {"a": bad, "b": [1]}
        try:
            text = pickle.dumps(content, protocol)
        except TypeError:  # a module as an argument cannot be pickled
            continue
        file = archive(tmp_path / f"{number}.pth", text)
        with pytest.raises(ConfigError, match=r"no tensor; nothing was run"):
            tensor_infos_of_pth(file)
        assert not canary.exists()
        if call[0] is os.system:  # the canary itself works
            pickle.loads(text)
            assert canary.exists()
            canary.unlink()


@pytest.mark.parametrize(
    ("write", "part"),
    [
        (lambda file: file.write_bytes(pickle.dumps({})), "cannot be read"),
        (lambda file: archive(file, b"\x80\x02}q\x00."), "no dict of tensors"),
        (lambda file: archive(file, b"\x80\x02}q\x00"), "damaged|does not end"),
        (lambda file: archive(file, b"\x80\x02(i__main__\nx\n."), "wants INST"),
        (lambda file: archive(file, floats(strides=(1, 2)), {"0": bytes(16)}), "strides"),
        (lambda file: archive(file, floats(offset=1), {"0": bytes(16)}), "lacks the bytes"),
        (lambda file: archive(file, floats(), {"0": bytes(16)}, zipfile.ZIP_DEFLATED), "is packed"),
        (lambda file: archive(file, floats("QUInt8Storage")), "no tensor"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, write, part):
    file = tmp_path / "x.pth"
    write(file)
    with pytest.raises(ConfigError, match=part):
        tensor_infos_of_pth(file)


OPEN, CLOSE = b"\x80\x02}X\x01\x00\x00\x00a", b"s."  # {"a": ...}
FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04t"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00truetR", "'os system', which is no tensor; nothing was run"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "'builtins eval', which is no tensor"),
        (b"ccollections\nOrderedDict\n)Rcos\nsystem\nb", "'os system'"),
        (b"cos\nsystem\nQ", "'os system'"),
        (b"X\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R", "not callable"),  # calls a text
        (b"ctorch\nFloatStorage\n)R", "not callable"),
        (FLOATS[:-1] + b"t" + b"QQ", "storage of another kind|damaged"),  # the identity is a storage
        (
            b"(X\x07\x00\x00\x00storage" + FLOATS + b"QX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ",
            "storage of",
        ),
        (
            b"(X\x07\x00\x00\x00storageX\x0c\x00\x00\x00FloatStorageX\x01\x00\x00\x000K\x00K\x04tQ",
            "storage of",
        ),
        (b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nX\x01\x00\x00\x000tQ", "storage of"),
        (REBUILD + b"(K\x00K\x00))tR", "not a storage"),
        (REBUILD + b"(" + FLOATS + b"QJ\xff\xff\xff\xffK\x02\x85K\x01\x85tR", "not a storage"),  # offset -1
        (REBUILD + b"(" + FLOATS + b"QK\x00X\x01\x00\x00\x00a\x85K\x01\x85tR", "not a storage"),
        (REBUILD + b"(" + FLOATS + b"QK\x00K\x02K\x02\x86K\x01\x85tR", "not a storage"),  # 2 sides, 1 stride
        (REBUILD + b"(K\x00tR", "damaged"),
        # attributes for what the names stand for
        (REBUILD + b"}X\x08\x00\x00\x00functionK\x00sb", "damaged"),
        (REBUILD + b"N}X\x08\x00\x00\x00functionK\x00s\x86b", "damaged"),
        (b"ctorch\nFloatStorage\nN}X\x05\x00\x00\x00dtypeX\x03\x00\x00\x00F64s\x86b", "damaged"),
        # claims without substance
        (b"\x8d" + b"\xff" * 7 + b"\x7fx", "damaged"),
        (b"\x8d" + (2**40).to_bytes(8, "little") + b"x", "damaged"),
        (b"X\xff\xff\xff\x7fx", "damaged"),
        (b"K\x00r\xff\xff\xff\xff", "not of plain tensors"),  # a place in the memo that would take 64 GB
        (b"j\xff\xff\xff\xff", "damaged"),
        (b"\x8a\xff" + b"\x01" * 255 + b"\x96" + b"\xff" * 8, "wants BYTEARRAY8|damaged"),
        (b"\x96" + (2**40).to_bytes(8, "little"), "wants BYTEARRAY8|damaged"),
        (b")" + b"\x85" * 400_000 + b"K\x00s}", "not of plain tensors"),  # its hash would end the process
        (b"cos\n", "damaged"),
        (b"\x95" + b"\xff" * 8 + b"K\x00", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused_by_name(tmp_path, value, part):
    file = archive(tmp_path / "x.pth", OPEN + value + CLOSE, {"0": bytes(16)})
    with pytest.raises(ConfigError, match=part):
        tensor_infos_of_pth(file)
    assert tensor_infos_of_pth(archive(file, floats(), {"0": bytes(16)})).keys() == {"a"}  # as before


@pytest.mark.parametrize(
    "opened", [b"]" + b"]" * 150_000 + b"a" * 150_000, b"}" + b"K\x00}" * 150_000 + b"s" * 150_000]
)
def test_deep_nesting_beside_the_tensors_is_harmless(tmp_path, opened):
    inner = REBUILD + b"(" + FLOATS + b"QK\x00K\x02K\x02\x86K\x02K\x01\x86tR"
    program = OPEN + inner + b"sX\x01\x00\x00\x00b" + opened + CLOSE
    file = archive(tmp_path / "x.pth", program, {"0": bytes(16)})
    assert tensor_infos_of_pth(file)["a"].shape == [2, 2]


def test_a_dtype_that_the_bytes_do_not_hold_is_refused(tmp_path):
    for kind, part in (("DoubleStorage", "lacks the bytes"), ("ComplexFloatStorage", "no tensor")):
        file = archive(tmp_path / f"{kind}.pth", floats(kind), {"0": bytes(16)})
        with pytest.raises(ConfigError, match=part):
            tensor_infos_of_pth(file)


def test_a_state_dict_with_metadata_and_parameters_is_read(tmp_path):
    tensor = REBUILD + b"(" + FLOATS + b"QK\x00K\x02K\x02\x86K\x02K\x01\x86tR"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88ccollections\nOrderedDict\n)RtR"
    program = (
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00a" + parameter
        + b"u}X\x09\x00\x00\x00_metadata}sb."
    )  # fmt: skip
    infos = tensor_infos_of_pth(archive(tmp_path / "x.pth", program, {"0": bytes(16)}))
    assert {name: info.shape for name, info in infos.items()} == {"a": [2, 2]}


def test_a_cut_off_checkpoint_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(REAL.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match="cannot be read"):
        tensor_infos_of_pth(file)


def test_a_pickle_that_is_packed_or_very_long_is_not_unpacked(tmp_path):
    file = archive(tmp_path / "x.pth", floats(), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match="its data.pkl of .* bytes is packed"):
        tensor_infos_of_pth(file)
    with pytest.raises(ConfigError, match="is not of plain tensors; not read"):
        tensor_infos_of_pth(archive(file, OPEN + b"N" * 700_000 + CLOSE))
