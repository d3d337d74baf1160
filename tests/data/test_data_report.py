"""The report: right counts, a warning where much is cropped, and short whatever the folders hold."""

from ppcoat.data.examples import data_report, scan_datasets


def test_counts_captions_and_crops_are_those_of_the_folder(draw, run_config, tmp_path):
    for number in range(3):
        draw(f"a/{number}.png", (640, 640), "a [trigger] shirt")
    draw("a/5_wide/w.png", (3000, 2000), "no word")
    draw("a/no_caption.png", (640, 640), None)
    (tmp_path / "a/bad.png").write_bytes(b"no picture")
    draw("reg/r.png", (640, 640), "a dress")
    config = run_config(
        {"folder_path": str(tmp_path / "a"), "resolution": 512, "default_caption": "thing", "skip_bad": True},
        {"folder_path": str(tmp_path / "reg"), "resolution": 512, "is_reg": True, "flip_x": True},
        trigger_word="sks",
    )
    lines = data_report(scan_datasets(config)).splitlines()
    assert lines[0] == "data: 7 pictures to encode, 11 per epoch"
    assert lines[1] == (
        f"  {tmp_path}/a at 512: 5 pictures, each 1 to 5 times, 1 without a caption of their own, "
        "trigger 'sks' written in 3 of 5, put in front of the others, 1 bad file left out"
    )
    assert lines[2] == (  # a trigger word is put in front of no regularisation picture
        f"  regularisation: {tmp_path}/reg at 512: 1 picture, copies by flip_x, all with captions, "
        "trigger 'sks' written in 0 of 1"
    )
    assert lines[4].split() == ["512", "x", "512", "6", "0.0%", "0.0%"]
    # 3:2 in 576 x 448: 1 - (576 / 448) / 1.5 = 14.3 %
    assert lines[5].split() == ["576", "x", "448", "1", "14.3%", "14.3%"]
    assert lines[6].startswith("  warning: 1 picture will be cropped by more than 10%, most w.png (14%)")
    assert lines[7] == (
        "  warning: 4 pictures are the same file as another, e.g. 0.png and 1.png: they count more than "
        "once; remove one, or say so by num_repeats"
    )
    assert lines[8:] == [
        "  caption of 0.png: a sks shirt",
        "  caption of w.png: sks no word",
        "  caption of r.png: a dress",
    ]


def test_there_is_no_warning_at_ten_per_cent_or_less(draw, run_config, tmp_path):
    draw("a/x.png", (1920, 1080))  # 704 x 384: 3 %
    report = data_report(scan_datasets(run_config({"folder_path": str(tmp_path / "a")})))
    assert "cropped by" not in report and "3.0%" in report and "trigger" not in report
    draw("b/x.png", (96, 64))  # 80 x 48: 10 %, but for the rounding of floats
    report = data_report(scan_datasets(run_config({"folder_path": str(tmp_path / "b"), "resolution": 64})))
    assert "cropped by" not in report and "10.0%" in report


def test_it_stays_short_and_printable(draw, run_config, tmp_path):
    for number in range(20):
        draw(f"a/{number}.png", (64 + 16 * number, 64), "very long " * 50)
    draw("a/line\nend.png", (64, 64), "two\nlines \x1b[31m")
    config = run_config(*[{"folder_path": str(tmp_path / "a"), "resolution": [64, 128, 256]}] * 4)
    lines = data_report(scan_datasets(config)).splitlines()
    assert len(lines) <= 25
    assert all(line.isprintable() and len(line) <= 250 for line in lines)
    assert any("... and 7 more datasets" in line for line in lines)
    assert any("more buckets" in line for line in lines)


def test_notes_small_pictures_and_guessed_captions_come_to_the_user(draw, run_config, tmp_path):
    for number in range(5):
        draw(f"a/{number}.png", (64, 64), "a dress")
    draw("a/dot.png", (1, 1), "a dot")
    (tmp_path / "a/3.txt").write_bytes("\u8d64\u3044\u30c9\u30ec\u30b9".encode("cp932"))
    (tmp_path / "a/x.gif").write_bytes(b"GIF89a")
    report = data_report(scan_datasets(run_config({"folder_path": str(tmp_path / "a"), "resolution": 64})))
    assert "1 picture smaller than the size of training, most dot.png (1 x 1 for 16 x 16)" in report
    assert "  note: files of other formats left out: 1 .gif; wanted JPEG, PNG or WebP" in report
    assert report.splitlines()[-3].startswith("  caption of 3.png: ")
