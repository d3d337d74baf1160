"""Captions of other programs: encodings, JSON, tables, and names that are nearly right."""

import json
import logging
import unicodedata

import pytest

from ppcoat.data import caption_files, encodings
from ppcoat.data.encodings import decode
from ppcoat.data.sources import scan_folder
from ppcoat.errors import ConfigError

TEXTS = {
    "gb18030": ["一件红色 sks 连衣裙", "一个女孩站在海边,穿着白色的连衣裙", "sks, 黑色短发, 微笑"],
    "cp1252": [
        "robe rouge créée",
        "été à la mer",
        "naïve señorita",
        "schöne Kleider für Mädchen",
        "KÖÖK",
        "red\xa0dress",
    ],
    "cp932": ["赤いドレス、白い水玉", "青い服を着た少女、白い背景", "黒髪, 制服, 笑顔"],
    "cp949": ["빨간 드레스", "흰 배경의 검은 고양이", "sks 원피스"],
    "big5": ["一件紅色的洋裝", "穿著藍色裙子的女孩站在海邊"],
    "euc_jp": ["赤いドレスの女性"],
    "iso2022_jp": ["1girl, 赤いドレス"],
    "cp1251": ["красное платье", "Синяя рубашка, sks"],
    "koi8_r": ["красное платье"],
    "utf-16": ["red dress 红"],
    "utf-16-le": ["red dress"],
    "utf-32": ["red dress"],
}


@pytest.mark.parametrize(
    ("encoding", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts]
)
def test_encodings_are_told_apart(encoding, text):
    assert decode(text.encode(encoding)) == (text, encoding)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("红色连衣裙，白色圆点".encode()[:-1], "UTF-8 with damaged bytes"),
        ("빨간 드레스".encode() + b"\xff", "UTF-8 with damaged bytes"),
        ("ชุดเดรสสีแดง".encode("utf-16-le"), "in no known encoding"),  # UTF-8, but for control characters
        ("빨간 드레스".encode("iso2022_kr"), "in no known encoding"),
    ],
)
def test_nearly_utf8_is_refused_and_not_guessed(raw, reason):
    with pytest.raises(UnicodeError, match=reason):
        decode(raw)


def test_bytes_that_are_no_text_are_refused():
    for raw in (
        b"\x81\xff\x00\x81",
        bytes(range(256)),
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\x93\xfa\x01\x02",
    ):
        with pytest.raises(UnicodeError):
            decode(raw)


@pytest.mark.parametrize(
    ("head", "tail", "encoding"),
    [
        ("été à la mer, ".encode("cp1252") * 5000, "красное платье, ".encode("cp1251") * 20000, "cp1252"),
        (b"a red dress, " * 6000, "robe rouge créée".encode("cp1252"), "cp1252"),
    ],
    ids=["first-counts", "after-ascii"],
)
def test_a_long_text_is_guessed_from_its_first_part(head, tail, encoding):
    assert decode(head + tail) == ((head + tail).decode(encoding), encoding)


@pytest.mark.parametrize("sample", [100, 101])
def test_a_guess_may_cut_a_character_and_decodes_all_the_same(monkeypatch, sample):
    monkeypatch.setattr(encodings, "_SAMPLE", sample)
    text = "赤いドレス、" * 20
    assert decode(text.encode("cp932")) == (text, "cp932")
    text = "КРАСНОЕ ПЛАТЬЕ " * 20 + "≤"  # lower case and likelier in cp1251, which has no byte for the last
    assert decode(text.encode("koi8_r")) == (text, "koi8_r")


def captions(folder, **options):
    """{name of a picture: its caption}."""
    return {item.image_path.name: item.caption_raw for item in scan_folder(folder, **options).items}


def refusal(folder, **options):
    with pytest.raises(ConfigError) as caught:
        scan_folder(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(draw, tmp_path):
    """Two pictures without captions, 0.png and sub/1.png."""
    draw("0.png", (16, 16), None)
    draw("sub/1.png", (16, 16), None)
    return tmp_path


ROWS = [("0.png", "a red dress"), ("sub/1.png", "a café")]
TABLES = {
    "metadata.jsonl": "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in ROWS),
    "metadata.csv": "image,prompt\n" + "\n".join(f"{name},{text}" for name, text in ROWS),
    "list.tsv": "file_name\tcaption\n" + "\n".join(f"{name}\t{text}" for name, text in ROWS),
    "metadata.json": json.dumps([{"image": name, "caption": text} for name, text in ROWS]),
    "captions.json": json.dumps(dict(ROWS)),
    "meta_cap.json": json.dumps({f"D:\\pictures\\{name}": {"caption": text} for name, text in ROWS}),
    "meta_clean.json": json.dumps({name.removesuffix(".png"): {"tags": text} for name, text in ROWS}),
    "list.jsonl": json.dumps([{"image": {"path": name}, "text": text} for name, text in ROWS]),
    "lines.json": "\n".join(json.dumps({"File": name.upper(), "Caption": text}) for name, text in ROWS),
    "table.csv": "sep=;\r\nImage;Caption\r\n" + "\r\n".join(f"{name};{text}" for name, text in ROWS),
    "captions.txt": "image|caption\n" + "\n".join(f"{name}|{text}" for name, text in ROWS),
    "data.json": json.dumps({"images": [{"file": name, "captions": [text, "x"]} for name, text in ROWS]}),
}


@pytest.mark.parametrize("name", TABLES)
def test_one_table_for_all_pictures(folder, name):
    (folder / name).write_text(TABLES[name], "utf-8-sig" if name.endswith("csv") else "utf-8")
    assert captions(folder) == {"0.png": "a red dress", "1.png": "a café"}
    assert captions(folder, caption_ext="json") == {"0.png": "a red dress", "1.png": "a café"}


def test_kohyas_tags_follow_the_caption_and_a_file_beside_the_picture_counts_first(folder):
    rows = {"0.png": {"caption": "a dress", "tags": "red, long"}, "1.png": {"caption": "a hat"}}
    (folder / "meta_cap.json").write_text(json.dumps(rows))
    (folder / "sub/1.txt").write_text("a coat")
    assert captions(folder) == {"0.png": "a dress, red, long", "1.png": "a coat"}


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("metadata.jsonl", '{"file_name": "x.png", "text": "a"}', "none of its 1 rows names a picture here"),
        ("metadata.csv", "a,b\n0.png,a", "metadata.csv gives no caption: wanted rows with one of file_name"),
        ("metadata.jsonl", '{"file_name"\n', "metadata.jsonl is damaged: line 1"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a"}',
            "no caption 1.txt, and no row in metadata.jsonl",
        ),
        ("metadata.parquet", "PAR1", "Parquet is not read here"),
        (
            "results.csv",
            "picture,words\n0.png,a",
            "results.csv gives no caption: wanted rows with one of file_name",
        ),
        ("captions.txt", "0.png a dress", "captions.txt gives no caption: wanted rows with one of file_name"),
        (
            "list.jsonl",
            '{"image": "0.png", "en": "a"}',
            "its row of list.jsonl was not found: wanted under text or caption or prompt, not under en",
        ),
        ("list.jsonl", '{"image": "0.png", "text": ""}', "the caption in its row of list.jsonl is empty"),
    ],
)
def test_a_table_that_does_not_help_is_named(folder, name, text, part):
    (folder / name).write_text(text)
    assert part in refusal(folder)


@pytest.mark.parametrize(("name", "mark"), [("metadata.csv", ","), ("list.csv", ";"), ("list.tsv", "\t")])
def test_a_row_with_more_cells_than_the_header_is_refused_and_not_cut(folder, name, mark):
    rows = [f"\nimage{mark}text", f"0.png{mark}a dress{mark} ", f"sub/1.png{mark}red{mark} long"]
    (folder / name).write_text("\n".join(rows))
    said = f"{name} is damaged: line 4: more cells than the header has; put the caption in quotes"
    assert said in refusal(folder)
    assert said in scan_folder(folder, default_caption="x").notes
    (folder / name).write_text("\n".join([*rows[:2], f'sub/1.png{mark}"red{mark} long"', "  "]))
    assert captions(folder) == {"0.png": "a dress", "1.png": f"red{mark} long"}


def test_a_table_with_a_nameless_first_column_keeps_its_columns(folder):
    (folder / "list.tsv").write_text("\tfile_name\ttext\n0\t0.png\ta dress\n1\tsub/1.png\ta hat\n")
    assert captions(folder) == {"0.png": "a dress", "1.png": "a hat"}


def test_a_guessed_table_is_named_once_with_a_caption_that_shows_the_guess(folder, caplog):
    (folder / "metadata.csv").write_bytes("image,text\n0.png,a hat\nsub/1.png,robe créée".encode("cp1252"))
    with caplog.at_level(logging.WARNING):
        items = scan_folder(folder).items
    assert [(item.caption_raw, item.encoding) for item in items] == [
        ("a hat", "cp1252"),
        ("robe créée", "cp1252"),
    ]
    assert caplog.text.strip().endswith("please check: metadata.csv as cp1252: robe créée")


def test_only_line_feeds_end_a_row_of_json_lines(folder):
    """Unescaped, as json.dumps(..., ensure_ascii=False) writes them."""
    texts = {"0.png": "red\u2028long\u2029dress\x85", "1.png": "a hat"}
    rows = [{"file_name": name, "text": text + "."} for name, text in texts.items()]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert captions(folder) == {name: text + "." for name, text in texts.items()}


@pytest.fixture
def alike(draw, tmp_path):
    """Pictures x/a/0.png, x/b/0.png and y/a/0.png without captions."""
    for name in ("x/a", "x/b", "y/a"):
        draw(f"{name}/0.png", (16, 16), None)
    return tmp_path


@pytest.mark.parametrize("ending", [".png", ""])
def test_pictures_called_alike_are_told_apart_by_the_end_of_their_paths(alike, ending):
    rows = {f"/data/x/a/0{ending}": "1", f"D:\\x\\b\\0{ending}": "2", f"../y/a/0{ending}": "3"}
    (alike / "captions.json").write_text(json.dumps(rows))
    found = scan_folder(alike)
    assert [item.caption_raw for item in found.items] == ["1", "2", "3"] and found.notes == ()


def test_a_whole_name_counts_before_one_without_its_ending(draw, tmp_path):
    draw("a/0.png", (16, 16), None)
    draw("a/0.png.jpg", (16, 16), None)
    (tmp_path / "captions.json").write_text('{"/data/a/0.png": "1", "/data/a/0.png.jpg": "2"}')
    assert captions(tmp_path) == {"0.png": "1", "0.png.jpg": "2"}


def test_a_name_that_fits_several_pictures_is_noted_and_gives_none_a_caption(alike):
    rows = {"/data/b/0.png": "1", "/data/a/0.png": "2", "0.png": "3"}
    (alike / "captions.json").write_text(json.dumps(rows))
    found = scan_folder(alike, default_caption="x")
    assert [item.caption_raw for item in found.items] == ["x", "1", "x"]
    assert found.notes == (
        "/data/a/0.png in captions.json fits several pictures, e.g. x/a/0.png and y/a/0.png "
        "(and 1 more such names): name each with its folder and ending",
    )
    (alike / "captions.json").write_text('{"/data/a/0.png": "2"}')
    said = "x/a/0.png: no caption 0.txt, and /data/a/0.png in captions.json fits several pictures"
    assert said in refusal(alike) and "none of its" not in refusal(alike)


def test_two_tables_that_name_a_picture_are_noted(folder):
    (folder / "metadata.csv").write_text("image,text\n0.png,a dress\nsub/1.png,a hat")
    (folder / "sub/metadata.csv").write_text("image,text\n1.png,a coat")
    assert captions(folder) == {"0.png": "a dress", "1.png": "a coat"}
    tables = f"{folder.name}/metadata.csv and sub/metadata.csv"
    assert scan_folder(folder).notes == (f"{tables} both name 1 picture, e.g. 1.png: the second counts",)


def test_captions_of_tables_have_the_size_limit_of_caption_files(folder):
    rows = {"0.png": "é" * (caption_files.MAX_CAPTION_BYTES // 2), "sub/1.png": "a hat"}
    (folder / "captions.json").write_text(json.dumps(rows))
    assert captions(folder) == {"0.png": rows["0.png"], "1.png": "a hat"}
    (folder / "captions.json").write_text(json.dumps(rows | {"0.png": rows["0.png"] + "."}))
    said = f"1 problem in {folder}: 0.png: the caption in captions.json is longer than 65536 bytes"
    assert refusal(folder).startswith(said)


def test_a_table_names_no_file_outside_of_the_folder(folder, draw):
    draw("elsewhere/secret.png", (16, 16), None)
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "../elsewhere/secret.png", "text": "a"}')
    assert "elsewhere/secret.png: no caption secret.txt" in refusal(folder)
    assert "none of its 1 rows names a picture here" in refusal(folder)


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_json_beside_a_picture_is_read_or_refused_and_never_a_prompt(draw, tmp_path, ending):
    file = draw("0.png", (16, 16), None).with_suffix(f".{ending}")
    file.write_text('{"caption": "a red dress", "caption_short": "dress"}')
    assert captions(tmp_path, caption_ext=ending) == {"0.png": "a red dress"}
    file.write_text('{"scene": "plain", "style": "drawing"}')
    assert f"0.{ending} holds JSON without a caption, the keys scene, style" in refusal(
        tmp_path, caption_ext=ending
    )
    file.write_text("{red|blue} dress")
    if ending == "txt":
        assert captions(tmp_path) == {"0.png": "{red|blue} dress"}
    else:
        assert "0.json is no JSON" in refusal(tmp_path, caption_ext=ending)
    file.write_text('["a red dress"]')
    assert f"0.{ending} holds JSON without a caption, no object" in refusal(tmp_path, caption_ext=ending)


@pytest.mark.parametrize("text", ['{"caption": "a red dress"', "{'caption': 'a red dress'}", '[{"text" : 1'])
def test_damaged_json_and_pythons_own_way_of_it_are_no_prompt(draw, tmp_path, text):
    draw("0.png", (16, 16), text)
    assert "the caption 0.txt is no JSON (mend it" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[red] dress", "[trigger]", "[trigger] x", "[a, b]"])
def test_brackets_that_are_no_json_are_a_caption(draw, tmp_path, text):
    draw("0.png", (16, 16), text)
    assert captions(tmp_path) == {"0.png": text}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.caption", "there is a.caption: rename it, or set caption_ext: caption"),
        ("a.png.txt", "there is a.png.txt: rename it"),
        ("A.txt", "there is A.txt: rename it"),
        ("a .txt", "there is a .txt: rename it"),
        ("text/a.txt", "there is text/a.txt: move it"),
        ("a_caption.txt", "there is a_caption.txt: rename it"),
        ("\uff21.txt", "there is \uff21.txt: rename it"),
    ],
)
def test_a_name_that_is_nearly_right_is_named_once(draw, tmp_path, name, said):
    draw("a.png", (16, 16), None)
    (tmp_path / "text").mkdir()
    (tmp_path / name).write_text("a dress")
    message = refusal(tmp_path)
    assert message.startswith("1 problem in ") and said in message


def test_zeros_before_a_number_are_easily_left_out(draw, tmp_path):
    draw("007.png", (16, 16), None)
    (tmp_path / "7.txt").write_text("a dress")
    assert "no caption 007.txt, but there is 7.txt: rename it" in refusal(tmp_path)


def test_default_text_is_the_caption_of_its_folder(folder):
    (folder / "Default.txt").write_text("a dress")
    assert f"no caption 1.txt, and {folder.name}/default.txt is for its own folder alone" in refusal(folder)
    (folder / "sub/1.txt").write_text("a coat")
    assert [(item.caption_raw, item.has_caption) for item in scan_folder(folder).items] == [
        ("a dress", False),
        ("a coat", True),
    ]


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_a_default_is_read_as_a_caption_beside_a_picture_is(folder, ending):
    file = folder / f"default.{ending}"
    file.write_text('{"caption": "a red dress"}')
    (folder / f"sub/default.{ending}").write_text('{"scene": "plain"}')
    said = refusal(folder, caption_ext=ending)
    assert f"1 problem in {folder}: sub/1.png: the caption default.{ending} holds JSON without" in said
    (folder / f"sub/default.{ending}").unlink()
    options = {"caption_ext": ending, "default_caption": "a hat"}
    assert captions(folder, **options) == {"0.png": "a red dress", "1.png": "a hat"}


def test_a_table_named_default_is_no_default_caption(draw, tmp_path):
    draw("0.png", (16, 16), None)
    draw("1.png", (16, 16), None)
    (tmp_path / "default.json").write_text('{"0.png": "a dress"}')
    for ending in ("txt", "json"):
        found = captions(tmp_path, caption_ext=ending, default_caption="a hat")
        assert found == {"0.png": "a dress", "1.png": "a hat"}


@pytest.mark.parametrize("raw", ["赤いドレス".encode("cp932"), b"\x81\xff\x00\x81"])
def test_a_default_is_guessed_once(draw, tmp_path, monkeypatch, raw):
    draw("x.png", (16, 16), "a coat")
    for number in range(3):
        draw(f"{number}.png", (16, 16), None)
    (tmp_path / "default.txt").write_bytes(raw)
    read = []
    monkeypatch.setattr(caption_files, "decode", lambda raw: (read.append(raw), decode(raw))[1])
    found = scan_folder(tmp_path, skip_bad=True)
    assert read.count(raw) == 1 and len(found.items) + len(found.bad) == 4


def test_pictures_that_share_a_caption_are_noted(draw, tmp_path):
    draw("a.png", (16, 16), "a dress")
    draw("a.jpg", (16, 16), None)
    assert scan_folder(tmp_path).notes == ("a.jpg and a.png share the caption a.txt",)


def test_names_of_a_mac_and_of_others_are_the_same(draw, tmp_path):
    draw(f"{unicodedata.normalize('NFD', 'café')}.png", (16, 16), None)
    (tmp_path / f"{unicodedata.normalize('NFC', 'café')}.txt").write_text("a dress")
    assert list(captions(tmp_path).values()) == ["a dress"]


def test_guessed_captions_are_shown(draw, tmp_path, caplog):
    draw("a.png", (16, 16), None)
    (tmp_path / "a.txt").write_bytes("赤いドレス、白い水玉".encode("cp932"))
    with caplog.at_level(logging.WARNING):
        (item,) = scan_folder(tmp_path).items
    assert item.encoding == "cp932" and "a.txt as cp932: 赤いドレス、白い水玉" in caplog.text


def test_the_warning_of_guesses_names_the_file_that_there_is(folder, caplog):
    (folder / "0.TXT").write_bytes("robe rouge créée".encode("cp1252"))
    (folder / "sub/default.txt").write_bytes("赤いドレス".encode("cp932"))
    with caplog.at_level(logging.WARNING):
        scan_folder(folder)
    assert f"in {folder} 2 captions are not UTF-8" in caplog.text
    assert "check: 0.TXT as cp1252: robe rouge créée; sub/default.txt as cp932: 赤いドレス" in caplog.text
