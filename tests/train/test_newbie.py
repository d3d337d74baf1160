"""NewBie runs on the tiny reference model: numbers of the original trainer, and its faults not repeated.

The original's faults by their number, and where each is tested: 1 latents without shift (here, and
models/newbie/test_pipeline.py) - 2 caches that go stale (here) - 3 pictures that are never cached (here) -
4 ranks and buckets (data/test_batches.py, train/test_two_ranks.py) - 5 a switch that does nothing
(config/test_newbie.py) - 6 LoKr with an unfrozen base (here) - 7 shift of another size
(train/test_transport.py) - 8 loads by halves (models/newbie/test_files.py) - 9 resuming (here) - 10 disks
that fill (here) - 11 encoders that stay (here) - 12 alpha and EXIF (data/test_sources.py) - 13 few buckets
(data/test_buckets.py) - 14 class names (here) - 15 merging (cli/test_newbie.py, lora/test_peft.py)
- 16 captions that are cut (here) - 17 losses that are not finite (train/test_trainer.py).
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file

import ppcoat.cli.newbie as merge_command
from ppcoat.cli.main import run
from ppcoat.coat import COATTrainer
from ppcoat.config.newbie import load_newbie_config
from ppcoat.config.schema import CoatConfig
from ppcoat.data import garments
from ppcoat.errors import ConfigError
from ppcoat.lora import adapter_layers, load_lora
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.objective import NewbieFlowMatching
from ppcoat.train import run as train_run
from ppcoat.train.newbie import NewbieSpec
from ppcoat.train.previews import KeptPicture, encode_validation
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import dry_run, train_lora

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"


def configs_in(folder, write_newbie_run):
    data = folder / "data" / "2_dress"
    data.mkdir(parents=True)
    garments.write_folder(data, 4, seed=1, motif="gold star", prefix="")
    (data / "0003.txt").write_text("a far longer caption than those of the others, " * 3)
    file = write_newbie_run(folder, folder / "data", Model={"learning_rate": 1e-2, "lora_alpha": 4})
    return lambda *overrides: load_newbie_config(file, overrides)


@pytest.fixture
def make_config(tmp_path, write_newbie_run):
    """make_config("train.steps=3", ...) -> RunConfig of a run on 4 drawings, each twice an epoch."""
    return configs_in(tmp_path, write_newbie_run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_newbie_run):
    """make_config of a run that has done its one step; nobody may train it further."""
    make = configs_in(tmp_path_factory.mktemp("finished"), write_newbie_run)
    train_lora(make("train.steps=1"))
    return make


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs, np.load(FOLDER / "adapter_refs.npz") as adapters:
        return dict(refs) | dict(adapters)


def log(config):
    return [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


def outputs(model, refs):
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    with paddle.no_grad():
        return model(*[paddle.to_tensor(refs[name][:2]) for name in names]).numpy()


def built(config):
    """The Trainer of a run, without running it, and its pipeline."""
    spec, examples = NewbieSpec(), train_run.all_examples(train_run.scan_datasets(config))
    pipeline = spec.load_encoders(config, "float32")
    cache = train_run.encode_dataset(spec, config, examples, pipeline)
    spec.load_base(pipeline, config, "float32", Ranks())
    return train_run.build_trainer(spec, config, pipeline, cache), pipeline


def test_three_steps_have_the_losses_gradients_and_weights_of_the_original_trainer(refs):
    model = load_nextdit(FOLDER / "transformer", "float32")
    load_lora(model, FOLDER / "lora")
    model.train()
    layers = adapter_layers(model)
    parameters = {f"base_model.model.{path}.{name}.weight": getattr(layers[path], name)
                  for path in layers for name in ("lora_A", "lora_B")}  # fmt: skip
    for parameter in parameters.values():
        parameter.stop_gradient = False
    optimizer = COATTrainer(CoatConfig()).create_optimizer(parameters.values(), 1e-3)
    objective, names = NewbieFlowMatching(), ("cap_feats", "cap_mask", "clip_text_pooled")
    arrays = ("gemma_hidden", "gemma_mask", "jina_pooled")
    batch = {name: paddle.to_tensor(refs[array][:2]) for name, array in zip(names, arrays, strict=True)}
    batch["latents"] = paddle.to_tensor(refs["train_x1"])
    for step, want in enumerate(refs["lora_train_losses"]):
        times = objective.times(refs["lora_train_u"][step], 1024)
        loss = objective.losses_at(model, batch, times, refs["lora_train_x0"][step]).mean
        assert float(loss) == pytest.approx(float(want), rel=2e-5)
        loss.backward()
        norm = np.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        assert norm == pytest.approx(float(refs["lora_train_grad_norms"][step]), rel=1e-4)
        optimizer.step()
        optimizer.clear_grad()
    for key in (key for key in refs if key.startswith("lora_after3/")):
        got = parameters[key.removeprefix("lora_after3/")].numpy().T
        np.testing.assert_allclose(got, refs[key], rtol=0, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_run_lowers_the_loss_and_its_merged_model_is_the_one_with_the_adapter(
    make_config, refs, tmp_path, monkeypatch, kind
):
    """Fixed times and noise, so that losses compare."""
    noise = np.random.default_rng(0).standard_normal((2, 16, 8, 8), dtype=np.float32)
    monkeypatch.setattr(
        NewbieFlowMatching, "draw", lambda *_: (np.array([0.3, 0.7], dtype=np.float32), noise)
    )
    config = make_config("train.steps=12", f"network.type={kind}", "network.linear=4", "train.lr=0.03")
    result = train_lora(config)
    print("losses of", kind, [round(loss, 3) for loss in result.losses])
    assert np.mean(result.losses[-4:]) < 0.8 * np.mean(result.losses[:4])
    assert result.lora_file == config.run_dir / "adapter_model.safetensors"
    adapter = json.loads((config.run_dir / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["peft_type"] == {"lora": "LORA", "lokr": "LYCORIS"}[kind]
    model = load_nextdit(FOLDER / "transformer", "float32")
    before = outputs(model, refs)
    load_lora(model, config.run_dir)
    on = outputs(model, refs)
    assert np.abs(on - before).max() > 0.01
    monkeypatch.setattr(merge_command, "tune_host", lambda: None)
    flags = ["--base_model_path", FOLDER, "--lora_path", config.run_dir, "--output_path", tmp_path / "merged"]
    assert run("merge-newbie", [str(flag) for flag in flags]) == 0
    merged = load_nextdit(tmp_path / "merged" / "transformer", "float32")
    np.testing.assert_allclose(outputs(merged, refs), on, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("network.dropout=0.2", "train.optimizer=coat_fp8_adamw", "train.gradient_checkpointing=true"),
            marks=pytest.mark.slow,
        ),
        ("network.type=lokr", "network.lokr_rank_dropout=0.2", "network.lokr_module_dropout=0.2",
         "train.gradient_checkpointing=false", "coat.enabled=true"),
    ],
)  # fmt: skip
def test_stopped_and_resumed_run_is_bit_equal_to_an_uninterrupted_one(make_config, stopped_in, overrides):
    whole, halves = (
        make_config(f"name={name}", "save.save_every=100", "train.steps=6", *overrides)
        for name in ("whole", "halves")
    )
    train_lora(whole)
    stopped_in(3, train_lora, halves)
    train_lora(halves)
    assert [line["step"] for line in log(whole)] == list(range(1, 7))  # an epoch has 8 pictures in twos
    assert log(whole) == log(halves)
    ours, theirs = (load_file(each.run_dir / "adapter_model.safetensors") for each in (whole, halves))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("network.linear=3", "network.linear was 2 .* is 3 now"),
        ("network.targets=[attention.qkv]", "network.targets and what else .* was .* is .* now"),
        ("network.type=lokr", "network.type was 'lora' .* is 'lokr' now"),
        ("datasets.0.resolution=32", "sizes, repeats or regularisation of the pictures changed"),
    ],
)
def test_resuming_with_another_adapter_is_refused_by_name(finished, override, refusal):
    with pytest.raises(ConfigError, match=f"cannot resume.* {refusal}"):
        train_lora(finished("train.steps=1", override))


def test_batches_of_cached_captions_are_those_of_the_original(make_config, refs):
    """Captions are kept without padding and padded again in a batch, to the same output."""
    config, spec = make_config(), NewbieSpec()
    texts = json.loads((FOLDER / "texts.json").read_text(encoding="utf-8"))
    pipeline = spec.load_encoders(config, "float32")
    encoders = spec.encoders(config, pipeline)
    columns = encoders.text(texts["captions"])
    assert [len(rows) for rows in columns[0]] == refs["gemma_mask"].sum(1).tolist()
    rows = dict(zip(texts["captions"], zip(*columns, strict=True), strict=True))
    cache = train_run.TrainingCache([], [], rows, text_names=encoders.text_names)
    text = dict(zip(encoders.text_names, cache.text(texts["captions"][:2]), strict=True))
    longest = int(refs["gemma_mask"][:2].sum(1).max())
    np.testing.assert_array_equal(text["cap_mask"].numpy(), refs["gemma_mask"][:2, :longest])
    model = load_nextdit(FOLDER / "transformer", "float32")
    out = model(paddle.to_tensor(refs["dit_x"]), paddle.to_tensor(refs["dit_t"]), **text)
    np.testing.assert_allclose(out.numpy(), refs["dit_b2_out"], rtol=0, atol=2e-5)
    latents = encoders.image(paddle.to_tensor(refs["vae_pixels"]))
    np.testing.assert_allclose(latents.numpy(), refs["vae_latents"], rtol=0, atol=2e-5)  # with the shift


def test_the_cache_is_made_anew_for_whatever_changes_it_and_else_not(make_config, tmp_path, monkeypatch):
    encoded = {"pictures": 0, "captions": 0}
    image, text = NewbiePipeline.encode_image, NewbiePipeline.encode_prompt

    def encode_image(self, pixels):
        encoded["pictures"] += pixels.shape[0]
        return image(self, pixels)

    def encode_prompt(self, prompts, *arguments, **options):
        encoded["captions"] += len(prompts)
        return text(self, prompts, *arguments, **options)

    monkeypatch.setattr(NewbiePipeline, "encode_image", encode_image)
    monkeypatch.setattr(NewbiePipeline, "encode_prompt", encode_prompt)

    def counted(*overrides):
        encoded.update(pictures=0, captions=0)
        config, spec = make_config(f"cache_dir={tmp_path}/cache", *overrides), NewbieSpec()
        examples = train_run.all_examples(train_run.scan_datasets(config))
        train_run.encode_dataset(spec, config, examples, spec.load_encoders(config, "float32"))
        return encoded["pictures"], encoded["captions"]

    assert counted() == (4, 4)
    assert counted() == (0, 0)
    assert counted("model.prompt_prefix='other '") == (0, 4)
    assert counted("train.max_sequence_length=64") == (0, 4)
    assert counted("datasets.0.resolution=32") == (4, 0)
    (tmp_path / "data/2_dress/0001.txt").write_text("another caption")
    assert counted() == (0, 4)  # all that are encoded with it: beside longer captions one has other bits
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data/2_dress/0002.png")
    assert counted() == (1, 0)
    model = shutil.copytree(FOLDER, tmp_path / "model")
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.0}))
    assert counted(f"model.name_or_path={model}") == (4, 0)


def test_the_encoders_leave_before_the_transformer_comes(make_config):
    config = make_config("train.steps=1")
    trainer, pipeline = built(config)
    assert pipeline.text_encoder is None and pipeline.clip_model is None and pipeline.vae is None
    assert pipeline.transformer is trainer.model


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_only_the_adapter_is_trained_and_counted_in_the_norm(make_config, kind):
    trainer, _ = built(make_config(f"network.type={kind}", "train.gradient_checkpointing=true"))
    trained = {id(p) for p in trainer.model.parameters() if not p.stop_gradient}
    assert trained == {id(p) for p in trainer.side.parameters.values()} and trained
    assert all("lora_" in name or "lokr_" in name for name in trainer.side.parameters)
    seen = []
    update = trainer._update
    trainer._update = lambda *given: (
        seen.append([p.name for p in trainer.model.parameters() if p.grad is not None]), update(*given)
    )  # fmt: skip
    assert np.isfinite(trainer.train_step().grad_norm)
    assert set(seen[0]) <= {p.name for p in trainer.side.parameters.values()} and seen[0]


@pytest.mark.slow
def test_policies_checkpointing_swapping_and_an_fp8_base_train_alike(make_config, tmp_path):
    def two_steps(*overrides):
        trainer, _ = built(make_config("train.steps=9", f"cache_dir={tmp_path}/cache", *overrides))
        done = [trainer.train_step() for _ in range(2)]
        return [step.loss for step in done], done[-1].saved

    none = "train.gradient_checkpointing=false"
    plain, saved = two_steps(none)
    packed, fewer = two_steps(none, "coat.enabled=true", "coat.activation.policy=coat")
    assert fewer.bytes_kept < 0.8 * saved.bytes_kept and packed == pytest.approx(plain, rel=0.02)
    assert two_steps(none, "model.blocks_to_swap=2")[0] == plain
    recompute = "coat.enabled=true", "coat.activation.policy=coat+recompute"
    again, fewest = two_steps(none, *recompute, "model.blocks_to_swap=2")
    assert fewest.bytes_kept < fewer.bytes_kept and again == pytest.approx(plain, rel=0.02)
    checkpointing = "train.gradient_checkpointing=true"
    both, inputs = two_steps("model.blocks_to_swap=1", checkpointing)
    assert both == pytest.approx(plain, rel=1e-5) and inputs.bytes_kept < saved.bytes_kept
    one, more = two_steps(checkpointing, *recompute, "coat.memory.checkpoint_blocks=1")
    assert one == pytest.approx(plain, rel=0.02) and more.bytes_kept < fewest.bytes_kept
    all_layers, least = two_steps(checkpointing, *recompute, "model.blocks_to_swap=2")
    assert all_layers == pytest.approx(plain, rel=0.02) and least.bytes_kept < more.bytes_kept
    quantised, _ = two_steps(none, "model.quantize=true")
    assert quantised != plain and quantised == pytest.approx(plain, rel=0.05)


@pytest.mark.slow
def test_fp8_weights_are_kept_for_the_next_run_but_not_by_a_dry_one(make_config, monkeypatch):
    config = make_config("train.steps=2", "model.quantize=true")
    list(dry_run(config))
    assert not config.cache_folder.exists()
    losses = train_lora(config).losses
    assert list(config.cache_folder.glob("tiny_newbie-transformer-fp8/*.safetensors"))
    quantised = lambda *_: pytest.fail("quantised a second time")  # noqa: E731
    monkeypatch.setattr("ppcoat.models.quantized_base.quantised_tensors", quantised)
    again = make_config(
        "name=again", f"cache_dir={config.cache_folder}", "train.steps=2", "model.quantize=true"
    )
    assert train_lora(again).losses == losses


def test_previews_are_drawn_as_the_whole_pipeline_draws(make_config):
    config = make_config(
        "train.steps=2", "sample.prompts=[a red dress]", "sample.sample_every=2", "sample.sample_steps=2",
        "sample.skip_first_sample=false", "sample.seed=5",
    )  # fmt: skip
    train_lora(config)
    first, last = sorted((config.run_dir / "samples").glob("*.png"))
    pipeline = NewbiePipeline.from_pretrained(FOLDER, "float32")
    pipeline.set_progress_bar_config(disable=True)
    (whole,) = pipeline("a red dress", num_inference_steps=2, seed=5, height=64, width=64).images
    drawn, whole = (np.asarray(picture).astype(int) for picture in (Image.open(first), whole))
    assert np.abs(drawn - whole).max() <= 1
    assert (np.asarray(Image.open(last)) != drawn).any()


def test_saved_steps_are_pruned_and_have_both_forms(make_config):
    config = make_config("train.steps=5", "save.save_every=1", "save.max_step_saves_to_keep=2")
    other = config.run_dir.with_name("run_step_old")
    other.mkdir(parents=True)
    first, dead = config.run_dir.with_name("run_step_1"), 2**22 + 1  # more than Linux gives out
    drafts = [folder / f".{name}.tmp-{process}" for folder, name, process in (
        (first, "adapter_model.safetensors", dead), (config.run_dir, "adapter_config.json", dead),
        (config.run_dir, "run.safetensors", os.getppid()))]  # fmt: skip
    for draft in drafts:
        draft.parent.mkdir(exist_ok=True)
        draft.touch()
    train_lora(config)
    assert [draft.exists() for draft in drafts] == [False, False, True]
    folders = sorted(path.name for path in config.run_dir.parent.iterdir())
    assert folders == ["run", "run_step_3", "run_step_4", "run_step_old"]
    names = {"adapter_config.json", "adapter_model.safetensors", "run.safetensors"}
    assert {path.name for path in config.run_dir.with_name("run_step_4").iterdir()} == names
    assert names < {path.name for path in config.run_dir.iterdir()}


def test_cut_captions_are_counted_once_and_too_long_ones_refused_before_loading(
    make_config, caplog, monkeypatch
):
    with caplog.at_level(logging.WARNING):
        train_lora(make_config("train.steps=1", "train.max_sequence_length=48"))
    said = [record.getMessage() for record in caplog.records if "longer than" in record.getMessage()]
    assert len(said) == 1 and "of 4 captions are longer than 48 tokens" in said[0]
    monkeypatch.setattr(NewbiePipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    long = make_config("name=long")
    (Path(long.data.folder_path) / "2_dress/0000.txt").write_text("very long " * 300)
    too_long = "512 tokens is too long .* 256 positions: lower .* to 255"
    with pytest.raises(ConfigError, match=too_long):
        train_lora(long)
    picture = Path(long.data.folder_path) / "2_dress/0000.png"
    picture.with_suffix(".txt").write_text("a dress")
    kept_aside = f"[{{image_path: {picture}, prompt: '{'very long ' * 300}'}}]"
    with pytest.raises(ConfigError, match=too_long):
        train_lora(make_config("name=long", f"train.validation.items={kept_aside}"))


def test_validation_levels_are_of_noise(make_config):
    """At sigma 1 the transformer sees noise alone: time 0."""
    config, spec = make_config(), NewbieSpec()
    pipeline = spec.load_encoders(config, "float32")
    kept = KeptPicture(Path(config.data.folder_path) / "2_dress/0000.png", "a dress")
    found = encode_validation(config, [kept], spec.encoders(config, pipeline), spec.objective(config))
    seen = []

    class Model(paddle.nn.Layer):
        def forward(self, x, t, *_):
            seen.append((float(t), float(x.std())))
            return x

    found.losses(Model())
    assert [time for time, _ in seen] == [0.0, 0.25, 0.5, 0.75]
    assert seen[0][1] == pytest.approx(1, rel=0.1)


def test_epochs_count_pictures_repeats_and_buckets(make_config, tmp_path):
    config = make_config("train.num_epochs=3")
    Image.new("RGB", (128, 64)).save(tmp_path / "data" / "wide.png")  # once an epoch, in a bucket of its own
    inputs = train_run.check_inputs(NewbieSpec(), config)
    resolved = train_run.with_steps_of_epochs(config, inputs)
    assert len(inputs.examples) == 5 and inputs.examples[-1].captions == ("",)
    assert resolved.train.steps == 3 * 8 // 2 + 2  # three pictures of the bucket are two batches
    assert resolved.save.save_every == 5
    with pytest.raises(ConfigError, match="lr_warmup_steps 100 is more than the 14 steps of 3 epochs"):
        train_run.with_steps_of_epochs(make_config("train.num_epochs=3", "train.lr_warmup_steps=100"), inputs)


def test_a_dry_run_shows_settings_data_and_two_steps_and_writes_nothing(
    make_config, tmp_path, monkeypatch, capsys
):
    make_config()  # for its TOML
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    assert run("train-newbie", ["--config_file", str(tmp_path / "run.toml"), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "family: newbie" in shown and "data: " in shown and "dry run: two steps done" in shown
    assert re.findall(r"^step (\d): loss \d+\.\d{4}, ", shown, re.MULTILINE) == ["1", "2"]
    assert not (tmp_path / "out").exists()


def changed(folder, part, **values):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_names_of_the_class_in_configs_do_not_matter(make_config, tmp_path):
    model = shutil.copytree(FOLDER, tmp_path / "model")
    changed(model, "transformer", _class_name="NextDiT_CLIP")
    assert train_lora(make_config(f"model.name_or_path={model}", "train.steps=1")).losses


def test_bad_inputs_stop_before_a_model_is_loaded(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(NewbiePipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    model = shutil.copytree(FOLDER, tmp_path / "model")
    changed(model, "vae", latent_channels=4)
    bare = shutil.copytree(FOLDER, tmp_path / "bare")
    (bare / "model_index.json").unlink()
    picture = tmp_path / "data/2_dress/0001.png"
    for overrides, part in (
        ([f"model.name_or_path={model}"], "4 latent channels, wanted 16"),
        (
            ["model.name_or_path=a/hub"],
            "no model folder a/hub: .*or set base_model_path .model.name_or_path.",
        ),
        ([f"model.name_or_path={bare}"], "model_index.json is missing"),
        (["network.targets=[attention.qvk]"], "matches no Linear; the nearest are attention.qkv"),
        (["model.blocks_to_swap=3"], "this model has 2 blocks"),
        (["train.timestep_type=linear"], "train.timestep_type is FLUX's"),
        (["datasets.0.folder_path=nowhere"], "nowhere"),
    ):
        with pytest.raises(ConfigError, match=part):
            train_lora(make_config(*overrides))
    shutil.copyfile(picture, picture.with_suffix(".bmp"))  # not read, whatever it is called
    picture.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="0001.png: the picture cannot be decoded"):
        train_lora(make_config())
    assert not (tmp_path / "out").exists()
