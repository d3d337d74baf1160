"""Whole runs on the reference FLUX: they learn, resume exactly, stop cleanly and refuse wrong inputs
early."""

import json
import re
import signal

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import ppcoat.train.flux as flux_lora
from ppcoat.cli.main import run
from ppcoat.config.load import load_config
from ppcoat.data import garments
from ppcoat.errors import ConfigError
from ppcoat.nn.convert import quantize_linears
from ppcoat.train import run as run_module
from ppcoat.train.resume import check_compatible
from ppcoat.train.run import train_lora

ON_SMALL_FLUX = pytest.mark.usefixtures("small_flux")


def tensors(file):
    with safe_open(str(file), framework="np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def log(config):
    return [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


@ON_SMALL_FLUX
def test_a_run_leaves_lora_config_checkpoints_log_and_previews(make_config):
    config = make_config(
        "sample.sample_every=2",
        "sample.prompts=['a red [trigger] dress']",
        "sample.sample_steps=2",
        "sample.width=64",
        "sample.height=64",
        "save.max_step_saves_to_keep=1",
    )
    result = train_lora(config)
    found, header = tensors(result.lora_file)
    assert header["rank"] == "2" and header["trigger_word"] == "sks" and header["step"] == "4"
    # 12 Linears in the double block, 5 in the single one, A and B of each
    assert len(found) == 2 * (12 + 5)
    assert all(np.isfinite(value).all() for value in found.values())
    assert any(np.abs(value).max() > 0 for name, value in found.items() if "lora_B" in name)
    assert (config.run_dir / "config.yaml").exists()
    assert [path.name for path in sorted((config.run_dir / "checkpoints").iterdir())] == [
        "000000004",
        "latest",
    ]
    assert len(list((config.run_dir / "samples").glob("*.png"))) == 2
    assert [line["step"] for line in log(config)] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["kept_bytes"] > 0 for line in log(config))


@ON_SMALL_FLUX
@pytest.mark.parametrize(
    ("coat", "checkpointing"),
    [
        pytest.param("true", "false", marks=pytest.mark.slow),
        pytest.param("false", "false", marks=pytest.mark.slow),
        ("true", "true"),
    ],
)
def test_stopped_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    make_config, stopped_in, coat, checkpointing
):
    """Also in the middle of an epoch (3 batches), with dropout in LoRA and captions, accumulated gradients
    and a running mean, which is what the compared files hold."""
    common = (
        f"coat.enabled={coat}",
        f"train.gradient_checkpointing={checkpointing}",
        "train.gradient_accumulation=2",
        "network.dropout=0.1",
        "datasets.0.caption_dropout_rate=0.3",
        "train.lr_scheduler=cosine",
        "train.ema.use_ema=true",
        "train.ema.ema_decay=0.7",
    )
    whole = make_config("name=whole", *common)
    train_lora(whole)
    halves = make_config("name=halves", *common)
    assert stopped_in(2, train_lora, halves) == 128 + signal.SIGTERM
    train_lora(halves)
    assert log(whole) == log(halves)
    ours, theirs = (
        tensors(whole.run_dir / "whole.safetensors")[0],
        tensors(halves.run_dir / "halves.safetensors")[0],
    )
    assert ours.keys() == theirs.keys()
    # every file of the checkpoint: weights, codes of the optimizer, running mean, position of the data
    manifests = [
        json.loads((run.run_dir / "checkpoints/000000004/manifest.json").read_text())
        for run in (whole, halves)
    ]
    assert manifests[0] == manifests[1] and "ema.safetensors" in manifests[0]["files"]
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(
            "DoRA", ["network.dropout=0.1", "train.gradient_checkpointing=true", "model.quantize=true",
                     "coat.activation.policy=coat+recompute"], marks=pytest.mark.slow,
        ),
        ("lokr", ["network.lokr_factor=4", "network.lokr_rank_dropout=0.2"]),
    ],
    ids=["dora", "lokr"],
)  # fmt: skip
def test_other_kinds_resume_bit_for_bit_and_their_file_draws_the_last_preview(
    make_config, stopped_in, kind, settings
):
    """The mean is what the file and the preview are made of."""
    common = [f"network.type={kind}", "train.steps=2", "train.batch_size=1", "save.save_every=1",
              "train.lr=0.05",
              "train.ema.use_ema=true", "train.ema.ema_decay=0.3", *settings]  # fmt: skip
    preview = ["sample.sample_every=2", "sample.prompts=[a hat]", "sample.sample_steps=2", "sample.width=64",
               "sample.height=64", "sample.guidance_scale=3"]  # fmt: skip
    whole, halves = make_config("name=whole", *common), make_config("name=halves", *common, *preview)
    train_lora(whole)
    stopped_in(1, train_lora, halves)
    file = train_lora(halves).lora_file
    manifests = [json.loads((each.run_dir / "checkpoints/000000002/manifest.json").read_text())
                 for each in (whole, halves)]  # fmt: skip
    assert (
        manifests[0] == manifests[1]
        and "ema.safetensors" in manifests[0]["files"]
        and log(whole) == log(halves)
    )
    found, _ = tensors(file)
    assert all(np.abs(value).max() > 0 for value in found.values())
    own = {"DoRA": "lora_magnitude_vector", "lokr": "lokr_w1"}[kind]
    assert sum(name.endswith(own) for name in found) == 2 * 12 + 3 * 5
    pipeline = flux_lora.FluxPipeline.from_pretrained(whole.model.name_or_path, "float32")
    if whole.model.quantize:
        quantize_linears(pipeline.transformer)
    plain, drawn = (draw_hat(pipeline, lora) for lora in (None, file))
    with Image.open(halves.run_dir / "samples" / "000000002_00.png") as picture:
        wanted = np.asarray(picture).astype(int)
    assert np.abs(drawn - wanted).max() <= 1 and np.abs(plain - wanted).max() > 4


def draw_hat(pipeline, lora):
    if lora is not None:
        pipeline.load_lora_weights(lora)
    picture = pipeline("a hat", height=64, width=64, num_inference_steps=2, guidance_scale=3.0, seed=42,
                       max_sequence_length=16).images[0]  # fmt: skip
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([], ["network.type=dora"], "network.type was not recorded in the checkpoint and is 'dora' now"),
        (["network.type=lokr"], ["network.type=lokr", "network.lokr_full_rank=true"],
         "network.type was 'lokr, factor -1' in the checkpoint and is 'lokr, factor -1, full rank' now"),
    ],
)  # fmt: skip
def test_another_kind_does_not_go_on(make_config, before, after, said):
    found = [run_module.compatible(make_config(*each), []) for each in (before, after)]
    with pytest.raises(ConfigError, match=said):
        check_compatible(*found)


@pytest.mark.slow
def test_coat_keeps_fewer_bytes_and_follows_the_ordinary_run(make_config):
    steps = "train.steps=10"
    off = train_lora(make_config("name=plain", "coat.enabled=false", steps))
    on = train_lora(make_config("name=packed", steps, "coat.optimizer.block_size=128"))
    assert on.bytes_kept < 0.6 * off.bytes_kept
    assert on.optimizer_bytes < 0.5 * off.optimizer_bytes
    assert np.mean(on.losses[-5:]) == pytest.approx(np.mean(off.losses[-5:]), rel=0.03)


@ON_SMALL_FLUX
def test_policies_and_checkpointing_keep_fewer_and_fewer_bytes_and_follow_the_ordinary_run(
    make_config, caplog
):
    def run(name, *overrides):
        result = train_lora(make_config(f"name={name}", "train.steps=1", *overrides))
        return result.bytes_kept, result.losses

    plain, losses = run("plain", "coat.enabled=false")
    runs = {
        "coat": ("coat.activation.policy=coat",),
        "recompute": ("coat.activation.policy=coat+recompute",),
        "attention": ("coat.activation.policy=coat+recompute+attention",),
        "one": ("train.gradient_checkpointing=true", "coat.memory.checkpoint_blocks=1"),
        "all": ("train.gradient_checkpointing=true",),
    }
    kept = [plain]
    for name, overrides in runs.items():
        each, its_losses = run(name, *overrides)
        kept.append(each)
        assert its_losses == pytest.approx(losses, rel=0.01)
    plain, coat, recompute, attention, one, everything = kept
    assert plain > coat > recompute > attention > everything and coat > one > everything
    assert "no effect" not in caplog.text


@ON_SMALL_FLUX
def test_a_number_of_checkpointed_blocks_without_checkpointing_is_said_to_do_nothing(make_config, caplog):
    train_lora(make_config("train.steps=1", "coat.memory.checkpoint_blocks=2"))
    assert "checkpoint_blocks has no effect" in caplog.text


@ON_SMALL_FLUX
def test_training_lowers_the_loss_on_a_fixed_batch(make_config, monkeypatch):
    monkeypatch.setattr(
        flux_lora.FlowMatching,
        "draw",
        lambda self, batch, rng: (
            np.array([0.3, 0.7]),
            np.random.default_rng(0).standard_normal((2, 16, 64), dtype=np.float32),
        ),
    )
    losses = train_lora(make_config("train.steps=20", "train.batch_size=2", "save.save_every=20")).losses
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("network.linear=3", "network.linear was 2 .* is 3 now"),
        ("network.linear_alpha=2", "network.linear_alpha was 4.0 .* is 2.0 now"),
        (
            "network.ignore_if_contains=[proj]",
            r"network.targets and what else chooses the Linears was .* is .* now "
            r"\(network.ignore_if_contains None -> \['proj'\]\)",
        ),
        (
            "datasets.0.resolution=32",
            r"sizes, repeats or regularisation of the pictures changed \(datasets.0.resolution 64 -> 32\); "
            "set it back, add --restart_data",
        ),
        (
            "train.batch_size=3",
            "the batch of all processes was 2 .* is 3 now .train.batch_size 2 -> 3.; .* add --restart_data",
        ),
        ("coat.optimizer.block_size=32", "optimizer.block_size was 16 .* is 32 now"),
        ("coat.optimizer.use_fp8=false", r"FP8 optimizer states \(coat.enabled.* was True .* is False now"),
        ("coat.enabled=false", r"FP8 optimizer states \(coat.enabled.* was True .* is False now"),
        ("seed=1", "order of the data: the seed was 42 .* is 1 now"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(finished, override, refusal):
    settings = load_config(finished).run_dir / "config.yaml"
    before = settings.read_bytes()
    with pytest.raises(ConfigError, match=f"cannot resume.* {refusal}"):
        train_lora(load_config(finished, [override]))
    assert settings.read_bytes() == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_run):
    """Config file of a run that has done its one step; nobody may train it further."""
    folder = tmp_path_factory.mktemp("finished")
    garments.write_folder(folder / "data", 6, seed=1, motif="gold star", prefix="[trigger] ")
    coat = {"optimizer": {"block_size": 16}}
    file = write_run(folder, folder / "data", train={"steps": 1, "batch_size": 2}, coat=coat)
    train_lora(load_config(file))
    return file


def test_a_finished_run_called_again_trains_nothing_and_keeps_its_file(finished):
    config = load_config(finished)
    before = tensors(config.run_dir / "run.safetensors")
    again = train_lora(config)
    assert again.losses == []
    after = tensors(again.lora_file)
    assert before[1] == after[1]
    assert all(np.array_equal(value, after[0][name]) for name, value in before[0].items())


@ON_SMALL_FLUX
def test_with_strict_a_damaged_checkpoint_stops_the_command_and_without_the_one_before_is_used(
    make_config, tmp_path, capsys, caplog
):
    train_lora(make_config("train.steps=2", "save.save_every=1"))
    spoilt = tmp_path / "run" / "checkpoints" / "000000002" / "lora.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    command = [str(tmp_path / "run.yaml"), "--set", "train.steps=2"]
    assert run("train", [*command, "--strict"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"^error: checkpoint .*000000002 is damaged \(lora.safetensors has .* bytes", said, re.M)
    assert run("train", command) == 0
    assert "000000001: 1 of 2 steps are left" in capsys.readouterr().out
    assert "lora.safetensors" in caplog.text and "trying the one before it" in caplog.text


def test_filters_choose_modules_and_an_empty_choice_is_refused(make_config):
    config = make_config(
        "network.only_if_contains=[transformer.single_transformer_blocks.1.]", "train.steps=1"
    )
    names = tensors(train_lora(config).lora_file)[0]
    assert {name.rsplit(".lora_", 1)[0] for name in names} == {
        f"transformer.single_transformer_blocks.1.{part}"
        for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
    }
    with pytest.raises(ConfigError, match="leave no module"):
        train_lora(make_config("name=other", "network.only_if_contains=[nothing_like_this]"))


@pytest.mark.parametrize(
    ("given", "double", "single"),
    [
        (("network.single_blocks=[1, 2]",), {0, 1}, {1, 2}),
        (("network.double_blocks=[]", "network.single_blocks=[0, 0]"), set(), {0}),
        (("network.double_blocks=[1, 1]", "network.ignore_if_contains=[single]"), {1}, set()),
    ],
)
def test_ranges_choose_blocks(make_config, given, double, single):
    names = tensors(train_lora(make_config("train.steps=1", *given)).lora_file)[0]
    parts = {tuple(name.split(".")[1:3]) for name in names}
    wanted = {("transformer_blocks", str(i)) for i in double}
    assert parts == wanted | {("single_transformer_blocks", str(i)) for i in single}


def test_a_range_beyond_the_model_is_refused(make_config):
    with pytest.raises(
        ConfigError, match=r"network.double_blocks: came \[0, 2\], but this model has 2: 0 to 1"
    ):
        train_lora(make_config("network.double_blocks=[0, 2]"))


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(flux_lora.FluxPipeline, "from_pretrained", fail)


def test_bad_inputs_stop_before_a_model_is_loaded(make_config, no_model_is_loaded, tmp_path):
    data = tmp_path / "data"
    with pytest.raises(ConfigError, match="nowhere"):
        train_lora(make_config("datasets.0.folder_path=nowhere"))
    hub = "black-forest-labs/FLUX.1-dev"
    with pytest.raises(ConfigError, match=f"no model folder {hub}: .*or set model.name_or_path"):
        train_lora(make_config(f"model.name_or_path={hub}", "datasets.0.folder_path=not_read_yet"))
    with pytest.raises(ConfigError, match="Paddle sees"):
        train_lora(make_config("device=gpu:99"))
    (data / "0000.txt").unlink()
    with pytest.raises(ConfigError, match="0000.png"):
        train_lora(make_config())
    assert not (tmp_path / "run").exists()


@ON_SMALL_FLUX
def test_skip_bad_leaves_out_and_lists_what_cannot_be_read(make_config, tmp_path, caplog):
    data = tmp_path / "data"
    (data / "0001.png").write_bytes(b"not a picture")
    Image.new("RGB", (64, 64)).save(data / "without_caption.png")
    result = train_lora(make_config("datasets.0.skip_bad=true", "train.steps=1"))
    assert result.lora_file.exists()
    said = caplog.text
    assert "0001.png" in said and "without_caption.png" in said
