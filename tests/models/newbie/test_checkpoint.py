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
        (lambda file: archive(file, floats(), {"0": bytes(16)}, zipfile.ZIP_DEFLATED), "lacks the bytes"),
        (lambda file: archive(file, floats("QUInt8Storage")), "no tensor"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, write, part):
    file = tmp_path / "x.pth"
    write(file)
    with pytest.raises(ConfigError, match=part):
        tensor_infos_of_pth(file)


def test_a_cut_off_checkpoint_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(REAL.read_bytes()[:100_000])
    with pytest.raises(ConfigError, match="cannot be read"):
        tensor_infos_of_pth(file)
