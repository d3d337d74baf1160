"""References and masks: found by name, checked before anything is loaded, cut and mirrored with their
pictures, told in the report, encoded once and batched with their like."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image, ImageOps

from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, build_cache
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import all_examples, data_report, scan_datasets
from ppcoat.errors import ConfigError

RNG = np.random.default_rng(0)


@pytest.fixture
def noise(tmp_path):
    """noise("b/x.png", (64, 32), "RGB") -> its path below tmp_path, random pixels; "L": black and white."""

    def noise(name, size=(64, 64), mode="RGB"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*size[::-1], len(mode)) if mode != "L" else size[::-1]
        pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels if mode != "L" else (pixels > 99).astype(np.uint8) * 255).save(path)
        return path

    return noise


@pytest.fixture
def scan(run_config, tmp_path):
    """scan(control_path="b", ...) -> the datasets of the pictures in a; paths are below tmp_path."""

    def scan(*, resolution=64, **settings):
        for key in ("control_path", "mask_path"):
            paths = settings.get(key, ())
            below = [str(tmp_path / each) for each in ([paths] if isinstance(paths, str) else paths)]
            if below:
                settings[key] = below if key == "control_path" else below[0]
        data = {"folder_path": str(tmp_path / "a"), "resolution": resolution, "bucket_step": 16}
        return scan_datasets(run_config(data | settings))

    return scan


def refusal(scan, tmp_path, **settings):
    with pytest.raises(ConfigError) as caught:
        scan(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


class Means:
    """Stands in for a VAE: latents are the pixels in cells of 8 x 8, so that a test sees what came."""

    def __init__(self):
        self.pictures = 0

    def image(self, pixels):
        self.pictures += len(pixels)
        return paddle.nn.functional.pixel_unshuffle(pixels, 8)

    def masked(self, pixels, masks):
        assert masks.dtype == paddle.uint8 and masks.shape[1] == 1
        return self.image(pixels * (1 - masks.astype("float32")))

    def encoders(self, fill=False):
        def text(captions):
            return paddle.ones([len(captions), 2, 3]), paddle.ones([len(captions), 3])

        return Encoders(self.image, text, "vae", "text", masked=self.masked if fill else None)


def cells(pixels):
    """[H, W, ...] uint8 -> what Means makes of it, for one picture."""
    tensor = paddle.to_tensor(pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)
    return Means().image(tensor[None])[0].numpy()


def rgb(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_files_are_found_by_name_in_the_same_subfolder_first(draw, noise, scan):
    for name in ("x.png", "sub/x.png", "sub/y.png", "é.png"):
        draw(f"a/{name}")
    files = [noise(f"b/{name}") for name in ("x.jpg", "sub/x.webp", "y.png", "é.jpg")]
    (dataset,) = scan(control_path="b")
    found = {str(each.item.image_path.relative_to(dataset.images.folder)): each.references[0][0].path
             for each in dataset.examples}  # fmt: skip
    assert found == dict(zip(["x.png", "sub/x.png", "sub/y.png", "é.png"], files, strict=True))


def test_a_file_that_is_another_pictures_is_nobody_elses(draw, noise, scan):
    draw("a/coats/x.png"), draw("a/hats/x.png")
    noise("b/hats/x.png")
    (dataset,) = scan(control_path="b")
    assert [len(each.references) for each in dataset.examples] == [0, 1]


def test_pictures_below_the_folder_of_references_are_not_their_own(draw, noise, scan):
    draw("a/x.png"), draw("a/y.png")
    before = noise("x.png")
    (dataset,) = scan(control_path=".")
    assert [[each.path for each, _ in one.references] for one in dataset.examples] == [[before], []]


def test_folders_of_references_and_masks_among_the_pictures_hold_none_to_train(draw, noise, scan):
    draw("a/x.png")
    noise("a/before/x.png"), noise("a/masks/x.png", mode="L")
    (dataset,) = scan(control_path="a/before", mask_path="a/masks")
    assert [each.image_path.name for each in dataset.images.items] == ["x.png"]
    assert dataset.images.notes == ()


def test_references_and_masks_are_cut_and_mirrored_with_their_picture(noise, scan, draw):
    """The wide files of three times the height lose a third at the left and at the right."""
    path = draw("a/x.png", (64, 64))
    before, mask = noise("b/x.png", (192, 64)), noise("m/x.png", (64, 64), "L")
    (dataset,) = scan(control_path="b", mask_path="m", flip_x=True, flip_y=True, mask_min_value=0.25)
    cache = build_cache(dataset.examples, Means().encoders())
    centre, white = rgb(before)[:, 64:128], np.asarray(Image.open(mask)) / 255
    for place, turned in enumerate((lambda a: a, np.fliplr, np.flipud, lambda a: np.fliplr(np.flipud(a)))):
        batch = cache.batch([place], np.random.default_rng(0))
        np.testing.assert_array_equal(batch["latents"][0], cells(turned(rgb(path))))
        np.testing.assert_array_equal(batch["reference_0"][0], cells(turned(centre)))
        weights = 0.25 + 0.75 * turned(white).reshape(8, 8, 8, 8).mean((1, 3))
        np.testing.assert_allclose(batch["loss_mask"][0], weights / weights.mean(), rtol=1e-6)


def test_a_fill_model_gets_the_hole_and_what_is_left(noise, scan, draw):
    path, mask = noise("a/x.png"), noise("m/x.png", mode="L")
    path.with_suffix(".txt").write_text("a")
    (dataset,) = scan(mask_path="m", invert_mask=True)
    batch = build_cache(dataset.examples, Means().encoders(fill=True)).batch([0], np.random.default_rng(0))
    hole = (np.asarray(Image.open(mask)) == 0).astype(np.uint8)
    np.testing.assert_array_equal(batch["mask"][0, 0], hole)
    left = paddle.to_tensor((rgb(path).astype(np.float32) / np.float32(127.5) - 1) * (1 - hole[..., None]))
    np.testing.assert_array_equal(
        batch["masked_latents"][0], Means().image(left.transpose([2, 0, 1])[None])[0]
    )
    assert "loss_mask" not in batch


def test_opacity_is_a_mask_and_the_colours_below_are_trained(noise, scan):
    path = noise("a/x.png", mode="RGBA")
    path.with_suffix(".txt").write_text("a")
    plain = noise("a/y.png")
    plain.with_suffix(".txt").write_text("a")
    (dataset,) = scan(alpha_mask=True)
    cache = build_cache(dataset.examples, Means().encoders())
    batch = cache.batch([0, 1], np.random.default_rng(0))
    pixels = np.asarray(Image.open(path))
    np.testing.assert_array_equal(batch["latents"][0], cells(pixels[..., :3]))
    weights = pixels[..., 3].astype(np.float64).reshape(8, 8, 8, 8).mean((1, 3))
    np.testing.assert_allclose(batch["loss_mask"][0], weights / weights.mean(), rtol=1e-5)
    np.testing.assert_array_equal(batch["loss_mask"][1], np.ones((8, 8)))  # it has none, and all of it counts
    assert "masks of 1 of 2 pictures" in data_report([dataset]) and "all counts: y.png" in data_report(
        [dataset]
    )


def test_transparent_references_lie_on_their_colour(noise, scan, draw, tmp_path):
    draw("a/x.png")
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(noise("b/x.png"))
    (black,), (red,) = scan(control_path="b"), scan(control_path="b", control_transparent_color=[255, 0, 0])
    for dataset, colour in ((black, (0, 0, 0)), (red, (255, 0, 0))):
        batch = build_cache(dataset.examples, Means().encoders()).batch([0], np.random.default_rng(0))
        np.testing.assert_array_equal(batch["reference_0"][0], cells(np.full((64, 64, 3), colour, np.uint8)))


def test_references_at_their_own_size_are_whole_and_batched_with_their_like(draw, noise, scan):
    """Never enlarged, made smaller where they have more pixels than the resolution allows, sides in 16ths."""
    for number, size in enumerate([(32, 64), (64, 32), (70, 35), (256, 128), (32, 64), None]):
        draw(f"a/{number}.png")
        if size:
            noise(f"b/{number}.png", size)
    (dataset,) = scan(control_path="b", full_size_control_images=False)
    sizes = [[size for _, size in each.references] for each in dataset.examples]
    assert sizes == [[(32, 64)], [(64, 32)], [(64, 32)], [(80, 32)], [(32, 64)], []]
    batches = ResumableBatches(dataset.examples, 2, 0)
    together = {tuple(sorted(next(batches))) for _ in range(40)}
    assert (0, 4) in together and (1, 2) in together
    assert all(sizes[i] == sizes[j] for i, j in together)
    cache = build_cache(dataset.examples, Means().encoders())
    for pair in together:
        batch = cache.batch(pair, np.random.default_rng(0))
        assert [name for name in batch if name.startswith("reference")] == ["reference_0"] * bool(
            sizes[pair[0]]
        )
    np.testing.assert_array_equal(
        cache.beside[0]["reference_0"], cells(rgb(dataset.examples[0].references[0][0].path))
    )


def test_several_references_keep_the_order_of_their_folders(draw, noise, scan):
    draw("a/x.png"), draw("a/y.png")
    b, c = noise("b/x.png"), noise("c/x.png")
    noise("c/y.png")
    (dataset,) = scan(control_path=["c", "b"])
    assert [each.path for each, _ in dataset.examples[0].references] == [c, b]
    cache = build_cache(dataset.examples, Means().encoders())
    np.testing.assert_array_equal(cache.beside[0]["reference_1"], cells(rgb(b)))
    assert list(cache.beside[1]) == ["reference_0"]
    said = "    2 references at the size of the picture beside 1 of 2 pictures; trained with fewer: y.png"
    assert said in data_report([dataset]).splitlines()


def test_a_reference_does_not_take_the_place_of_an_absent_one(draw, noise, scan, tmp_path):
    """Without the last one a picture is trained with fewer, without the first one it is no pair."""
    draw("a/x.png"), draw("a/y.png")
    first, second = noise("b/x.png"), noise("c/y.png")
    last = noise("c/x.png")
    message = refusal(scan, tmp_path, control_path=["b", "c"])
    assert "y.png: b has no reference for it and a later control_path has one" in message
    (dataset,) = scan(control_path=["b", "c"], skip_bad=True)
    assert [[each.path for each, _ in one.references] for one in dataset.examples] == [[first, last]]
    second.unlink(), last.unlink()
    noise("b/y.png")
    noise("c/y.png")
    (dataset,) = scan(control_path=["b", "c"])
    assert [len(one.references) for one in dataset.examples] == [1, 2]


def test_a_store_knows_them_by_what_they_hold(draw, noise, scan, tmp_path):
    draw("a/x.png"), noise("b/x.png"), noise("m/x.png", mode="L")

    def encoded(fill=False, **settings):
        means, store = Means(), EmbeddingStore(tmp_path / "cache")
        build_cache(all_examples(scan(**settings)), means.encoders(fill), store=store)
        return means.pictures

    assert encoded(control_path="b") == 2
    assert encoded(control_path="b") == 0
    assert encoded(control_path="b", control_transparent_color=[1, 1, 1]) == 1
    assert encoded(mask_path="m") == 0  # the weights of a loss are no latents
    assert encoded(fill=True, mask_path="m") == 1
    assert encoded(fill=True, mask_path="m", invert_mask=True) == 1
    noise("m/x.png", mode="L"), noise("b/x.png")
    assert encoded(fill=True, mask_path="m") == 1 and encoded(control_path="b") == 1
    assert encoded(fill=True, mask_path="m", control_path="b") == 0


def test_what_a_resumed_run_compares_knows_them(draw, noise, scan):
    for number in range(2):
        draw(f"a/{number}.png"), noise(f"b/{number}.png")
    plain, paired = (
        ResumableBatches(all_examples(scan(**more)), 1, 0) for more in ({}, {"control_path": "b"})
    )
    assert "sizes, repeats" in paired.difference(plain.state_dict())
    before = paired.state_dict()
    noise("b/1.png", (80, 80))
    again = ResumableBatches(all_examples(scan(control_path="b")), 1, 0)
    assert again.difference(before) is None and again.has_other_contents(before)


def test_the_report_says_what_is_there_what_lacks_and_what_looks_odd(draw, noise, scan):
    for number in range(8):
        draw(f"a/{number}.png")
    noise("b/0.png", (64, 32)), noise("b/1.png")
    Image.new("L", (64, 64), 0).save(noise("m/0.png"))
    Image.new("L", (64, 64), 255).save(noise("m/1.png"))
    Image.new("L", (64, 64), 51).save(noise("m/2.png"))
    lines = data_report(scan(control_path="b", mask_path="m")).splitlines()
    assert lines[2:7] == [
        "    a reference at the size of the picture beside 2 of 8 pictures; trained without: 2.png, 3.png, "
        "4.png, 5.png, 6.png and 1 more",
        "    warning: 1 reference is cropped by more than 10%, most 0.png (50%); full_size_control_images: "
        "false shows them whole",
        "    masks of 3 of 8 pictures, white 0% to 100%; without one, all counts: 3.png, 4.png, 5.png, "
        "6.png, 7.png",
        "    warning: masks that are empty, as if there were none; of: 0.png",
        "    warning: masks that are full; of: 1.png",
    ]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"control_path": "none"}, "datasets[].control_path none does not exist; give a folder of files"),
        ({"control_path": "a/x.png"}, "datasets[].control_path a/x.png is a file"),
        ({"control_path": "a"}, "datasets[].control_path a is the folder of the pictures; give another one"),
        ({"control_path": "m_empty"}, "no picture in a has a reference in m_empty: that has the name of its"),
        ({"mask_path": "empty"}, "no picture in a has a mask in empty: check datasets[].mask_path"),
        ({"alpha_mask": True}, "no picture in a has a mask in its alpha channel: check datasets[]"),
        ({"mask_path": "m_black"}, "all 1 masks of a are empty: white marks what counts, here none of"),
        ({"mask_path": "m_white"}, "all 1 masks of a are full: white marks what counts, here all of"),
        ({"mask_path": "m_white", "invert_mask": True}, "all 1 masks of a are empty: black marks what"),
        ({"mask_path": "m_wide"}, "1 problem in a: x.png: its mask m_wide/x.png is 64 x 32 and the picture "
         "64 x 64: wanted the same aspect; fix these files or set skip_bad: true for this folder in "
         "datasets"),
        ({"mask_path": "m_text"}, "its mask m_text/x.png: the picture cannot be decoded"),
        ({"mask_path": "m_01"}, "its mask m_01/x.png has values from 0 to 1: wanted 255 for what"),
        ({"control_path": "m_text"}, "its reference m_text/x.png: the picture cannot be decoded"),
        ({"control_path": "m_tiny"}, "its reference m_tiny/x.png is 15 x 64; wanted at least 16 each way"),
        ({"control_path": "m_two"}, "x.jpg and x.png in m_two both have its name: keep one"),
        ({"mask_path": "m_text", "skip_bad": True}, "no usable picture is left"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line_with_names(draw, noise, scan, tmp_path, settings, part):
    draw("a/x.png")
    for folder in ("empty", "m_empty"):
        noise(f"{folder}/other.png")
    Image.new("L", (64, 64), 0).save(noise("m_black/x.png"))
    Image.new("L", (64, 64), 255).save(noise("m_white/x.png"))
    Image.new("L", (64, 64), 1).save(noise("m_01/x.png"))
    noise("m_wide/x.png", (64, 32), "L"), noise("m_tiny/x.png", (15, 64))
    noise("m_text/x.png").write_text("none")
    noise("m_two/x.png"), noise("m_two/x.jpg")
    assert part in refusal(scan, tmp_path, **settings)


def test_bad_companions_may_be_skipped_with_their_pictures(draw, noise, scan, caplog):
    for name in "xy":
        draw(f"a/{name}.png"), noise(f"b/{name}.png")
    Path(noise("b/x.png")).write_text("none")
    (dataset,) = scan(control_path="b", skip_bad=True)
    assert [each.item.image_path.name for each in dataset.examples] == ["y.png"]
    assert "x.png: its reference" in caplog.text and "1 bad file left out" in data_report([dataset])


def test_a_mask_turned_by_its_exif_and_one_a_pixel_off_fit(draw, noise, scan, tmp_path):
    draw("a/x.png", (64, 32))
    image = Image.new("L", (33, 65), 0)
    image.paste(255, (0, 0, 10, 65))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "m/x.jpg"
    path.parent.mkdir()
    image.save(path, exif=exif, quality=95)
    (dataset,) = scan(mask_path="m")
    loaded = dataset.examples[0].mask.load((64, 32), False, False)
    upright = np.asarray(ImageOps.fit(image.transpose(Image.Transpose.ROTATE_270), (64, 32))) / 255
    assert loaded.shape == (32, 64) and np.abs(loaded - upright).mean() < 0.03
