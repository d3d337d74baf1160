"""A folder that several pages have open: each sees the other's captions, and nothing from outside."""

import pytest
from PIL import Image

from ppcoat.data.caption_edits import CaptionFlags
from ppcoat.data.folder import FolderFlags
from ppcoat.errors import ConfigError
from ppcoat.studio.access import Roots
from ppcoat.studio.data_folder import OpenFolders


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "root/pictures"
    folder.mkdir(parents=True)
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64 + 32 * number), color).save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} sks dress")
    return folder


def opened(data, **fields):
    folders = OpenFolders(Roots([data.parent]))
    folder = folders.of(FolderFlags(folder="pictures", resolution=64, **fields))
    folder.read()
    return folders, folder


def test_pages_share_a_folder_and_its_steps(data):
    folders, folder = opened(data)
    other = folders.of(FolderFlags(folder=str(data), resolution=64))
    assert other is folder
    red = folder.found("red")[0]
    version = other.version
    folder.write({red.path: "new"})
    assert other.version > version and other.caption(red) == "new" and other.steps == 1
    assert folder.write_all(CaptionFlags(folder="", prepend="x ", search="a ")) == 2
    assert (folder.undo(), folder.undo(), folder.undo()) == (2, 1, 0)
    assert [(data / f"{name}.txt").read_text() for name in ("red", "blue")] == [
        "a red sks dress",
        "a blue sks dress",
    ]


def test_it_is_read_again_when_something_changed(data):
    _, folder = opened(data)
    version = folder.version
    folder.read()
    assert folder.version == version
    folder.write({folder.pictures[0].path: "mine"})
    folder.read()
    assert folder.steps == 1
    (data / "red.txt").unlink()
    folder.read()
    assert folder.counts()["no_caption"] == 1 and folder.steps == 1
    assert [picture.name for picture in folder.found("", "no_caption")] == ["red.png"]
    folder.write({folder.found("red")[0].path: "there again"})
    assert folder.counts()["no_caption"] == 0


def test_nothing_from_outside_is_shown_or_written(data, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    Image.new("RGB", (64, 64)).save(outside / "secret.png")
    (data / "linked").symlink_to(outside)
    (data / "red.txt").unlink()
    (data / "red.txt").symlink_to(outside / "secret.txt")
    folders, folder = opened(data)
    assert {picture.name for picture in folder.pictures} == {"green.png", "blue.png"}
    assert any("links out of the studio's folders" in remark for remark in folder.remarks)
    green = folder.found("green")[0]
    (data / "green.txt").unlink()
    (data / "green.txt").symlink_to(outside / "new.txt")
    with pytest.raises(ConfigError, match="a link out of the studio's folders"):
        folder.write({green.path: "x"})
    assert not (outside / "new.txt").exists()
    for fields in ({"folder": "../outside"}, {"folder": ".", "mask_path": "/etc"}):
        with pytest.raises(ConfigError, match="outside of the studio's folders"):
            folders.of(FolderFlags(**fields))


def test_a_caption_can_always_be_sent(data):
    (data / "red.txt").write_text('{"caption": "half \\ud83d"}')
    _, folder = opened(data)
    assert folder.caption(folder.found("red.png")[0]) == "half ?"
