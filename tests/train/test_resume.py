"""Going on under other settings: what may change does at once, what may not is refused by name."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from changed_settings import Resumed, write_data
from PIL import Image
from safetensors.numpy import load_file, save_file

from ppcoat.cli.main import main
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.examples import Example
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError
from ppcoat.optim import lr_scheduler
from ppcoat.train import resume
from ppcoat.train.base_model import base_identity
from ppcoat.train.checkpoint import in_its_folder, load_latest, save_run
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.report import SigmaBins
from ppcoat.train.resume import Start, check_resume
from ppcoat.train.run import train_lora
from ppcoat.train.run_state import Records, RunState

FLUX = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"


def test_a_moved_run_goes_on_with_another_rate_a_mean_and_one_picture_more(make_config, tmp_path, capfd):
    config = make_config("train.steps=2", "train.lr=1e-3")
    train_lora(config)
    garments.write_folder(tmp_path / "more", 1, seed=9, motif="gold star", prefix="")
    for file in (tmp_path / "more").iterdir():
        shutil.copy(file, tmp_path / "data" / f"more{file.suffix}")
    moved = tmp_path / "elsewhere" / "coats"
    shutil.move(config.run_dir, moved)
    again = ["train", "--config", str(moved / "config.yaml"), "--set", "train.steps=3",
             "--set", "train.lr=1e-4", "--set", "train.ema.use_ema=true"]  # fmt: skip
    assert main([*again, "--restart-data"]) == 0
    assert "restart_data: false" in (moved / "config.yaml").read_text()  # it was allowed this once
    said = capfd.readouterr().out
    assert f"this run's folder was {config.run_dir}; it goes on in {moved}" in said
    assert f"resuming from {moved}/checkpoints/000000002: 1 of 3 steps are left" in said
    for part in ("train.lr 0.001 -> 0.0001", "train.steps 2 -> 3", "copy counts) was 6 and is 7 now",
                 "rate is now 0.0001", "; anew: the order of the pictures and the running mean"):  # fmt: skip
        assert part in said, part
    rates = [json.loads(line)["lr"] for line in (moved / "log.jsonl").read_text().splitlines()]
    assert rates == [1e-3, 1e-3, 1e-4]  # the first resumed step has the new one
    assert load_latest(moved).step == 3 and (moved / "coats.safetensors").is_file()


def test_what_changed_is_refused_before_anything_is_loaded_or_told(make_config, tmp_path, monkeypatch, capfd):
    base = "seed=0", "train.batch_size=2", "network.linear=4"
    train_lora(make_config("train.steps=1", *base))
    next((tmp_path / "data").glob("*.txt")).write_text("a hat")
    train_lora(make_config("train.steps=2", *base))
    said = capfd.readouterr().out
    assert "changed since then: train.steps 1 -> 2, data: 1 caption changed (" in said
    monkeypatch.setattr(FluxSpec, "load_encoders", None)  # a call would be another error
    for change, part in {
        "network.linear=8": "network.linear was 4 in the checkpoint and is 8 now",
        "train.batch_size=1": "was 2 and is 1 now (train.batch_size 2 -> 1); set it back, add --restart_data",
        "seed=7": "the seed was 0 and is 7 now",
        "coat.optimizer.use_fp8=false": "FP8 optimizer states",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(part)):
            train_lora(make_config("train.steps=2", *base, change))


def test_only_the_own_config_of_a_moved_folder_is_followed(make_config, tmp_path):
    config, folder = make_config(), tmp_path / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    own = folder / "config.yaml"
    assert in_its_folder(config, own).run_dir == folder
    assert in_its_folder(config, folder / "mine.yaml") == config
    assert in_its_folder(config, own, ["output_dir=elsewhere"]) == config
    (config.run_dir / "checkpoints").mkdir(parents=True)  # a new run under the old name
    assert in_its_folder(config, own).run_dir == folder
    assert in_its_folder(config, config.run_dir / "config.yaml") == config


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """(folder with data, settings of a run on it, Resumed): two folders of two pictures, the second with
    masks and references, and one of two for regularisation."""
    write_data(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    more = {"folder_path": f"{tmp_path}/more", "mask_path": f"{tmp_path}/masks", "resolution": 64,
            "control_path": [f"{tmp_path}/references"]}  # fmt: skip
    reg = {"folder_path": f"{tmp_path}/copy/pictures", "resolution": 64, "is_reg": True}
    config = RunConfig.model_validate({
        "name": "run", "output_dir": str(tmp_path), "model": {"name_or_path": str(FLUX)},
        "network": {"linear": 2}, "datasets": [{"folder_path": f"{tmp_path}/pictures", "resolution": 64},
                                               more, reg]})  # fmt: skip
    return tmp_path, config, Resumed(tmp_path)


def repaint(path):
    """One pixel, in a file of the same size."""
    pixels, size = np.array(Image.open(path)), path.stat().st_size
    for number in range(64):
        pixels[0, 0, 0] += 1
        Image.fromarray(pixels).save(path, compress_level=number % 10)
        if path.stat().st_size == size:
            return


def test_each_picture_caption_mask_and_reference_that_changed_is_named(settled, capsys):
    folder, config, resumed = settled
    resumed.save(config)
    assert "changed" not in resumed.go_on(config, capsys)
    repaint(folder / "pictures" / "pictures0.png")
    (folder / "more" / "more1.txt").write_text("a cat, green, small")  # of the same length
    repaint(folder / "masks" / "more0.png")
    repaint(folder / "references" / "more0.png")
    repaint(folder / "copy" / "pictures" / "pictures1.png")
    (folder / "copy" / "pictures" / "pictures0.txt").write_text("a cat, green, small")
    said = resumed.go_on(config, capsys)
    for part in ("1 picture changed (pictures0.png)", "1 caption changed (more1.png)", "1 mask changed",
                 "1 reference changed (more0.png)", "1 regularisation picture changed (pictures1.png)",
                 "1 regularisation caption changed (pictures0.png)"):  # fmt: skip
        assert part in said, part
    assert len(said.splitlines()) == 2 and "changed since then: data: " in said


def test_of_very_many_pictures_it_is_told_only_whether_they_changed(settled, capsys, monkeypatch):
    folder, config, resumed = settled
    monkeypatch.setattr(resume, "MOST_NAMED", 1)
    resumed.save(config)
    assert "changed" not in resumed.go_on(config, capsys)
    (folder / "copy" / "pictures" / "pictures0.txt").write_text("a cat")
    assert "data: files of the regularisation pictures changed; weights" in resumed.go_on(config, capsys)


def test_new_and_missing_pictures_are_named_where_the_order_may_stay_and_where_it_may_not(settled, capsys):
    folder, config, resumed = settled
    resumed.save(config)
    for ending in ("png", "txt"):
        (folder / "pictures" / f"pictures1.{ending}").rename(folder / "pictures" / f"renamed.{ending}")
    said = resumed.go_on(config, capsys)
    assert "data: 1 picture new (renamed.png), 1 picture gone (pictures1.png)" in said
    for number in range(4):
        for ending in ("png", "txt"):
            shutil.copy(folder / "pictures" / f"renamed.{ending}", folder / "pictures" / f"{number}.{ending}")
    with pytest.raises(ConfigError) as refused:
        resumed.go_on(config, capsys)
    assert "(data: 5 pictures new (0.png, 1.png, 2.png and 2 more), 1 picture gone (pic" in str(refused.value)
    said = resumed.go_on(config, capsys, restart_data=True)
    assert "was 6 and is 10 now, data: 5 pictures new" in said and "anew: the order of the pict" in said
    fewer = config.model_copy(update={"datasets": config.datasets[:1]})
    with pytest.raises(ConfigError, match="datasets 3 entries -> 1 entry, data: .* 2 regularisation"):
        resumed.go_on(fewer, capsys)


def test_moved_folders_of_the_same_pictures_are_not_spoken_of(settled, capsys):
    folder, config, resumed = settled
    resumed.save(config)
    for name in ("pictures", "more", "masks", "references"):
        shutil.move(folder / name, folder / "moved" / name)
    moved = config.model_dump(mode="json")
    text = json.dumps(moved["datasets"]).replace(f"{folder}/", f"{folder}/moved/")
    moved["datasets"] = json.loads(text.replace("moved/copy", "copy"))
    assert "changed" not in resumed.go_on(RunConfig.model_validate(moved), capsys)


@pytest.mark.parametrize(
    ("optimizer", "key", "values"),
    [("schedulefree_adamw", "train.beta1", (0.9, 0.8)), ("prodigy", "train.prodigy.d0", (1e-6, 1e-5)),
     ("adafactor", "train.adafactor.beta1", (0.0, 0.9)), ("adamw", "train.beta1", (0.9, 0.0))],
)  # fmt: skip
def test_what_an_optimizers_states_are_made_with_stays(settled, capsys, optimizer, key, values):
    _, config, resumed = settled
    *sections, name = key.removeprefix("train.").split(".")

    def with_value(value):
        data = config.model_dump(mode="json")
        data["train"] = {"optimizer": optimizer} | (
            {sections[0]: {name: value}} if sections else {name: value}
        )
        return RunConfig.model_validate(data)

    first, second = map(with_value, values)
    resumed.save(first)
    assert "changed" not in resumed.go_on(first, capsys)
    with pytest.raises(ConfigError, match=f"{key} was {values[0]} .* is {values[1]} now; set it back"):
        resumed.go_on(second, capsys)


def test_what_an_earlier_version_did_not_record_is_said_and_its_base_is_known_still(settled, capsys):
    folder, config, resumed = settled
    weights = {"vae": "a", "transformer": "b"}
    state, plain = resumed.state(config)
    state.records = Records({"of.another.kind": 1})  # those of FLUX-Lightning had settings of a LoRA run
    base = base_identity(FLUX)
    state.compatible = state.compatible | {"base": base}
    save_run(state, plain)
    (folder / "more" / "more1.txt").write_text("a longer caption")
    said = resumed.go_on(config, capsys, weights)
    assert (
        "the checkpoint is of an earlier version, and changes of these cannot be seen: its settings, VAE"
        in said
    )
    assert "captions, names or files of the same number of pictures" in said
    state.compatible = state.compatible | {"base": base[::-1]}
    save_run(state, plain)
    with pytest.raises(ConfigError, match="transformer of .* changed"):
        resumed.go_on(config, capsys, weights)


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(settled, capsys):
    _, config, resumed = settled
    state, plain = resumed.state(config)
    for key in ("train.loss_type", "train.max_grad_norm", "model.quantize", *resume._NOT_KEPT):
        del state.records.settings[key]
    save_run(state, plain)
    config = config.model_copy(update={"device": "cpu"})  # as it may have been then
    assert "changed" not in resumed.go_on(config, capsys)
    other = config.model_copy(update={"train": config.train.model_copy(update={"loss_type": "mae"})})
    assert "changed since then: train.loss_type 'mse' -> 'mae'; weights" in resumed.go_on(other, capsys)


@pytest.fixture
def start_on(settled, monkeypatch):
    """start_on(ranks, weights): what a start compares before anything is loaded, with such fingerprints."""
    _, config, resumed = settled

    def start(ranks, weights):
        state, plain = resumed.state(config)
        monkeypatch.setattr(resume, "fingerprints", lambda *_: weights)
        check_resume(plain, Start(state.compatible, state.batches, state.records), [], {}, ranks)

    return start


def test_ranks_with_other_models_do_not_start(start_on):
    seen = []

    class OneOfTwo(Ranks):
        def agree(self, facts):
            seen.append(facts)

    for vae in ("a", "b"):
        start_on(OneOfTwo(), {"vae": vae, "transformer": "c"})
    assert [name for name in seen[0] if seen[0][name] != seen[1][name]] == ["the content of vae"]


def test_an_old_run_in_the_folder_of_another_machine_is_passed_over(settled, start_on):
    _, config, resumed = settled
    resumed.save(config.model_copy(update={"network": config.network.model_copy(update={"linear": 8})}))
    start_on(Ranks(1, 2), {"vae": "a"})
    with pytest.raises(ConfigError, match="network.linear was 8"):
        start_on(Ranks(0, 2), {"vae": "a"})


def change_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def test_another_base_is_refused_before_it_is_loaded_and_a_moved_or_quantised_one_goes_on(
    make_config, tmp_path, monkeypatch
):
    def at(name, *more):
        return make_config("train.steps=1", f"model.name_or_path={tmp_path / name}", *more)

    shutil.copytree(FLUX, tmp_path / "model")
    train_lora(at("model"))
    shutil.move(tmp_path / "model", tmp_path / "renamed")

    def load(*_):
        raise StopIteration  # so far a run went on

    monkeypatch.setattr(FluxSpec, "load_encoders", load)
    for name, more in (("renamed", ()), ("renamed", ("model.quantize=nf4",))):
        with pytest.raises(StopIteration):
            train_lora(at(name, *more))
    for part in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        (file,) = (tmp_path / "renamed" / part).glob("*.safetensors")
        whole = file.read_bytes()
        change_a_byte(file)
        with pytest.raises(ConfigError, match=f"base model are not those .*: {part} of .*renamed changed"):
            train_lora(at("renamed"))
        file.write_bytes(whole)
    settings = tmp_path / "renamed" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 9}))
    with pytest.raises(ConfigError, match="those that the checkpoint was trained on: tokenizer of"):
        train_lora(at("renamed"))


def test_encodings_on_disk_are_of_these_very_encoders(make_config, tmp_path):
    shutil.copytree(FLUX, tmp_path / "model")
    config = make_config(f"model.name_or_path={tmp_path / 'model'}", "datasets.0.cache_to_disk=true")
    before = FluxSpec().encoders(config, Mock())
    (file,) = (tmp_path / "model" / "text_encoder_2").glob("*.safetensors")
    change_a_byte(file)
    now = FluxSpec().encoders(config, Mock())
    assert now.image_identity == before.image_identity and now.text_identity != before.text_identity


def test_a_base_is_known_by_its_weights_and_not_by_the_name_of_its_folder(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        (folder / "transformer").mkdir(parents=True)
        save_file({"w": np.ones([4], np.float32)}, folder / "transformer" / "model.safetensors")
    first, second = map(base_identity, folders)
    assert first == second
    file = folders[0] / "transformer" / "model.safetensors"
    save_file({"w": load_file(file)["w"] * 2}, file)
    assert base_identity(folders[0]) != first


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_rate_and_schedule_are_those_of_the_run_that_goes_on(scheduler):
    def state(rate, steps, name):
        schedule = lr_scheduler(name, rate, steps)
        batches = ResumableBatches([Example(Item(Path("a.png"), "a", 64, 64), (64, 64), ("a",))], 1, 0)
        return RunState({}, _NoOptimizer(), schedule, batches, SigmaBins())

    before, after = state(1e-3, 10, "linear"), state(1e-4, 20, scheduler)
    for _ in range(5):
        before.schedule.step()
    after.load(5, {"lora": {}, "optimizer": {}}, before.state_dict())
    wanted = lr_scheduler(scheduler, 1e-4, 20)
    for _ in range(5):
        wanted.step()
    assert after.schedule() == wanted() != before.schedule()


class _NoOptimizer:
    def set_state_dict(self, state):
        assert state == {}
