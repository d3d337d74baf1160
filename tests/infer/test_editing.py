"""Drawing from pictures by the command: which pipeline, at which size, and what is refused in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import ppcoat.infer.drawers as drawers
from ppcoat.cli.main import main
from ppcoat.infer.drawers import FluxDrawer
from ppcoat.infer.editing import Sight, edit_arguments, edit_class, own_guidance, prepared, reference_pixels
from ppcoat.infer.generate import Drawing
from ppcoat.models.flux.editing import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
)
from ppcoat.models.flux.pipeline import FluxPipeline

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "tiny_flux_fp32"
QUICK = ["--steps", "2", "--max_sequence_length", "16", "--device", "cpu"]
DEV = Sight("dev", fill=False, kontext=False, side=1024, latent_side=8)
KONTEXT = Sight("kontext", fill=False, kontext=True, side=1024, latent_side=8)
FILL = Sight("fill", fill=True, kontext=False, side=1024, latent_side=8)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder with pictures in which the command runs."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (48, 32), "b": (40, 70), "thin": (12, 40), "long": (4000, 20)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), "uint8")).save(f"{name}.png")
    mask = np.zeros([32, 48], "uint8")
    Image.fromarray(mask).save("black.png")
    Image.fromarray(mask + 255).save("white.png")
    mask[8:24, 16:40] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask[:, :32]).save("narrow.png")
    line = np.zeros([32, 48], "uint8")
    line[3] = 255
    Image.fromarray(line).save("line.png")
    Path("text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save("map.ppm")
    return tmp_path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"fill", "kontext": a model folder}."""
    folders = {}
    index = json.loads((BASE / "model_index.json").read_text())
    for name, class_name in (("fill", "FluxFillPipeline"), ("kontext", "FluxKontextPipeline")):
        folders[name] = folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        for part in BASE.iterdir():
            if part.is_dir():
                own = (
                    FIXTURES / "fill" / "transformer"
                    if (name, part.name) == ("fill", "transformer")
                    else part
                )
                (folder / part.name).symlink_to(own)
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": class_name}))
    return folders


def generate(*flags, model=BASE, prompt="a cat"):
    return main(
        ["generate", "--model", str(model), *(["--prompt", prompt] if prompt else []), *QUICK, *flags]
    )


def settings(**given):
    return Drawing(model="m", prompt=["x"], **given)


@pytest.mark.parametrize(
    ("sight", "given", "kind"),
    [
        (DEV, {}, FluxPipeline),
        (DEV, {"image": "a"}, FluxImg2ImgPipeline),
        (DEV, {"image": "a", "mask": "m", "strength": 0.5}, FluxInpaintPipeline),
        (DEV, {"image": "a", "control_image": "c"}, FluxImg2ImgPipeline),
        (DEV, {"reference": ["a", "b"]}, FluxKontextPipeline),
        (KONTEXT, {}, FluxPipeline),
        (KONTEXT, {"control_image": "c"}, FluxPipeline),
        (KONTEXT, {"image": "a"}, FluxKontextPipeline),
        (KONTEXT, {"image": "a", "reference": ["b"]}, FluxKontextPipeline),
        (FILL, {"image": "a", "mask": "m"}, FluxFillPipeline),
    ],
)
def test_the_model_and_what_is_given_choose_the_pipeline(sight, given, kind):
    assert edit_class(settings(**given), sight) is kind


def test_each_pipeline_has_its_own_guidance():
    kinds = (FluxPipeline, FluxKontextPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxFillPipeline)
    assert [own_guidance(kind) for kind in kinds] == [3.5, 3.5, 7.0, 7.0, 30.0]


@pytest.mark.parametrize(
    ("sight", "size", "asked", "want"),  # (width, height) of the picture; height and width
    [
        (DEV, (512, 512), {}, (512, 512)),  # smaller ones stay
        (DEV, (1000, 600), {}, (592, 992)),
        (DEV, (1600, 1200), {}, (880, 1168)),  # at most 1024 x 1024 pixels
        (DEV, (100, 50), {"height": 128}, (128, 256)),
        (DEV, (100, 50), {"height": 64, "width": 64}, (64, 64)),
        (KONTEXT, (512, 512), {}, (1024, 1024)),  # about the model's own pixels
    ],
)
def test_a_drawing_takes_the_size_of_its_picture(tmp_path, sight, size, asked, want):
    Image.new("RGB", size).save(tmp_path / "a.png")
    found = prepared(settings(image=str(tmp_path / "a.png"), **asked), sight)
    assert (found.height, found.width) == want
    call = edit_arguments(found, sight)
    assert call.get("max_area", want[0] * want[1]) == want[0] * want[1] and call.get("_auto_resize", True)


def test_pictures_are_upright_and_on_black(tmp_path):
    picture = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 255, 0, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was held upright
    picture.save(tmp_path / "a.png", exif=exif)
    found = edit_arguments(settings(image=str(tmp_path / "a.png")), DEV)["image"]
    assert found.size == (16, 32) and np.asarray(found).sum() == 255
    assert found.getpixel((15, 0)) == (0, 255, 0)


def test_sixteen_bits_are_no_white(tmp_path):
    """As in training (tests/data), where PIL clips."""
    grey = np.full([16, 32], 100 * 257, "uint16")
    grey[:, :16] = 200 * 257
    Image.fromarray(grey).save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    found = edit_arguments(settings(image=file, mask=file), DEV)
    assert np.unique(np.asarray(found["image"])).tolist() == [100, 200]
    assert np.unique(np.asarray(found["mask_image"])).tolist() == [100, 200]


def test_tokens_of_references_are_planned_at_the_sizes_that_are_seen(tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    drawing = settings(reference=[str(tmp_path / "a.png")] * 2, height=256, width=256)
    assert reference_pixels(drawing, DEV) == 2 * 1568 * 672  # of KONTEXT_SIZES
    assert reference_pixels(drawing, replace(DEV, side=64)) == 2 * 288 * 96
    assert reference_pixels(settings(image="a"), DEV) == 0


def test_the_command_draws_what_the_pipelines_draw(pictures, capsys):
    """A list, so that one model draws all of it; --prompt draws the same."""
    lines = [
        {"name": "over", "image": "a.png", "strength": 0.7},
        {"name": "hole", "image": "a.png", "mask": "mask.png"},
        {"name": "after", "reference": ["a.png", "b.png"], "size": "48x32"},
        {"name": "text", "size": "48x32"},
    ]
    Path("list.jsonl").write_text("\n".join(json.dumps({"prompt": "a cat", **line}) for line in lines))
    assert generate("--prompts", "list.jsonl", "--output_dir", "out", prompt=None) == 0
    said = capsys.readouterr().out
    assert "FluxImg2ImgPipeline: drawing over a.png at strength 0.7; 48x32\n" in said
    assert "FluxInpaintPipeline: inpainting what mask.png marks in a.png at strength 0.6; 48x32\n" in said
    assert "FluxKontextPipeline: editing by the prompt, looking at a.png, b.png; 48x32\n" in said
    assert "has not learned to look at a reference: add a LoRA" in said
    one, two, marked = (Image.open(f"{name}.png") for name in ("a", "b", "mask"))
    smaller = two.resize((16, 48), Image.Resampling.LANCZOS)  # a tiny model knows no larger ones
    want = {
        "over": (FluxImg2ImgPipeline, {"image": one, "strength": 0.7, "guidance_scale": 7.0}),
        "hole": (FluxInpaintPipeline, {"image": one, "mask_image": marked, "guidance_scale": 7.0}),
        "after": (
            FluxKontextPipeline,
            {"image": [[one, smaller]], "max_area": 48 * 32, "_auto_resize": False},
        ),
        "text": (FluxPipeline, {}),
    }
    plain = FluxPipeline.from_pretrained(BASE)
    for name, (kind, call) in want.items():
        pipeline = kind(**plain.components)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(prompt="a cat", height=32, width=48, num_inference_steps=2, seed=42,
                         max_sequence_length=16, **call).images[0]  # fmt: skip
        np.testing.assert_array_equal(
            np.asarray(Image.open(f"out/{name}.png")), np.asarray(drawn), err_msg=name
        )
    assert generate("--prompts", "out/pictures.jsonl", "--output_dir", "out", prompt=None) == 0
    assert "4 pictures: 4 are there as wanted, 0 to draw" in capsys.readouterr().out
    shutil.copy("b.png", "a.png")
    Image.new("L", (40, 70), 255).save("mask.png")
    assert generate("--prompts", "out/pictures.jsonl", "--output_dir", "out", prompt=None) == 2
    assert "out/pictures.jsonl, line 2: mask: mask.png is white all over" in capsys.readouterr().err
    Path("list.jsonl").write_text("\n".join(json.dumps({"prompt": "a cat", **line}) for line in lines[::3]))
    assert generate("--prompts", "list.jsonl", "--output_dir", "out", prompt=None) == 0
    assert "2 pictures: 1 are there as wanted, 1 to draw (1 of them again" in capsys.readouterr().out


def test_fill_fills_and_kontext_edits(pictures, folders, capsys):
    flags = ["--image", "a.png", "--mask", "mask.png", "--output_dir", "out"]
    assert generate(*flags, model=folders["fill"]) == 0
    assert generate("--image", "a.png", "--output_dir", "out", model=folders["kontext"], prompt="a dog") == 0
    said = capsys.readouterr().out
    assert "has not learned" not in said
    assert "FluxFillPipeline: filling what mask.png marks in a.png at strength 1.0; 48x32\n" in said
    assert (
        "FluxKontextPipeline: editing by the prompt, looking at a.png; 64x48 (the picture is 48x32)\n" in said
    )
    assert sorted(file.name for file in Path("out").iterdir()) == ["000_a-cat_42.png", "000_a-dog_42.png"]
    file = FIXTURES / "fill" / "transformer" / "diffusion_pytorch_model.safetensors"  # as one file, the same
    flags = [*flags[:-1], "one", "--text_encoders", str(BASE)]
    assert generate(*flags, model=file) == 0
    one, whole = (np.asarray(Image.open(f"{folder}/000_a-cat_42.png")) for folder in ("one", "out"))
    np.testing.assert_array_equal(one, whole)


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        (None, "--mask mask.png", "mask without an image: give --image"),
        (None, "--strength 0.5", "strength without an image: give --image"),
        (None, "--image a.png --strength 0", "strength: came 0.0, wanted above 0 and at most 1"),
        (None, "--image none.png", "none.png: the picture cannot be decoded"),
        (None, "--image text.png", "text.png: the picture cannot be decoded"),
        (None, "--image map.ppm", "cannot identify image file); give another (JPEG, PNG, WEBP"),
        (None, "--reference none.png", "none.png: the picture cannot be decoded"),
        (None, "--image thin.png", "thin.png is 12x40, wanted at least 16 pixels each way"),
        (None, "--image long.png", "long.png is 4000x20, too long for a picture of 64x64 pixels"),
        (None, "--image a.png --width 50", "width: came 50, wanted a multiple of 16"),
        (None, "--image a.png --mask narrow.png", "mask: narrow.png is 32x32, a.png 48x32: give one"),
        (None, "--image a.png --mask black.png", "mask: black.png marks nothing"),
        (None, "--image a.png --mask line.png", "mask: line.png marks nothing"),  # between the latents
        (None, "--image a.png --mask white.png", "mask: white.png is white all over"),
        (None, "--image a.png --reference b.png", "is not FLUX.1 Kontext; leave one of them out"),
        (None, "--reference b.png --strength 1", "strength without an image"),
        ("kontext", "--image a.png --mask mask.png", "mask: references are edited by the prompt alone"),
        ("kontext", "--image a.png --strength 1", "strength: references are edited by the prompt alone"),
        ("fill", "", "is FLUX.1 Fill, which fills a hole in a picture: give --image and --mask"),
        ("fill", "--image a.png", "is FLUX.1 Fill, which fills a hole in a picture: give --image and --mask"),
        ("fill", "--image a.png --mask mask.png --reference b.png", "reference: "),
    ],
)
def test_what_cannot_be_drawn_is_told_before_a_model_is_loaded(
    pictures, folders, capsys, monkeypatch, model, flags, said
):
    monkeypatch.setattr("ppcoat.models.loading.load_transformer", lambda *_: pytest.fail("loaded"))
    assert generate(*flags.split(), model=folders.get(model, BASE)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (pictures / "output").exists()


def test_no_pipeline_of_an_earlier_round_holds_the_encoders(pictures, monkeypatch):
    monkeypatch.setattr(drawers, "AT_ONCE", 1)
    drawing = Drawing(
        str(BASE), ["a cat"], image="a.png", height=32, width=48, steps=1, max_sequence_length=16
    )
    drawer = FluxDrawer(FluxPipeline.from_pretrained(BASE, offload=True), [], None, Sight.of(drawing.files))
    assert len(list(drawer.drawn([drawing] * 2))) == 2
    assert drawer._made.keys() == {FluxPipeline, FluxImg2ImgPipeline}
    assert not any(pipeline.text_encoder_2 for pipeline in drawer._made.values())


def test_newbie_draws_from_no_picture(pictures, capsys):
    flags = ["--image", "a.png", "--output_dir", "out"]
    assert main(["generate", "--model", str(FIXTURES / "tiny_newbie"), "--prompt", "x", *flags]) == 2
    assert "image is for FLUX: NewBie draws from no picture; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "model", "flags", "note"),
    [
        ("flux.1_kontext", None, "", "was trained for FLUX.1 Kontext, to look at a reference"),
        ("flux.1_kontext", None, "--reference a.png", None),
        pytest.param("flux.1_kontext", "kontext", "--image a.png", None, marks=pytest.mark.slow),
        ("flux1", "kontext", "--image a.png", "was trained for another FLUX.1 than Kontext (flux1)"),
        pytest.param(None, "kontext", "--image a.png", None, marks=pytest.mark.slow),
        pytest.param("flux1", None, "", None, marks=pytest.mark.slow),
    ],
)
def test_a_lora_of_another_flux_is_told(pictures, folders, capsys, monkeypatch, said, model, flags, note):
    metadata = {"format": "pt"} | ({"ss_base_model_version": said} if said else {})
    tensors = load_file(FIXTURES / "adapters" / "split_diffusers.safetensors")
    save_file(tensors, "lora.safetensors", metadata=metadata)
    drawer = SimpleNamespace(drawn=lambda drawings: [[] for _ in drawings])
    monkeypatch.setattr("ppcoat.infer.generate.FluxDrawer", lambda *_: drawer)
    monkeypatch.setattr("ppcoat.infer.generate.put_loras", lambda *_: None)
    monkeypatch.setattr(
        "ppcoat.infer.generate.FluxPipeline", SimpleNamespace(from_pretrained=lambda *_, **__: None)
    )
    assert generate("--path_to_lora", "lora.safetensors", *flags.split(), model=folders.get(model, BASE)) == 0
    printed = capsys.readouterr().out
    assert printed.count("note: ") == (note is not None) and (note or "") in printed
