"""LAION shards: found columns, captions that are only read, rows that are skipped and counted."""

import base64
import io
import json
import random

import pytest
from PIL import Image

from ppcoat.data.laion import DONE, LaionSource, unpack_laion
from ppcoat.data.sources import scan_folder
from ppcoat.errors import ConfigError


def picture(seed=0, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (seed * 40 % 256, 90, 10)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def row(seed, caption=None, image=None):
    caption = json.dumps({"caption": f"a {seed} dress", "score": 5.0}) if caption is None else caption
    return f"{seed}\thttp://x/{seed}.jpg\t{caption}\t{picture(seed) if image is None else image}\tend"


@pytest.fixture
def write(tmp_path):
    """write(rows of one shard, ...) -> LaionSource settings of a data set in tmp_path."""

    def write(*shards, **settings):
        root = tmp_path / "laion-45w"
        root.mkdir(exist_ok=True)
        names = [f"{number:07d}.txt" for number in range(len(shards))]
        for name, rows in zip(names, shards, strict=True):
            content = b"\n".join(each if isinstance(each, bytes) else each.encode() for each in rows)
            (root / name).write_bytes(content + b"\n")
        (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
        return LaionSource(str(root), str(tmp_path / "list.txt"), **settings)

    return write


def captions_in(folder):
    return [item.caption_raw for item in scan_folder(folder).items]


def test_shards_become_a_folder_of_pictures_with_captions(write, tmp_path):
    source = write([row(1), row(2, image=picture(2, "PNG"))], [row(3, image=picture(3, "WebP"))], workers=3)
    done = unpack_laion(source, tmp_path / "out")
    assert (done.pictures, done.bad) == (3, 0)
    assert captions_in(tmp_path / "out") == ["a 1 dress", "a 2 dress", "a 3 dress"]
    names = sorted(path.name for path in (tmp_path / "out").glob("0*"))
    assert names[0] == "00000_0000000.jpg" and names[-1] == "00001_0000000.webp"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_second_run_takes_what_is_there(write, tmp_path):
    source = write([row(1), row(2)])
    first = unpack_laion(source, tmp_path / "out")
    (tmp_path / "out" / "00000_0000000.jpg").touch()
    (tmp_path / "laion-45w" / "0000000.txt").unlink()
    assert unpack_laion(source, tmp_path / "out") == first


@pytest.mark.parametrize("mark", [b"", b"{", b"\xff", b"[1]", b'{"pictures": 1}', b"[" * 5000,
                                  b'{"pictures": "2", "bad": 0, "reasons": []}'])  # fmt: skip
def test_a_folder_with_a_damaged_mark_is_made_anew(write, tmp_path, mark):
    source = write([row(1), row(2)])
    first = unpack_laion(source, tmp_path / "out")
    (tmp_path / "out" / DONE).write_bytes(mark)
    (tmp_path / "out" / "00000_0000001.txt").unlink()
    assert unpack_laion(source, tmp_path / "out") == first
    assert captions_in(tmp_path / "out") == ["a 1 dress", "a 2 dress"]


def test_no_more_is_unpacked_than_asked_for_and_the_key_tells_sets_apart(write, tmp_path):
    some, more = write([row(i) for i in range(9)], limit=4), write([row(i) for i in range(9)], limit=5)
    assert unpack_laion(some, tmp_path / "out").pictures == 4
    assert some.key() != more.key() and len(some.key()) == 12


def test_plain_text_and_other_orders_of_columns_are_found(write, tmp_path):
    rows = [f"{picture(i)}\t0.5\ta plain {i} caption\thttp://x y.jpg" for i in range(3)]
    assert captions_in(unpack_laion(write(rows), tmp_path / "out").folder)[0] == "a plain 0 caption"


def test_given_columns_win(write, tmp_path):
    rows = [f"{picture(0)}\tthe first words\t{picture(i + 1)}\tthe second words" for i in range(2)]
    done = unpack_laion(write(rows, image_column=2, caption_column=3), tmp_path / "out")
    assert captions_in(done.folder)[0] == "the second words"


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').system('touch {canary}')",
        "{{'caption': __import__('os').system('touch {canary}')}}",
        "{{'caption': open('{canary}', 'w').write('x')}}",
        '{{"caption": [].__class__.__base__.__subclasses__()}}',
    ],
)
def test_nothing_in_a_caption_is_run(write, tmp_path, attack):
    canary = tmp_path / "canary"
    rows = [row(i) for i in range(40)] + [row(99, caption=attack.format(canary=canary))]
    done = unpack_laion(write(rows), tmp_path / "out")
    assert not canary.exists()
    assert done.pictures + done.bad == 41 and done.bad == attack.startswith("{")


def test_literals_of_python_are_read_as_the_public_data_may_hold_them(write, tmp_path):
    done = unpack_laion(write([row(1, caption="{'caption': 'it\\'s red', 'nsfw': None}")]), tmp_path / "out")
    assert captions_in(done.folder) == ["it's red"]


BAD = {
    "base64": row(1, image="/9j/!!!"),
    "JPEG, PNG or WebP": row(1, image="R0lGODlh"),
    "cannot be decoded": row(1, image="/9j/" + "A" * 400),
    "no caption": row(1, caption="{}"),
    "neither JSON": row(1, caption='{"caption": '),
    "nested too deep": row(1, caption='{"caption": ' + "[" * 5000),
    "columns": "1\thttp://x",
    "not UTF-8": b"\xff\xfe\x00",
    "longer than": row(1, caption="word " * 20000),
}


def test_bad_rows_are_skipped_counted_and_named_and_good_ones_stay(write, tmp_path, caplog):
    rows = [row(i) for i in range(20)]
    for position, each in enumerate(BAD.values()):
        rows.insert(2 * position + 2, each)
    done = unpack_laion(write(rows, max_bad_share=0.5), tmp_path / "out")
    assert (done.pictures, done.bad) == (20, len(BAD))
    assert len(captions_in(done.folder)) == 20
    assert len(done.reasons) == 5 and "0000000.txt row 3: its base64 is damaged" in done.reasons[0]
    assert "9 rows skipped" in caplog.text


@pytest.mark.parametrize("reason", BAD)
def test_each_bad_row_says_why_and_too_many_stop_the_run(write, tmp_path, reason):
    with pytest.raises(ConfigError, match=f"2 of 5 rows cannot be used, wanted at most 5%.*{reason}"):
        unpack_laion(write([row(0), row(1), row(2), BAD[reason], BAD[reason]]), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp-*"))


def test_one_bad_row_of_a_short_list_is_borne(write, tmp_path):
    done = unpack_laion(write([BAD["base64"], *map(row, range(8))]), tmp_path / "out")
    assert (done.pictures, done.bad) == (8, 1)


def test_a_set_of_bad_rows_is_not_read_to_its_end(write, tmp_path):
    good = [row(i) for i in range(3)]
    with pytest.raises(ConfigError, match="of 200 rows"):
        unpack_laion(write(good + [BAD["base64"]] * 5000), tmp_path / "out")


def test_the_published_way_ends_at_the_first_bad_row(write, tmp_path):
    with pytest.raises(ConfigError, match="1 of 2 rows cannot be used, wanted at most 0%"):
        unpack_laion(write([row(0), BAD["base64"], *map(row, range(99))], stop_at_bad=True), tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/../../secret.txt"])
def test_names_outside_the_data_folder_are_refused(write, tmp_path, name):
    source = write([row(0)])
    (tmp_path / "secret.txt").write_text(row(1))
    (tmp_path / "list.txt").write_text(name + "\n")
    with pytest.raises(ConfigError, match="outside"):
        source.shards()


def test_links_out_of_the_data_folder_are_refused(write, tmp_path):
    source = write([row(0)])
    (tmp_path / "secret.txt").write_text(row(1))
    (tmp_path / "laion-45w" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "list.txt").write_text("link.txt\n")
    with pytest.raises(ConfigError, match="outside"):
        source.shards()


def test_missing_shards_lists_and_columns_are_refused_by_name(write, tmp_path):
    source = write([row(0)])
    (tmp_path / "list.txt").write_text("0000000.txt\n0000009.txt\n")
    with pytest.raises(ConfigError, match="no 0000009.txt"):
        source.shards()
    with pytest.raises(ConfigError, match="nowhere.txt cannot be read"):
        LaionSource(str(tmp_path), str(tmp_path / "nowhere.txt")).shards()
    with pytest.raises(ConfigError, match="looks like a picture in base64; give --image_column"):
        unpack_laion(write(["a\tb c", "d\te f"]), tmp_path / "out")


def test_random_bytes_never_do_more_than_fail(write, tmp_path):
    noise = random.Random(0)
    rows = [row(i) for i in range(5)] + [noise.randbytes(200).replace(b"\n", b"") for _ in range(50)]
    done = unpack_laion(write(rows, max_bad_share=1.0), tmp_path / "out")
    assert done.pictures == 5 and done.bad >= 50
