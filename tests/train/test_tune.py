"""`tune`: what a trial learns is what `train` teaches, the base stays as it was, and a search that was
stopped anywhere takes the same decisions."""

import gc
import json
import math
import os
import shutil
import signal
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError
from ppcoat.lora.layer import adapter_layers
from ppcoat.train import trials as trials_module
from ppcoat.train import tune as tune_module
from ppcoat.train.checkpoint import load_latest, only_run_in
from ppcoat.train.previews import Validation
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import MODEL_SPECS, check_inputs, train_lora
from ppcoat.train.run_state import RecentMean
from ppcoat.train.search import Candidate, Costs, Journal, Space, TuneFlags, halving, seconds_of
from ppcoat.train.trainer import Trainer
from ppcoat.train.trials import Trials, with_candidate
from ppcoat.train.tune import Search, check_flags, search_space, tune

pytestmark = pytest.mark.usefixtures("small_flux")
OWN = Candidate(1e-2, 2, "coat")
OTHER = Candidate(3e-2, 4, "coat+recompute")
SPACE = Space(Candidate(1e-3, 16, "coat"), (4, 8, 16), ("coat",))


def flags(**more):
    return TuneFlags(config="run.yaml", **({"budget": "60s", "ranks": [2, 4]} | more))


@pytest.fixture
def opened(make_config):
    """opened("a.b=c", ..., hold_out=2) -> Trials of a run of 4 updates."""

    def made(*overrides, hold_out=2):
        config = make_config("name=run_tune", "save.save_every=100", *overrides)
        spec = MODEL_SPECS["flux"]
        found = Trials(spec, config, check_inputs(spec, config), hold_out)
        found.open()
        return found

    return made


def bits(model):
    return {name: parameter.numpy().tobytes() for name, parameter in model.named_parameters()}


def layers(model):
    return {path: id(layer) for path, layer in model.named_sublayers()}


def trained(trials, candidate, last=4):
    """The weights in the checkpoint of a trial."""
    with trials.trainer(candidate, last) as trainer:
        trials_module._train(trainer, 0)
        return {name: parameter.numpy() for name, parameter in trainer.side.parameters.items()}


def one_picture(folder):
    item = f"[{{image_path: {folder}/data/0000.png, prompt: 'a [trigger] dress'}}]"
    settings = (f"items={item}", "resolution=64", "sigmas=[0.5]")
    return [f"train.validation.{each}" for each in settings]


@pytest.mark.parametrize("constant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trial_in_rounds_is_the_run_that_train_makes(opened, tmp_path, constant):
    """Bit for bit, with another trial in between and the base's layers and bits in place again."""
    more = [] if constant else ["train.lr_scheduler=cosine", "network.dropout=0.1"]
    trials = opened(*one_picture(tmp_path), *more, "train.steps=2", hold_out=0)
    model = trials.pipeline.transformer
    before = bits(model), layers(model)
    losses = [trials.loss(candidate, steps, 2, trials.validation)
              for candidate, steps in ((OWN, 1), (OTHER, 1), (OWN, 2))]  # fmt: skip
    assert (bits(model), layers(model)) == before
    assert not adapter_layers(model) and losses[0] != losses[1]

    alone = with_candidate(trials.config, OWN).model_copy(update={"name": "alone"})
    train_lora(alone)
    logged = [json.loads(line) for line in (alone.run_dir / "log.jsonl").read_text().splitlines()]
    assert losses[2] == pytest.approx(logged[-1]["validation_loss"], rel=1e-6)
    wanted, found = load_latest(alone.run_dir).tensors["lora"], trained(trials, OWN, 2)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].numpy().tobytes() == found[name].tobytes() for name in wanted)
    files = trials.write(OWN, 2), alone.run_dir / "alone.safetensors"
    one, other = (load_file(file) for file in files)
    assert one and all(one[name].tobytes() == other[name].tobytes() for name in one | other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["network.type=dora"],
        ["network.type=lokr"],
        ["model.quantize=fp8", "model.blocks_to_swap=2", "train.gradient_checkpointing=true"],
    ],
    ids=lambda each: each[0],
)
def test_every_kind_of_run_can_be_divided(opened, overrides):
    trials = opened(*overrides, hold_out=1)
    whole = trials.loss(OWN, 2, 2, trials.validation)
    weights = trained(trials, OWN, 2)
    trials = opened(*overrides, f"output_dir={trials.config.output_dir}/other", hold_out=1)
    model = trials.pipeline.transformer
    before = bits(model), layers(model)
    assert trials.loss(OWN, 1, 2, trials.validation) != trials.loss(OTHER, 1, 2, trials.validation)
    assert trials.loss(OWN, 2, 2, trials.validation) == whole
    assert (bits(model), layers(model)) == before
    again = trained(trials, OWN, 2)
    assert all(weights[name].tobytes() == again[name].tobytes() for name in weights)


def test_a_schedule_is_drawn_together(make_config):
    more = ("train.steps=100", "train.lr_scheduler=step", "train.lr_step_size=40", "train.lr_warmup_steps=10")
    trials = Trials(MODEL_SPECS["flux"], make_config(*more), None, 0)
    train = trials.config_of(OTHER, 50).train
    assert (train.steps, train.lr_step_size, train.lr_warmup_steps, train.lr) == (50, 20, 5, 3e-2)
    assert trials.config_of(OWN, 100).train == trials.config.train


def test_where_a_schedule_will_fall_the_mean_of_the_last_third_is_measured(opened, monkeypatch):
    trials = opened("train.lr_scheduler=cosine", hold_out=1)
    measured, path = [], "transformer_blocks.0.attn.to_q"

    def losses(validation, model):
        measured.append(adapter_layers(model)[path].lora_B.numpy())
        return {"validation_loss": 1.0}

    monkeypatch.setattr(Validation, "losses", losses)
    for steps in (2, 3):
        trials.loss(OWN, steps, 3, trials.validation)
        measured.append(trained(trials, OWN, 3)[f"{path}.lora_B"])
    mean, then, end, last = measured
    assert not np.array_equal(mean, then) and np.array_equal(end, last)


def test_the_recent_mean_weighs_with_the_fourth_power():
    parameter, done, history = paddle.zeros([3]), 0, []
    mean = RecentMean({"w": parameter}, lambda: done)
    for value in np.random.default_rng(0).standard_normal([9, 3]).astype("float32"):
        paddle.assign(paddle.to_tensor(value), output=parameter)
        done += 1
        mean.update()
        history.append(value)
    # polynomial decay: of update t the weight t (t + 1) (t + 2) (t + 3), made to sum to one
    weights = np.array([math.prod(range(t, t + 4)) for t in range(1, 10)], dtype=np.float64)
    np.testing.assert_allclose(
        mean.tensors["w"].numpy(), weights @ np.array(history) / weights.sum(), rtol=1e-5
    )


def test_a_signal_saves_and_the_trial_goes_on(opened, monkeypatch, capsys):
    trials, step = opened(hold_out=1), Trainer.train_step
    whole = trials.loss(OTHER, 2, 2, trials.validation)

    def interrupted(self):
        found = step(self)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    (trials.folder(OTHER)).rename(trials.folder(OWN))
    with pytest.raises(SystemExit) as stopped:
        trials.loss(OTHER, 2, 2, trials.validation)
    assert (
        stopped.value.code == 143
        and "stopped at step 1; run the same command again" in capsys.readouterr().err
    )
    assert load_latest(trials.folder(OTHER)).step == 1
    monkeypatch.setattr(Trainer, "train_step", step)
    assert trials.loss(OTHER, 2, 2, trials.validation) == whole
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("trained again"))
    assert trials.loss(OTHER, 2, 2, trials.validation) == whole


def test_what_diverges_is_the_worst(opened, monkeypatch):
    trials = opened("train.max_skipped_in_a_row=1")
    monkeypatch.setattr(Trainer, "_read", lambda self, losses, of, _=None: (
        np.full((1, 1), np.nan), np.zeros(2), np.zeros(1)))  # fmt: skip
    assert trials.loss(OWN, 2, 4, trials.validation) == math.inf
    assert not adapter_layers(trials.pipeline.transformer)
    nothing = SimpleNamespace(losses=lambda model: {"validation_loss": math.nan})
    assert trials.loss(OTHER, 0, 4, nothing) == math.inf


def test_an_adapter_that_left_takes_no_memory(opened):
    """At once: a card has no room for two."""
    trials = opened("train.lr_scheduler=cosine", hold_out=1)
    gc.disable()
    try:
        with trials.trainer(OWN, 4) as trainer:
            trainer.train_step()
            layer = next(iter(adapter_layers(trainer.model).values()))
            left = [weakref.ref(each) for each in (trainer, layer, trainer.state)]
        del trainer, layer
        assert [each() for each in left] == [None, None, None]
    finally:
        gc.enable()


def test_held_out_pictures_are_not_trained_on(opened, tmp_path):
    """And what goes with each picture stays with it: here each has itself as its reference."""
    shutil.copytree(tmp_path / "data", tmp_path / "same")
    beside = f"datasets.0.control_path={tmp_path}/same"
    trials = opened("datasets.0.flip_x=true", "datasets.0.caption_dropout_rate=1.0", beside)
    cache = trials.cache
    for own, beside in zip(cache.latents, cache.beside, strict=True):
        np.testing.assert_allclose(beside["reference_0"], own, rtol=0, atol=1e-5)
    for each in trials.validation.pictures:
        np.testing.assert_allclose(each["reference_0"], each["latents"], rtol=0, atol=1e-5)
    held = {each["latents"].numpy().tobytes() for each in trials.validation.pictures}
    kept = {latent.unsqueeze(0).numpy().tobytes() for latent in trials.cache.latents}
    assert len(held) == 2 and not held & kept
    paths = [each.item.image_path.name for each in trials.cache.examples]
    assert paths == 2 * ["0001.png", "0002.png", "0004.png", "0005.png"]  # and their mirrored copies
    wanted = trials.cache.embeddings[trials.inputs.examples[0].captions[0]][0]
    assert np.array_equal(trials.validation.pictures[0]["prompt_embeds"][0].numpy(), wanted.numpy())
    with pytest.raises(ConfigError, match="--hold_out: came 4, but there are 4 pictures"):
        trials_module.split(trials.cache, 4)


def test_draws_and_passes_of_several_give_the_mean_of_single_ones(opened):
    trials = opened(hold_out=1)
    with trials.trainer(OWN, 4) as trainer:
        one, many = (replace(trials.validation, draws=draws, at_once=1) for draws in (1, 2))
        first, wanted = one.losses(trainer.model), many.losses(trainer.model)
        assert wanted.keys() == first.keys() and wanted["validation_loss"] != first["validation_loss"]
        for at_once in (3, 20):
            found = replace(many, at_once=at_once).losses(trainer.model)
            assert found == {name: pytest.approx(loss, rel=1e-5) for name, loss in wanted.items()}


class FakeTrials:
    """Losses by a formula: the best learning rate is 4e-2, the best rank 8, more updates are better."""

    def __init__(self, folder, stop_after=10**9):
        self.config = SimpleNamespace(train=SimpleNamespace(steps=160))
        self.validation = Validation([], None)
        self.trained, self.root, self.stop_after = [], folder, stop_after

    def open(self):
        pass

    def folder(self, candidate):
        return self.root / candidate.name

    def write(self, candidate, last):
        self.written = candidate

    def loss(self, candidate, steps, last, validation):
        if len(self.trained) == self.stop_after:
            raise SystemExit(143)
        self.folder(candidate).mkdir(exist_ok=True)
        self.trained.append((candidate, steps))
        return abs(math.log(candidate.lr / 4e-2)) + abs(math.log(candidate.rank / 8)) / 9 + 1 / steps


def search(folder, budget=1e9, stop_after=10**9, seconds=0.0):
    journal = Journal.of(folder / "journal.json", {})
    if journal.rounds is None:
        journal.costs, journal.rounds = Costs(1.0, 0.0, 0.0), halving(16, 160)
    fake = FakeTrials(folder, stop_after)
    return Search(
        fake, SPACE, journal, budget, tune_module.time.perf_counter() - journal.seconds - seconds
    ), fake


def test_a_budget_that_is_too_short_is_answered_with_one_that_does(tmp_path):
    found, fake = search(tmp_path, budget=60)
    fake.validation, costs = SimpleNamespace(pictures=[0] * 4, sigmas=[0] * 4), Costs(0.5, 0.4, 5.0)
    with pytest.raises(ConfigError, match=r"^--budget is too short: 20 s .* give [0-9]+[sm], or") as error:
        found._rounds_after(20, costs)
    found.budget = seconds_of(str(error.value).partition(" give ")[2].partition(",")[0])
    assert found._rounds_after(22, costs).steps[0] >= 20


def test_rounds_find_the_best_beyond_the_edge_and_drop_the_others(tmp_path, capsys):
    found, fake = search(tmp_path)
    winner, told = found.run()
    assert fake.written == winner
    assert 2e-2 < winner.lr < 8e-2 and told.endswith("160 updates in the last round, those of the config")
    rounds = {steps: [each for each, done in fake.trained if done == steps] for steps in (20, 40, 80, 160)}
    # those of the lattice end at 1e-2; six more are tried beyond; then the better halves go on
    assert [len(each) for each in rounds.values()] == [16 + 3, 8, 4, 2]
    for less, more in zip((20, 40, 80), (40, 80, 160), strict=True):
        losses = {each: found.journal.loss(each, less) for each in rounds[less]}
        assert max(losses[each] for each in rounds[more]) <= sorted(losses.values())[len(rounds[more]) - 1]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [winner.name]
    assert len(capsys.readouterr().out.splitlines()) == len(fake.trained) == 33


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a search that nobody stops chooses, and what it trains."""
    found, fake = search(tmp_path_factory.mktemp("straight"))
    return found.run()[0], fake.trained


@pytest.mark.parametrize("stop_after", [0, 17, 31])
def test_a_stopped_search_goes_on_as_if_it_had_not(tmp_path, straight, stop_after):
    first, before = search(tmp_path, stop_after=stop_after)
    with pytest.raises(SystemExit):
        first.run()
    second, after = search(tmp_path)
    assert (second.run()[0], before.trained + after.trained) == straight
    third, nothing = search(tmp_path)
    assert third.run()[0] == straight[0] and nothing.trained == []


def make(folder):
    folder.mkdir()
    return folder


def test_when_time_is_up_the_last_whole_round_decides(tmp_path):
    early, fake = search(make(tmp_path / "early"), budget=100, seconds=80.5)
    winner, told = early.run()
    assert told.startswith("the budget is used up") and len(fake.trained) == 1  # one at least
    assert winner == fake.trained[0][0] and Journal.of(early.journal.file, {}).winner is None

    found, fake = search(make(tmp_path / "a"))
    found.run()
    found.journal.winner = None
    rows = found.journal.results
    for each in rows:  # the third round is cut short
        rows[each] = [row for row in rows[each] if row.steps < 80]
    found.journal.save()
    again, fake = search(tmp_path / "a", budget=100, seconds=70)
    winner, told = again.run()
    losses = {each: again.journal.loss(each, 40) for each in rows if again.journal.loss(each, 40)}
    assert winner == min(losses, key=losses.get) and fake.trained == []
    more, fake = search(tmp_path / "a")
    more.run()
    assert {steps for _, steps in fake.trained} == {80, 160}  # more time, and the rounds go on


def test_where_nothing_trains_the_search_says_so(tmp_path, monkeypatch):
    found, _ = search(tmp_path)
    monkeypatch.setattr(FakeTrials, "loss", lambda *_: math.inf)
    with pytest.raises(FloatingPointError, match="none of 16 settings trains.*lower train.lr"):
        found.run()


def test_ranks_are_those_that_fit_layers_and_memory(make_config, capsys, monkeypatch):
    spec = MODEL_SPECS["flux"]
    space = search_space(spec, make_config(), flags(ranks=[4, 8, 500, 900]))
    assert space.own == Candidate(1e-2, 2, "coat") and space.ranks[:3] == (2, 4, 8) and len(space.ranks) == 4
    assert space.ranks[3] < 500  # the width of the narrowest layer, once
    asked = []

    def planned(config, model):
        asked.append((config.network.linear, config.network.linear_alpha))
        return SimpleNamespace(total=config.network.linear * 10**9)

    monkeypatch.setattr(tune_module, "plan", planned)
    space = search_space(spec, make_config("vram_gb=5"), flags(ranks=[4, 8]))
    assert space.ranks == (2, 4) and asked == [(8, 16.0), (4, 8.0)]  # alpha follows the rank
    assert "rank 8 is left out: planned 8.0 GB, there are 5.0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no rank fits: rank 2 wants 2.0 GB planned of 1.0"):
        search_space(spec, make_config("vram_gb=1"), flags())
    full = make_config("network.type=lokr", "network.lokr_full_rank=true", "save.format=[diffusers]")
    assert search_space(spec, full, flags()).ranks == (2,)  # where the rank has no effect
    with pytest.raises(ConfigError, match="nothing to choose"):
        search_space(spec, full, flags(lr_span=1.0))


@pytest.mark.parametrize(
    ("overrides", "given", "words"),
    [
        ([], {}, "names no pictures for it: add train.validation.folder_path .* or --hold_out 8"),
        (["train.validation.folder_path=x"], {"hold_out": 2}, "leave out one of the two"),
        ([], {"hold_out": -1}, "--hold_out: came -1, wanted 0 or more"),
        ([], {"ranks": [4, 0]}, "--ranks: came 4 0, wanted 1 or more"),
        ([], {"lr_span": math.nan}, "--lr_span: came nan, wanted 1 or more"),
        ([], {"policies": ["caot"]}, "unknown saving policy 'caot'.*coat"),
        (["coat.enabled=false"], {"policies": ["coat"]}, "--policies has no effect without coat.enabled"),
        (["memory=auto"], {"policies": ["coat"]}, "memory: auto chooses the policy itself"),
    ],
)
def test_flags_without_sense_are_answered(make_config, overrides, given, words):
    with pytest.raises(ConfigError, match=words):
        check_flags(make_config(*overrides), flags(**given))


def test_the_best_settings_are_a_whole_config(make_config, tmp_path, monkeypatch, capsys):
    """From flags to best.yaml, with few losses and without a budget's worth of updates."""
    monkeypatch.setattr(Trials, "measured", lambda *_: Costs(0.001, 1.0, 0.001))
    config = make_config("train.steps=2", "datasets.0.cache_to_disk=true", "network.linear_alpha=6")
    wanted = flags(hold_out=1, lr_span=1.0, budget="600s")
    tune(config, wanted)
    out = capsys.readouterr().out
    folder = tmp_path / "run_tune"
    best = load_config(folder / "best.yaml")
    journal = json.loads((folder / "journal.json").read_text())
    lr, rank, policy = journal["winner"]
    assert best.network.linear == rank and best.network.linear_alpha == 3 * rank and best.train.lr == lr
    assert (best.name, best.run_dir.parent, best.sample) == ("run_tuned", tmp_path, config.sample)
    assert best.cache_folder == config.cache_folder and any(config.cache_folder.iterdir())
    rows = [line for line in out.splitlines() if "steps" in line or "best" in line]
    comment = (folder / "best.yaml").read_text().partition("\nname:")[0]
    assert (
        "tune run.yaml --budget 600s --lr_span 1.0 --ranks 2 4 --hold_out 1: train.lr" in comment
        and rows[-1] in out
    )
    name = f"lr0.01_r{rank}_coat"
    assert (folder / "trials" / name / f"{name}.safetensors").exists() and f"{folder}/trials/{name}\n" in out
    assert f"train with the best: python -m ppcoat train {folder / 'best.yaml'}" in out

    (folder / "best.yaml").unlink()
    monkeypatch.setattr(Trials, "open", lambda _: pytest.fail("nothing is left to do"))
    tune(config, wanted)
    assert load_config(folder / "best.yaml") == best
    with pytest.raises(ConfigError, match="another ranks"):
        tune(config, flags(hold_out=1, lr_span=1.0, ranks=[2, 8]))
    another = only_run_in(folder, Ranks())
    with another, pytest.raises(ConfigError, match="is training there"):
        tune(config, wanted)
