"""Datasets of a run laid out as examples: sizes, repeats, flips, regularisation, trigger words."""

import ppcoat.data.examples as examples_module
from ppcoat.data.examples import all_examples, scan_datasets


def test_datasets_keep_their_own_settings(draw, run_config, tmp_path):
    draw("a/wide.png", (128, 64), "a [trigger]")
    draw("a/10_tall/tall.png", (64, 128), "b")
    draw("a/3d_render/square.png", (64, 64), "c")
    draw("reg/r.png", (64, 64), "a dress")
    config = run_config(
        {"folder_path": str(tmp_path / "a"), "resolution": 64, "num_repeats": 2},
        {"folder_path": str(tmp_path / "reg"), "resolution": 32, "is_reg": True, "caption_dropout_rate": 0.5},
        trigger_word="sks",
    )
    tall, square, wide, reg = all_examples(scan_datasets(config))
    assert [e.item.image_path.name for e in (tall, square, wide)] == ["tall.png", "square.png", "wide.png"]
    assert (wide.size, tall.size, square.size, reg.size) == ((80, 48), (48, 80), (64, 64), (32, 32))
    assert (wide.repeats, tall.repeats, square.repeats, reg.repeats) == (2, 20, 2, 1)
    assert [e.captions for e in (wide, tall, reg)] == [("a sks",), ("sks b",), ("a dress",)]
    assert [e.is_reg for e in (wide, reg)] == [False, True]
    assert [e.caption_dropout_rate for e in (wide, reg)] == [0.0, 0.5]


def test_a_list_of_resolutions_trains_each_picture_at_each_and_reads_the_folder_once(
    draw, run_config, tmp_path, monkeypatch
):
    draw("a/x.png", (128, 128))
    calls = []
    scan = examples_module.scan_folder
    monkeypatch.setattr(examples_module, "scan_folder", lambda *asked: calls.append(asked) or scan(*asked))
    found = all_examples(
        scan_datasets(run_config({"folder_path": str(tmp_path / "a"), "resolution": [64, 128]}))
    )
    assert [e.size for e in found] == [(64, 64), (128, 128)] and len(calls) == 1


def test_flips_add_copies_and_both_give_four(draw, run_config, tmp_path):
    draw("a/x.png")
    draw("a/y.png")
    both = run_config({"folder_path": str(tmp_path / "a"), "resolution": 64, "flip_x": True, "flip_y": True})
    found = all_examples(scan_datasets(both))
    assert [(e.flip_x, e.flip_y) for e in found] == [
        (x, y) for y in (False, True) for x in (False, True) for _ in range(2)
    ]


def test_a_trigger_word_of_its_own_and_variants(draw, run_config, tmp_path):
    draw("a/x.png", caption="red, silk, long")
    folder = {"folder_path": str(tmp_path / "a"), "resolution": 64}
    config = run_config(
        {**folder, "trigger_word": "ohwx"},
        {**folder, "shuffle_tokens": True, "caption_variants": 4},
        trigger_word="sks",
    )
    own, shuffled = all_examples(scan_datasets(config))
    assert own.captions == ("ohwx red, silk, long",)
    assert len(shuffled.captions) == 4 and all(c.startswith("sks ") for c in shuffled.captions)
