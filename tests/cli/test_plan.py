"""The plan command: its table is the one in the configs, and its advice is lines that a config takes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ppcoat.cli.main import main
from ppcoat.cli.plan import cards_table, plan_table, settings_yaml
from ppcoat.config.load import load_config
from ppcoat.plan import phases
from ppcoat.plan.phases import MemoryModel, Settings
from ppcoat.plan.settings import as_given, plan, with_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("flux_lora_*gb.yaml"))
SETTINGS = Settings("coat+recompute", 12, "fp8", 30, 2, 3)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_table_in_a_config_is_what_the_command_makes(file, monkeypatch):
    monkeypatch.setattr(phases, "gpu_place", lambda device: None)  # written where no card is at hand
    text = file.read_text(encoding="utf-8")
    written = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    planned = plan(load_config(file), MemoryModel)
    assert plan_table(planned).splitlines() == written
    card = int(file.stem.removeprefix("flux_lora_").removesuffix("gb"))
    assert planned.total <= card * 1e9
    assert (planned.settings.blocks_to_swap == 0) == (card > 8)


def test_there_is_a_config_for_each_card():
    stems = {file.stem for file in CONFIGS}
    assert stems == {f"flux_lora_{gb}gb" for gb in (8, 12, 16, 24, 48)}


def test_the_table_of_cards_is_what_the_command_makes(capsys, monkeypatch):
    """Of its rows those of 1024 px on 8, 12 and 24 GB."""
    monkeypatch.setattr(phases, "gpu_place", lambda device: None)
    page = (CONFIGS[0].parents[1] / "docs" / "small_cards.md").read_text(encoding="utf-8").splitlines()
    config = CONFIGS[0].with_name("flux_lora_12gb.yaml")
    given = ["--set", "train.gradient_accumulation=1", "--cards", "8", "12", "24", "--pictures", "1024"]
    assert main(["plan", str(config), *given]) == 0
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert page[page.index(head) + 1] == line and len(rows) == 3 and set(rows) <= set(page)


def test_the_table_of_cards_shows_batches_where_an_update_has_several_pictures():
    head, _, *rows = cards_table(load_config(CONFIGS[0], ["train.gradient_accumulation=2"]), [3, 24], [512])
    assert head.endswith("| planned peak | batch |") and {row.count("|") for row in rows} == {10}
    assert "the smallest possible need is" in rows[0] and rows[1].endswith("| 2 x 1 |")


def test_the_rows_add_up_to_the_total():
    lines = plan_table(plan(load_config(CONFIGS[0]), MemoryModel)).splitlines()
    body = [
        line
        for line in lines
        if line[:5] not in ("GB, p", "polic", "at mo", "flash", "plann") and "parameters" not in line
    ]
    columns = zip(*(line[22:].split() for line in body), strict=True)
    for *parts, total in columns:
        assert sum(float(x) for x in parts if x != "-") == pytest.approx(float(total), abs=0.03)


def test_the_advice_is_read_back_as_the_choice(tmp_path):
    given = yaml.safe_load(CONFIGS[0].read_text(encoding="utf-8"))
    for section, values in yaml.safe_load(settings_yaml(SETTINGS)).items():
        given[section] = given[section] | values
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    config = load_config(file)
    assert as_given(config, 57) == SETTINGS
    assert as_given(with_settings(load_config(CONFIGS[0]), SETTINGS), 57) == SETTINGS


def test_the_command_prints_table_and_config_lines(tmp_path, capsys):
    assert main(["plan", str(CONFIGS[1]), "--vram", "16", "--set", "coat.enabled=false"]) == 0
    shown = capsys.readouterr().out
    assert "11,901,408,320 parameters" in shown and "not a measurement" in shown
    assert "blocks_to_swap:" in shown and "policy: none" in shown


def test_a_budget_that_nothing_fits_is_one_line(capsys):
    assert main(["plan", str(CONFIGS[0]), "--vram", "3", "--set", "coat.enabled=false"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "smallest possible need" in shown.err


def test_lightning_has_a_table_for_each_base_and_the_page_its_numbers(capsys, monkeypatch):
    monkeypatch.setattr(phases, "gpu_place", lambda device: None)
    assert main(["plan", "lightning", "--vram", "48"]) == 0
    shown = capsys.readouterr().out
    assert "57 heads of 18,895,873 parameters" in shown and "at most 4096 image tokens" in shown
    assert shown.count("fits into 48 GB: ") == 3
    page = (CONFIGS[0].parents[1] / "docs" / "small_cards.md").read_text(encoding="utf-8")
    totals = [line.split()[1:] for line in shown.splitlines() if line.startswith("total")]
    for base, (_, _, window, heads, update, lora, *_), peak in zip(
        ("bf16", "FP8", "FP4 (`--quantize fp4`)"),
        totals,
        re.findall("planned peak: (.*)", shown),
        strict=True,
    ):
        assert f"| {base} | {window} GB | {heads} GB | {update} GB | {lora} GB | {peak} |" in page
    assert all(f"{base}, batch" in shown for base in ("base not quantised", "FP8 base", "FP4 base"))


def test_the_peak_above_the_config_in_ai_toolkits_form_is_planned(monkeypatch):
    monkeypatch.setattr(phases, "gpu_place", lambda device: None)
    file = CONFIGS[0].with_name("coat_flux_lora.yaml")
    planned = plan(load_config(file, ["device=gpu"]), MemoryModel)
    assert f"planned peak: {planned.total / 1e9:.1f} GB" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lightning", "--resolution", "1000"], "resolution: came 1000"),
        (["lightning", "--vram", "0"], "vram: came 0"),
        (["lightning", "--set", "train.steps=3"], "--set, --cards and --pictures are for a config file"),
        ([str(CONFIGS[0]), "--resolution", "512"], "--resolution is for plan lightning"),
        ([str(CONFIGS[0]), "--pictures", "512"], "--pictures is for the table of --cards"),
        ([str(CONFIGS[0]), "--cards", "12", "0"], "vram: came 0"),
        ([str(CONFIGS[0]), "--cards", "12", "--vram", "8"], "--vram and --cards both say"),
        (
            [str(CONFIGS[0]), "--cards", "12", "--pictures", "500"],
            "--pictures: came 500, wanted multiples of 16",
        ),
        (["generate", "--cards", "12"], "no --set, --cards, --pictures and --resolution"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err and shown.err.count("\n") == 1


def test_a_model_that_draws_after_a_picture_is_refused_as_in_training(tmp_path, capsys):
    folder = shutil.copytree(Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32", tmp_path / "control")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 128, "out_channels": 64}))
    assert main(["plan", str(CONFIGS[0]), "--set", f"model.name_or_path={folder}"]) == 2
    error = capsys.readouterr().err
    assert "sees a picture beside the noise (128 inputs a token, wanted 64)" in error
    assert error.count("\n") == 1


def test_a_plan_for_a_cpu_says_what_its_allocator_adds(capsys):
    assert main(["plan", str(CONFIGS[0]), "--set", "device=cpu", "--set", "coat.enabled=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "freed blocks below 32 MiB stay with it" in lines[2] and len(lines[2]) <= 108


def test_a_newbie_config_has_its_own_table_and_advice(capsys):
    file = CONFIGS[0].with_name("newbie_lora.toml")
    flags = ["--set", "datasets.0.resolution=512", "--set", "model.name_or_path=no/such/model"]
    flags += ["--set", "model.quantize=false"]
    assert main(["plan", str(file), "--vram", "24", *flags]) == 0
    shown = capsys.readouterr().out
    assert "NewBie-image 3B's shapes" in shown and "3,486,636,096 parameters" in shown
    assert '[coat.activation]\npolicy = "none"' in shown and "[train]\nbatch_size = 1\n" in shown
