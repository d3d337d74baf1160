"""The store: every bit comes back, a reader never sees half an entry, damage is a miss and not a crash."""

import hashlib
import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import paddle
import pytest
import safetensors.paddle

from ppcoat import reading
from ppcoat.data import content_keys
from ppcoat.data.content_keys import content_key, file_digest
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.errors import ConfigError

KEY = content_key("a caption")
CONTEXT = multiprocessing.get_context("fork")  # a fork has Paddle imported already


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path / "cache folder 缓存")


def write_for_a_while(folder, number, seconds):
    store, end = EmbeddingStore(folder), time.time() + seconds
    while time.time() < end:
        store.put(KEY, {"x": paddle.full([20000], number), "n": paddle.full([3], number)})


def put_and_be_killed(folder, moment):
    store = EmbeddingStore(folder)
    setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    store.put(KEY, {"x": paddle.zeros([4])})


def entry(store):
    return store.folder / KEY[:2] / f"{KEY}.safetensors"


def test_every_bit_of_every_dtype_comes_back(store):
    bits = np.arange(256, dtype=np.uint8)
    bits = bits[bits & 0x7F < 0x78]  # 240 codes, finite in each dtype
    wide = np.random.default_rng(0).integers(0, 1 << 16, 300).astype(np.uint16)
    wide = wide[wide & 0x7FFF < 0x7C00][:240]
    tensors = {
        "e4m3": paddle.to_tensor(bits).view("float8_e4m3fn").reshape([16, 15]),
        "e5m2": paddle.to_tensor(bits).view("float8_e5m2"),
        "bf16": paddle.to_tensor(wide.view(np.int16)).view("bfloat16"),
        "fp16": paddle.to_tensor(wide.view(np.float16)),
        "fp32": paddle.to_tensor(np.array([[-3e38, -0.0], [1e-45, 3e38]], np.float32)),
        "strided": paddle.to_tensor(np.arange(12, dtype=np.int64).reshape(3, 4)).t(),
        "scalar": paddle.to_tensor(3, dtype="int32"),
        "empty": paddle.zeros([0, 3]),
        "trained": paddle.create_parameter([2], "float32"),
    }
    store.put(KEY, tensors)
    loaded = EmbeddingStore(store.folder).get(KEY)
    _ = [paddle.ones([300, 16]) for _ in range(100)]  # memory that the loaded tensors do not own is reused
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert loaded[name].stop_gradient
    for name, width in [("e4m3", "uint8"), ("e5m2", "uint8"), ("bf16", "int16"), ("fp32", "int32")]:
        np.testing.assert_array_equal(loaded[name].view(width).numpy(), tensors[name].view(width).numpy())
    np.testing.assert_array_equal(loaded["fp16"].numpy().view(np.uint16), wide)
    np.testing.assert_array_equal(loaded["strided"].numpy(), np.arange(12).reshape(3, 4).T)
    assert loaded["scalar"].item() == 3


def test_an_entry_is_absent_until_it_is_put_and_the_last_put_counts(store):
    assert store.get(KEY) is None
    for value in (1.0, 2.0):
        store.put(KEY, {"x": paddle.full([2], value)})
        np.testing.assert_array_equal(store.get(KEY)["x"].numpy(), [value, value])
    assert store.get(content_key("another")) is None
    assert [p.name for p in store.folder.rglob("*") if p.is_file()] == [f"{KEY}.safetensors"]


def test_keys_differ_whenever_the_parts_do():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), (b"ab", "c"), (1,), ("1",), (12, 3), (1, 23),
             (), ("",), ("|str:1:a",), ("a", "|str:0:"), ("\udcff",), ("a\0b",)]  # fmt: skip
    assert len({content_key(*part) for part in parts}) == len(parts)
    assert content_key("ab", "c") == content_key("ab", "c")
    # The format of the key, written out: a change of it must be a decision, since it voids every cache.
    assert content_key("ü", 7) == hashlib.sha256(b"ppcoat-embedding-1|str:2:\xc3\xbc|int:1:7").hexdigest()


def test_file_digest_is_the_sha256_of_the_bytes(tmp_path):
    content = np.random.default_rng(0).bytes((1 << 20) + 17)
    (tmp_path / "a.png").write_bytes(content)
    assert file_digest(tmp_path / "a.png") == hashlib.sha256(content).hexdigest()
    with pytest.raises(ConfigError, match=r"gone\.png: cannot be read"):
        file_digest(tmp_path / "gone.png")


def test_a_file_is_read_once_while_it_stays_and_is_no_longer_young(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(b"a")
    known = file_digest(file)
    file.write_bytes(b"b")
    assert file_digest(file) != known  # of the same size, perhaps within one tick of the file system's clock
    monkeypatch.setattr(reading, "_YOUNG", -(10**12))
    hits = content_keys._digest.cache_info().hits
    known = [file_digest(file), file_digest(str(file))]
    assert known[0] == known[1] and content_keys._digest.cache_info().hits == hits + 1
    file.write_bytes(b"c")
    os.utime(file, (1, 1))
    assert file_digest(file) != known[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: b"a text file of somebody else\n" * 9,
        lambda content: safetensors.paddle.save({"x": paddle.zeros([8])}),
        lambda content: b"\x02\0\0\0\0\0\0\0[]",
    ],
)
def test_a_damaged_or_foreign_file_is_a_miss_with_one_warning_and_is_replaced(store, damage, caplog):
    store.put(KEY, {"x": paddle.zeros([8])})
    entry(store).write_bytes(damage(entry(store).read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
    assert len(caplog.records) == 1 and KEY in caplog.text and "made anew" in caplog.text
    store.put(KEY, {"x": paddle.ones([8])})
    assert store.get(KEY)["x"].sum().item() == 8


def test_the_entry_of_another_key_is_not_taken(store, caplog):
    other = content_key("other")
    store.put(KEY, {"x": paddle.zeros([8])})
    store.put(other, {"x": paddle.ones([8])})
    entry(store).write_bytes((store.folder / other[:2] / f"{other}.safetensors").read_bytes())
    assert store.get(KEY) is None
    assert "another entry" in caplog.text


def test_an_entry_of_a_broken_encoder_is_made_anew(store, caplog):
    store.put(KEY, {"x": paddle.to_tensor([1.0, float("nan")]).astype("bfloat16")})
    assert store.get(KEY) is None and "its x holds NaN or infinity" in caplog.text


def test_a_reader_beside_two_writers_of_one_key_sees_whole_entries_only(store, caplog):
    writers = [CONTEXT.Process(target=write_for_a_while, args=(store.folder, n, 1.0)) for n in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    seen, end = set(), time.time() + 30
    while any(writer.is_alive() for writer in writers) and time.time() < end:
        tensors = store.get(KEY)
        if tensors is not None:
            values = {float(v) for t in tensors.values() for v in (t.min(), t.max())}
            assert len(values) == 1
            seen |= values
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == {1.0, 2.0}
    assert not caplog.records and not list(store.folder.rglob("*.tmp-*"))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_writer_killed_in_the_middle_leaves_the_old_entry_and_its_draft_is_removed(store, moment):
    store.put(KEY, {"x": paddle.ones([4])})
    killed = CONTEXT.Process(target=put_and_be_killed, args=(store.folder, moment))
    killed.start()
    killed.join(timeout=30)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(store.folder.rglob("*.tmp-*"))) == 1
    assert store.get(KEY)["x"].sum().item() == 4
    EmbeddingStore(store.folder)
    assert not list(store.folder.rglob("*.tmp-*"))
    assert store.get(KEY)["x"].sum().item() == 4


def test_drafts_of_the_living_stay_and_those_of_other_machines_for_a_day(store):
    folder = store.folder / KEY[:2]
    folder.mkdir()
    host = os.uname().nodename.translate({ord(c): None for c in "-._"})
    drafts = [folder / f"{KEY}.tmp-{host}-{os.getppid()}", folder / f"{KEY}.tmp-elsewhere-999999999"]
    foreign = folder / "notes.tmp-1"
    for path in (*drafts, foreign):
        path.write_bytes(b"x")
    EmbeddingStore(store.folder)
    assert all(path.exists() for path in (*drafts, foreign))
    for path in (*drafts, foreign):
        os.utime(path, (0, time.time() - 25 * 3600))
    EmbeddingStore(store.folder)
    assert [path.exists() for path in (*drafts, foreign)] == [True, False, True]


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cache folder .*file"):
        EmbeddingStore(file)
    with pytest.raises(ConfigError, match=r"cache folder /proc/nothing"):
        EmbeddingStore("/proc/nothing")


def test_a_full_disk_leaves_the_old_entry_and_no_draft(store, monkeypatch):
    store.put(KEY, {"x": paddle.ones([4])})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(KEY, {"x": paddle.zeros([4])})
    assert store.get(KEY)["x"].sum().item() == 4
    assert not list(store.folder.rglob("*.tmp-*"))
