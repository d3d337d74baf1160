"""Image folders: every kind of bad file is named, every kind of good picture is read right."""

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ppcoat.data.sources import folder_repeats, load_image, scan_folder
from ppcoat.errors import ConfigError


def picture(path, size=(32, 24), caption="a shirt", mode="RGB", color="red", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **save)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def noise(path):
    """A JPEG that is long enough to be cut in its data."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def refusal(folder, **options):
    with pytest.raises(ConfigError) as caught:
        scan_folder(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_folder_is_sorted_recursive_and_measured(tmp_path):
    picture(tmp_path / "b.PNG", (10, 20), "B")
    picture(tmp_path / "sub/a.jpeg", (30, 40), "A\n")
    picture(tmp_path / "a.webp", (50, 60), " C ")
    picture(tmp_path / ".hidden/x.jpg", caption=None)
    (tmp_path / "._a.webp").write_bytes(b"resource fork")
    (tmp_path / "notes.md").write_text("not a caption")
    found = scan_folder(tmp_path)
    assert [(i.image_path.name, i.caption_raw, i.width, i.height) for i in found.items] == [
        ("a.webp", "C", 50, 60),
        ("b.PNG", "B", 10, 20),
        ("a.jpeg", "A", 30, 40),
    ]
    assert found.bad == []


def test_caption_ext_and_default_caption(tmp_path):
    picture(tmp_path / "a.png", caption=None)
    (tmp_path / "a.caption").write_text("from .caption")
    picture(tmp_path / "b.png", caption=None)
    found = scan_folder(tmp_path, caption_ext=".caption", default_caption="a thing")
    assert [item.caption_raw for item in found.items] == ["from .caption", "a thing"]
    (tmp_path / "b.caption").write_text(" \n")
    assert scan_folder(tmp_path, "caption", "a thing").items[1].caption_raw == "a thing"


def test_missing_folder_file_and_empty_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refusal(tmp_path / "empty") and ".webp" in refusal(tmp_path / "empty")


def _no_caption(folder):
    picture(folder / "x.png", caption=None)
    return 'x.png: no caption x.txt (write one or set default_caption, e.g. "[trigger]")'


def _empty_caption(folder):
    picture(folder / "x.png", caption=" ")
    return "x.png: the caption x.txt is empty"


def _no_picture(folder):
    (folder / "x.txt").write_text("lonely")
    return "x.txt: caption without picture"


def _not_a_picture(folder):
    (folder / "x.jpg").write_text("hello")
    (folder / "x.txt").write_text("a")
    return "x.jpg: the picture cannot be decoded"


def _zero_bytes(folder):
    (folder / "x.jpg").write_bytes(b"")
    (folder / "x.txt").write_text("a")
    return "x.jpg: the picture is an empty file"


def _truncated_jpeg(folder):
    path = noise(folder / "x.jpg")
    path.write_bytes(path.read_bytes()[:-600])
    (folder / "x.txt").write_text("a")
    return "x.jpg: the picture cannot be decoded (image file is truncated"


def _truncated_png(folder):
    path = noise(folder / "x.png")
    path.write_bytes(path.read_bytes()[:-600])
    (folder / "x.txt").write_text("a")
    return "x.png: the picture cannot be decoded"


def _png(folder, side, colour, *pixels):
    """A PNG whose header claims side x side pixels; colour: 2 RGB, 3 of a palette, which it lacks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0))
    data = b"".join(chunk(b"IDAT", zlib.compress(each)) for each in pixels)
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    (folder / "x.txt").write_text("a")
    return "x.png: the picture cannot be decoded"


def _bomb(folder):
    return f"{_png(folder, 20000, 2, b'')} (Image size (400000000 pixels) exceeds limit"


def _without_palette(folder):
    return _png(folder, 40, 3, bytes(41 * 40))


def _without_pixels(folder):
    return _png(folder, 40, 2)


def _other_format(folder):
    Image.new("RGB", (8, 8)).save(folder / "x.jpg", format="TIFF")
    (folder / "x.txt").write_text("a")
    return "x.jpg: the picture cannot be decoded (it is a TIFF picture; wanted JPEG, PNG or WebP)"


def _bad_checksum(folder):
    """One pixel changed in a PNG whose data is stored as it is: Pillow's load() alone does not mind."""
    Image.new("RGB", (32, 32), (7, 7, 7)).save(folder / "x.png", compress_level=0)
    content = bytearray((folder / "x.png").read_bytes())
    content[content.index(b"IDAT") + 1000] ^= 1
    (folder / "x.png").write_bytes(content)
    (folder / "x.txt").write_text("a")
    return "x.png: the picture cannot be decoded (broken PNG file"


def _format_not_read(folder):
    Image.new("RGB", (8, 8)).save(folder / "x.bmp")
    (folder / "x.txt").write_text("a")
    return "x.bmp: BMP is not read here (convert it to PNG or JPEG)"


def _binary_caption(folder):
    picture(folder / "x.png", caption=None)
    (folder / "x.txt").write_bytes(b"\x81\xff\x00\x81")
    return "x.png: the caption x.txt is in no known encoding"


def _huge_caption(folder):
    picture(folder / "x.png", caption="a" * 70_000)
    return "x.png: the caption x.txt is longer than 65536 bytes"


BAD = [_no_caption, _empty_caption, _no_picture, _not_a_picture, _zero_bytes, _truncated_jpeg, _truncated_png]
BAD += [
    _bomb,
    _without_palette,
    _without_pixels,
    _other_format,
    _bad_checksum,
    _format_not_read,
    _binary_caption,
    _huge_caption,
]


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_each_bad_file_stops_or_is_skipped_and_listed(tmp_path, spoil, caplog):
    picture(tmp_path / "good.png")
    named = spoil(tmp_path)
    message = refusal(tmp_path)
    assert message.startswith("1 problem in ") and named in message and "skip_bad: true" in message
    with caplog.at_level(logging.WARNING):
        found = scan_folder(tmp_path, skip_bad=True)
    assert [item.image_path.name for item in found.items] == ["good.png"]
    assert [f"{each.path.name}: {each.reason}"[: len(named)] for each in found.bad] == [named]
    assert "1 problem in" in caplog.text and named in caplog.text


def test_all_problems_are_counted_and_ten_are_named(tmp_path):
    for number in range(12):
        picture(tmp_path / f"{number:02d}.png", caption=None)
    message = refusal(tmp_path)
    assert message.startswith("12 problems in ")
    assert all(f"{number:02d}.png" in message for number in range(10)) and "10.png" not in message
    assert "... and 2 more" in message
    assert "no usable picture is left" in refusal(tmp_path, skip_bad=True)


def test_line_end_in_a_file_name_does_not_break_the_line(tmp_path):
    picture(tmp_path / "a\nb.png", caption=None)
    assert "a\\nb.png" in refusal(tmp_path)


def test_unreadable_subfolder_is_named(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "sub").mkdir()
    os.chmod(tmp_path / "sub", 0)
    try:
        if os.access(tmp_path / "sub", os.R_OK):
            pytest.skip("this user may read everything")
        assert "sub: folder cannot be read" in refusal(tmp_path)
    finally:
        os.chmod(tmp_path / "sub", 0o700)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    rng = np.random.default_rng(0)
    good = {suffix: noise(tmp_path / f"g{suffix}").read_bytes() for suffix in (".jpg", ".png", ".webp")}
    folder = tmp_path / "damaged"
    folder.mkdir()
    for number in range(60):
        suffix = (".jpg", ".png", ".webp")[number % 3]
        content = bytearray(good[suffix])
        for place in rng.integers(0, len(content) if number % 2 else 200, 5):
            content[place] ^= int(rng.integers(1, 256))
        (folder / f"{number}{suffix}").write_bytes(content)
    found = scan_folder(folder, default_caption="x", skip_bad=True)
    assert len(found.items) + len(found.bad) == 60 and len(found.bad) > 5


@pytest.mark.parametrize(
    ("raw", "text", "warned"),
    [
        ("a caf\u00e9".encode(), "a caf\u00e9", ""),
        (b"\xef\xbb\xbfa caf\xc3\xa9", "a caf\u00e9", ""),
        ("a caf\u00e9 \u00e9t\u00e9".encode("cp1252"), "a caf\u00e9 \u00e9t\u00e9", "cp1252"),
        (b"red\xa0dress", "red\u00a0dress", "cp1252"),
        ("\u4e00\u4ef6\u7ea2\u8272 sks \u8fde\u8863\u88d9".encode("gb18030"), None, "gb18030"),
        ("red dress".encode("utf-16"), "red dress", "utf-16"),
    ],
)
def test_caption_encodings(tmp_path, caplog, raw, text, warned):
    picture(tmp_path / "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        caption = scan_folder(tmp_path).items[0].caption_raw
    assert caption == (text or "\u4e00\u4ef6\u7ea2\u8272 sks \u8fde\u8863\u88d9")
    assert (warned in caplog.text and "a.txt" in caplog.text) if warned else not caplog.text


def colours(path, height=8, width=8):
    """Mean colour as 0..255 integers."""
    return tuple(((load_image(path, height, width).mean((1, 2)) + 1) * 127.5).round().astype(int))


def test_pixels_are_chw_in_minus_one_to_one(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (0, 51, 255)).save(path)
    pixels = load_image(path, 4, 6)
    assert pixels.shape == (3, 4, 6) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels[:, 0, 0], [-1.0, 51 / 127.5 - 1, 1.0], atol=1e-6)


def test_cover_and_centre_crop(tmp_path):
    """Left, middle and right thirds of a 3:1 picture: a square crop shows the middle alone."""
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32, 0], wide[:, 32:64, 1], wide[:, 64:, 2] = 255, 255, 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png", 32, 32) == (0, 255, 0)
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.png")
    assert colours(tmp_path / "b.png", 32, 32) == (0, 255, 0)


def test_exif_rotation_is_applied(tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it turned 90 degrees clockwise
    Image.fromarray(upright).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("x")
    item = scan_folder(tmp_path).items[0]
    assert (item.width, item.height) == (16, 32)
    pixels = load_image(tmp_path / "a.png", 32, 16)
    assert pixels[:, :12].min() == 1.0 and pixels[:, 20:].max() == -1.0  # the left side came up


def test_alpha_palette_grey_and_cmyk(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert colours(tmp_path / "clear.png") == (255, 255, 255)
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert colours(tmp_path / "half.png") == (255, 127, 127)  # 128/255 red over white
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png")
    assert colours(tmp_path / "palette.png") == (0, 200, 0)
    palette.save(tmp_path / "hole.png", transparency=1)
    assert colours(tmp_path / "hole.png") == (255, 255, 255)
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert colours(tmp_path / "grey.png") == (77, 77, 77)
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    assert colours(tmp_path / "deep.png") == (128, 128, 128)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red = colours(tmp_path / "ink.jpg")
    assert red[0] >= 250 and red[1] <= 5 and red[2] <= 5


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"GIF89a", "a GIF picture"),
        (b"\0\0\0\x20ftypavif", "an AVIF picture"),
        (b"\0\0\0\x18ftypheic", "a HEIC picture"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer: run git lfs pull"),
        (b"\0\0\0\x18ftyphevc", "a HEIC picture"),
        (b'{"error": "not found"}', "text, perhaps an error message of a download"),
        (bytes(40), "a file of zeros"),
    ],
)
def test_what_a_wrong_picture_is_is_told_by_its_first_bytes(tmp_path, start, kind):
    (tmp_path / "a.jpg").write_bytes(start if kind.startswith("text") else start + bytes(64))
    (tmp_path / "a.txt").write_text("a")
    assert f"a.jpg: the picture cannot be decoded (it is {kind}; wanted" in refusal(tmp_path)


def test_formats_that_are_not_read_are_counted(tmp_path):
    picture(tmp_path / "good.png")
    for name in ("a.gif", "b.gif", "c.avif"):
        (tmp_path / name).write_bytes(b"x")
    (note,) = scan_folder(tmp_path).notes
    assert "2 .gif, 1 .avif; wanted JPEG, PNG or WebP" in note
    (tmp_path / "good.png").unlink()
    assert "only 2 .gif, 1 .avif; wanted .jpg" in refusal(tmp_path)


def test_strays_are_left_out_and_links_are_followed_once(tmp_path):
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(data / "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", caption=None)
    picture(data / "__MACOSX/b.png", caption=None)
    picture(data / ".ipynb_checkpoints/a-checkpoint.png", caption=None)
    picture(tmp_path / "elsewhere/c.png")
    for name, target in {"more": "../elsewhere", "again": "../elsewhere", "loop": ".", "up": ".."}.items():
        (data / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to("../data")
    found = scan_folder(data)
    assert sorted(item.image_path.name for item in found.items) == ["a.png", "c.png"]
    assert "folders left out: @eaDir, __MACOSX" in found.notes
    assert sum("linked folder" in note and "left out" in note for note in found.notes) == 4


def test_of_linked_folders_within_each_other_nothing_is_lost(tmp_path):
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(tmp_path / "elsewhere/b.png")
    picture(tmp_path / "elsewhere/deep/c.png")
    (data / "1").symlink_to("../elsewhere/deep")
    (data / "2").symlink_to("../elsewhere")
    found = scan_folder(data)
    assert [item.image_path.name for item in found.items] == ["c.png", "b.png", "a.png"]
    assert found.notes == ("the folder 2/deep is left out: it is here already",)


def test_links_that_lead_nowhere_are_told_in_plain_words(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    assert "b.png: the picture cannot be decoded (No such file or directory);" in refusal(tmp_path)


def test_colours_are_those_of_the_profile(tmp_path):
    """A profile with the primaries of sRGB, red and green exchanged, makes green of red; that of sRGB changes
    no pixel, and one that cannot be read is left out."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    swapped = bytearray(srgb)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    profiles = {"swapped": bytes(swapped), "same": srgb, "broken": b"x" * 200}
    for name, profile in profiles.items():
        picture(tmp_path / f"{name}.png", icc_profile=profile)
    assert [colours(tmp_path / f"{name}.png") for name in profiles] == [(0, 255, 0), (255, 0, 0), (255, 0, 0)]
    notes = {item.image_path.stem: item.notes for item in scan_folder(tmp_path).items}
    assert notes["swapped"] == ("colours converted from their profile to sRGB",) and notes["same"] == ()
    assert notes["broken"] == ("the colour profile cannot be used and is left out",)


def test_animations_and_empty_pictures_are_noted(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=frames[1:])  # no animation
    picture(tmp_path / "b.png", mode="RGBA", color=(0, 0, 0, 0))
    notes = scan_folder(tmp_path, default_caption="x").notes
    assert notes == (
        "1 of 3 pictures: animated, the first picture is trained, e.g. a.webp",
        "1 of 3 pictures: wholly transparent, trained as white, e.g. b.png",
    )


def test_vanished_picture_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png", 8, 8)


@pytest.mark.parametrize(
    ("path", "repeats"),
    [
        ("x.png", 1), ("10_dress/x.png", 10), ("7_/x.png", 7), ("3d_render/x.png", 1), ("10/x.png", 1),
        ("0_off/x.png", 1), ("2024_summer/x.png", 1), ("20240601_x/x.png", 1), ("1000_x/x.png", 1000),
        ("4_a/5_b/x.png", 5), ("4_a/b/x.png", 4), ("-3_a/x.png", 1), ("\u0663_a/x.png", 1), ("10_x.png", 1),
    ],
)  # fmt: skip
def test_folder_names_repeat_their_pictures(path, repeats):
    assert folder_repeats(Path(path)) == repeats


def test_repeats_count_below_the_dataset_only_and_defaults_are_told_apart(tmp_path):
    picture(tmp_path / "9_all/a.png", caption=None)
    picture(tmp_path / "9_all/2_b/b.png", caption="own")
    items = scan_folder(tmp_path / "9_all", default_caption="default").items
    assert [(i.repeats, i.has_caption, i.caption_raw) for i in items] == [
        (2, True, "own"),
        (1, False, "default"),
    ]


def test_flips(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain = load_image(tmp_path / "a.png", 16, 24)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 16, 24, flip_x=True), plain[:, :, ::-1])
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", 16, 24, flip_y=True), plain[:, ::-1])
