"""No path of the page leads out of its folders, and what is uploaded is what it says it is."""

import json
import os
from pathlib import Path

import pytest

from ppcoat.config.flags import TINY_FLUX
from ppcoat.errors import ConfigError
from ppcoat.studio.access import UPLOADS, Roots

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def safetensors(header=b'{"a": {}}'):
    return len(header).to_bytes(8, "little") + header + bytes(8)


@pytest.fixture
def roots(tmp_path):
    for name in ("first", "second", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "first2").mkdir()  # begins like a root
    return Roots([tmp_path / "first", tmp_path / "second"])


def test_what_lies_inside_is_found(roots, tmp_path):
    assert roots.inside("a/b.png") == tmp_path / "first/a/b.png"
    assert roots.inside(str(tmp_path / "second/x")) == tmp_path / "second/x"
    assert roots.inside(" a/../b ") == tmp_path / "first/b"
    assert roots.shown(tmp_path / "first/a b") == "a b"
    assert roots.shown(tmp_path / "second/x") == str(tmp_path / "second/x")
    assert roots.inside(".") == tmp_path / "first"
    assert roots.argument("-a/../-b") == "./-b" and roots.argument(f"{tmp_path}/first/x y") == "x y"
    assert roots.model_argument(" tiny_flux ") == "tiny_flux" and roots.model_argument("m") == "m"


@pytest.mark.parametrize(
    "text", ["..", "../outside", "a/../../outside/x", "/etc/passwd", "~/x", "../first2/x", "/", "../.."]
)
def test_what_lies_outside_is_refused_by_name(roots, text):
    with pytest.raises(ConfigError, match="outside of the studio's folders .*--root"):
        roots.inside(text)


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "~nobody_of_that_name/x"])
def test_what_is_no_path_is_refused(roots, text):
    with pytest.raises(ConfigError):
        roots.inside(text)


def test_links_do_not_lead_out(roots, tmp_path):
    secret = tmp_path / "outside/secret.txt"
    secret.write_text("secret")
    (tmp_path / "first/file").symlink_to(secret)
    (tmp_path / "first/folder").symlink_to(tmp_path / "outside")
    (tmp_path / "first/round").symlink_to(tmp_path / "first/round")
    (tmp_path / "first/fine").symlink_to(tmp_path / "second")
    for text in ("file", "folder/secret.txt", "folder/new"):
        with pytest.raises(ConfigError, match="outside"):
            roots.inside(text)
    assert not roots.holds(tmp_path / "first/file")
    assert roots.inside("fine/x") == tmp_path / "second/x"
    folders, files = roots.listing(tmp_path / "first", (".txt", ""))
    assert ([each.name for each in folders], files) == (["fine"], [])


def test_a_listing_leaves_out_what_is_hidden_and_what_is_no_text(roots, tmp_path):
    for name in (".hidden", "B", "a"):
        (tmp_path / "first" / name).mkdir()
    for name in ("x.safetensors", "y.SAFETENSORS", "z.txt"):
        (tmp_path / "first" / name).touch()
    Path(os.fsdecode(bytes(tmp_path / "first") + b"/\xff.safetensors")).touch()
    folders, files = roots.listing(tmp_path / "first", (".safetensors",))
    assert [each.name for each in folders] == ["a", "B"]
    assert [each.name for each in files] == ["x.safetensors", "y.SAFETENSORS"]
    with pytest.raises(ConfigError, match="cannot be read"):
        roots.listing(tmp_path / "first/gone")


def test_the_built_in_model_may_be_named(roots, tmp_path):
    assert roots.model("tiny_flux") == Path(TINY_FLUX)
    assert roots.model("models/flux") == tmp_path / "first/models/flux"
    with pytest.raises(ConfigError, match="outside"):
        roots.model("/models/flux")


def test_a_root_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="--root: came .*nowhere"):
        Roots([tmp_path / "nowhere"])


def test_uploads_are_kept_below_the_first_root(roots, tmp_path):
    folder = tmp_path / "first" / UPLOADS
    assert roots.store("my lora.safetensors", safetensors(), "lora") == folder / "my_lora.safetensors"
    assert roots.store("my lora.safetensors", safetensors(), "lora") == folder / "my_lora_2.safetensors"
    source = tmp_path / "outside/sent"
    source.write_bytes(safetensors())
    assert roots.store("b.safetensors", source, "lora").read_bytes() == safetensors()
    assert roots.store("图.png", PNG, "picture").name == "图.png"
    assert roots.store("a.webp", b"RIFF\0\0\0\0WEBPVP8 ", "picture").suffix == ".webp"


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../x.safetensors", "x.safetensors"),
        ("C:\\dir\\x.safetensors", "x.safetensors"),
        ("<img src=x onerror=alert(1)>.safetensors", "_img_src_x_onerror_alert_1_.safetensors"),
        ("..safetensors", "upload.safetensors"),
        ("n" * 400 + ".safetensors", "n" * 120 + ".safetensors"),
    ],
)
def test_a_hostile_name_becomes_a_plain_one(roots, name, stored):
    found = roots.store(name, safetensors(), "lora")
    assert (found.name, found.parent.name) == (stored, UPLOADS)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.safetensors", b"", "lora"),
        ("a.safetensors", PNG, "lora"),
        ("a.safetensors", safetensors(b"[1, 2, 3]"), "lora"),
        ("a.safetensors", safetensors(b"{not json"), "lora"),
        ("a.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "lora"),
        ("a.safetensors", safetensors(json.dumps({"a": "b" * 99}).encode())[:40], "lora"),
        ("a.ckpt", safetensors(), "lora"),
        ("a.png", b"<svg onload=alert(1)>", "picture"),
        ("a.jpg", PNG, "picture"),
        ("a.html", PNG, "picture"),
        ("a.webp", b"RIFF\0\0\0\0WAVEfmt ", "picture"),
    ],
)
def test_what_is_not_of_its_kind_is_not_kept(roots, tmp_path, name, content, kind):
    with pytest.raises(ConfigError, match=r"a\.\w+ is no "):
        roots.store(name, content, kind)
    assert not (tmp_path / "first" / UPLOADS).exists()
