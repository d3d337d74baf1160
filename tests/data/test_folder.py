"""What is odd about which picture, and the commands that tell and change it."""

import pytest
from PIL import Image

from ppcoat.cli.main import main
from ppcoat.data.buckets import bucket_size, crop_box, crop_share
from ppcoat.data.folder import FolderFlags, folder_dataset, picture_notes, thumbnail
from ppcoat.errors import ConfigError


def notes(folder, **fields):
    dataset = folder_dataset(FolderFlags(folder=str(folder), **fields))
    found = {
        path.name: [(note.kind, note.detail) for note in own] for path, own in picture_notes(dataset).items()
    }
    return dataset, found


def test_each_picture_has_its_own_notes(draw, tmp_path):
    draw("plain.png", (512, 512))
    draw("wide.png", (1500, 1000), color="blue")
    draw("bare.png", (512, 512), None, "green")
    draw("tiny.png", (100, 100), color="white")
    draw("one.png", (512, 512), color="black")
    draw("two.png", (512, 512), color="black")
    draw("same_size.png", (512, 512), color="brown")
    draw("old.png", (512, 512), color="pink").with_suffix(".txt").write_bytes("裙子".encode("gb18030"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    dataset, found = notes(tmp_path)
    assert found == {
        "wide.png": [("cropped", "14%")],
        "bare.png": [("no_caption", "")],
        "tiny.png": [("small", "100 x 100, trained at 64 x 64")],
        "one.png": [("duplicate", "two.png")],
        "two.png": [("duplicate", "one.png")],
        "old.png": [("guessed", "gb18030")],
    }
    assert [problem.path.name for problem in dataset.images.bad] == ["bad.png"]


def test_references_and_masks_are_found_beside_the_folder(draw, tmp_path):
    draw("pictures/a.png", (64, 64))
    draw("references/a.jpg", (64, 64), None)
    draw("masks/a.png", (64, 64), None, "white")
    Image.new("L", (64, 64)).save(tmp_path / "masks/a.png")
    with pytest.raises(ConfigError, match="all 1 masks of"):
        notes(tmp_path / "pictures", mask_path=str(tmp_path / "masks"))
    dataset, _ = notes(tmp_path / "pictures", control_path=str(tmp_path / "references"), resolution=64)
    assert [each.path.name for each, _ in dataset.examples[0].references] == ["a.jpg"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resolution": 1000}, "resolution: came 1000, wanted a multiple of 16"),
        ({"trigger_word": " sks"}, "the trigger word must not be blank or have extra spaces"),
        ({"caption_ext": "a/b"}, "caption_ext: came 'a/b', wanted text like"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, fields, said):
    with pytest.raises(ConfigError) as error:
        notes(tmp_path, **fields)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_crop_is_centred_and_has_the_share_that_is_told():
    for size in ((1500, 1000), (333, 777), (64, 64), (4000, 300)):
        bucket = bucket_size(*size, 512)
        left, top, width, height = crop_box(*size, bucket)
        assert left == pytest.approx((1 - width) / 2) and top == pytest.approx((1 - height) / 2)
        assert 1 - width * height == pytest.approx(crop_share(*size, bucket))
        assert width * size[0] / (height * size[1]) == pytest.approx(bucket[0] / bucket[1])
        assert max(width, height) == pytest.approx(1)


def test_a_thumbnail_is_upright_and_small(tmp_path):
    image = Image.new("RGB", (900, 600), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "small.jpg").write_bytes(thumbnail(tmp_path / "a.jpg", 300))
    with Image.open(tmp_path / "small.jpg") as small:
        assert (small.format, small.size) == ("JPEG", (200, 300))
        assert small.getpixel((100, 150))[0] > 240
    Image.new("RGBA", (10, 20)).save(tmp_path / "b.png")
    (tmp_path / "small.jpg").write_bytes(thumbnail(tmp_path / "b.png", 300))
    with Image.open(tmp_path / "small.jpg") as small:
        assert small.size == (10, 20) and small.getpixel((5, 5)) == (255, 255, 255)


def test_the_commands_report_and_change(draw, tmp_path, capsys):
    draw("wide.png", (1500, 1000), "a red [trigger]")
    draw("b.png", (512, 512), "a red one")
    assert main(["data", "report", str(tmp_path), "--trigger_word", "sks"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0] == "data: 2 pictures to encode, 2 per epoch"
        and said[-1] == "  wide.png: 14% of it is cropped"
    )
    command = ["data", "captions", str(tmp_path), "--replace", "red", "--by=blue"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("2 of 2 captions would change (--write does it)\n")
    assert (tmp_path / "b.txt").read_text() == "a red one"
    assert main([*command, "--search", "wide", "--write"]) == 0
    assert capsys.readouterr().out == (
        "wide.png: a red [trigger] -> a blue [trigger]\n1 of 2 captions changed\n"
    )
    assert (tmp_path / "b.txt").read_text() == "a red one"
    assert (tmp_path / "wide.txt").read_text() == "a blue [trigger]"
    assert main([*command, "--append", "\udce9", "--write"]) == 2
    assert "captions: \\udce9 holds half of a character" in capsys.readouterr().err
    assert main(["data", "captions", str(tmp_path)]) == 2
    assert "nothing to do" in capsys.readouterr().err
