"""The loop: steps that are skipped, gradient checkpointing, memory lines, what it reports and draws."""

import json
import os
import re
import signal

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.nn.linear import FactorCopies
from ppcoat.train import flux as flux_lora
from ppcoat.train import run as lora_run
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.run import train_lora
from ppcoat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_flux")


def log(config):
    return [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


def weights(result):
    return load_file(result.lora_file)


def equal(first, second):
    """Bit for bit."""
    assert first.keys() == second.keys()
    return all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_ctrl_c_finishes_the_step_saves_and_leaves_with_130(make_config, monkeypatch, capfd):
    config, before, step = (
        make_config("save.save_every=100"),
        signal.getsignal(signal.SIGINT),
        Trainer.train_step,
    )

    def interrupted(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Trainer, "train_step", interrupted)
        train_lora(config)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert (config.run_dir / "checkpoints" / "000000001").is_dir()
    assert "stopped at step 1; run the same command again" in capfd.readouterr().err
    assert len(train_lora(config).losses) == 3
    assert "resuming from" in capfd.readouterr().out


def test_a_second_ctrl_c_leaves_at_once_without_a_half_checkpoint(make_config, monkeypatch):
    """The first comes in step 2, the second while its checkpoint is written."""
    config, fsync, train_step = make_config("save.save_every=1"), os.fsync, Trainer.train_step
    stopping, cut_off = [], []

    def interrupted_step(trainer):
        if trainer.step == 1:
            stopping.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(trainer)

    def interrupted_fsync(file):
        if stopping and list(config.run_dir.glob("checkpoints/.000000002.tmp-*")):
            cut_off.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        fsync(file)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "train_step", interrupted_step)
            patch.setattr(os, "fsync", interrupted_fsync)
            train_lora(config)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert cut_off and load_latest(config.run_dir).step == 1
    assert not list(config.run_dir.glob("checkpoints/*tmp*"))
    assert len(train_lora(config).losses) == 3


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_gradient_checkpointing_changes_memory_not_numbers(make_config, dropout):
    # With its usual epsilon AdamW makes a whole step of any gradient, even of one that is all rounding.
    common = ("coat.enabled=false", f"network.dropout={dropout}", "train.steps=3", "train.epsilon=1e-6")
    plain = train_lora(make_config("name=plain", *common))
    again = train_lora(make_config("name=again", "train.gradient_checkpointing=true", *common))
    np.testing.assert_allclose(again.losses, plain.losses, atol=1e-5)
    wanted = load_file(plain.lora_file)
    for name, value in load_file(again.lora_file).items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, err_msg=name)


def test_gradient_checkpointing_with_coat_keeps_fp8_block_inputs_only(make_config):
    kept = train_lora(make_config("name=kept", "train.steps=2"))
    again = train_lora(make_config("name=again", "train.gradient_checkpointing=true", "train.steps=2"))
    assert 0 < again.bytes_kept < kept.bytes_kept
    np.testing.assert_allclose(again.losses, kept.losses, rtol=0.02)  # blocks run again from FP8 inputs
    assert again.optimizer_bytes == kept.optimizer_bytes > 0


SYNCS = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__array__", "__index__")
COPIES = 7  # to the device, of a forward pass


def test_a_step_reads_from_the_device_once_dropout_included(make_config, monkeypatch):
    """Losses, gradient norms and whether all is finite come together. What is copied to the device is the
    batch, its noise and what says where tokens are."""
    asked, inside, casting = [], [], []
    in_use = FactorCopies.in_use

    def counted(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if inside == ["step"]:
                asked[-1].append(name)
            inside.append(name)
            try:
                return real(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(owner, name, call)

    def step(trainer, _step=Trainer.train_step):
        asked.append([])
        inside.append("step")
        try:
            return _step(trainer)
        finally:
            inside.pop()

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(FactorCopies, "in_use", lambda copies: casting.append(copies) or in_use(copies))
    for name in SYNCS:
        counted(paddle.Tensor, name)
    counted(paddle, "to_tensor")
    train_lora(
        make_config(
            "network.dropout=0.1", "train.gradient_checkpointing=true", "train.gradient_accumulation=2",
            "coat.activation.policy=coat+recompute+attention", "train.ema.use_ema=true", "train.steps=2",
        )
    )  # fmt: skip
    _, calls = asked  # the first step looks at the weights of head norms, too
    assert [name for name in calls if name != "to_tensor"] == ["numpy"]
    assert len(calls) - 1 <= 2 * COPIES
    assert len(casting) == 2 and casting[0] is casting[1]  # one cast of the factors for both passes of a step


def test_memory_lines_come_only_when_asked_for(make_config, capsys):
    train_lora(make_config("name=quiet", "train.steps=1"))
    assert "before_forward" not in capsys.readouterr().out
    train_lora(make_config("name=loud", "train.steps=1", "coat.memory.log_memory_stats=true"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    stages = ["before_forward", "after_forward", "after_backward", "after_optimizer_step"]
    assert [line.split("]")[0][1:] for line in lines] == stages
    form = r"\[\w+\] Step 1: Allocated: \d+\.\d\dGB, Reserved: \d+\.\d\dGB"
    assert all(re.fullmatch(form, line) for line in lines)


PREVIEWS = ("sample.sample_steps=1", "sample.width=64", "sample.height=64")


def poison(monkeypatch, steps, where):
    """NaN in the loss, or in the gradient of the last lora_B, at these steps (from 0)."""
    real, of_step = flux_lora.FlowMatching.losses_at, Trainer.train_step

    def train_step(trainer):
        poison.step, poison.trainer = trainer.step, trainer
        return of_step(trainer)

    def losses_at(self, model, *arguments):
        found = real(self, model, *arguments)
        if poison.step not in steps or not model.training:
            return found
        bad = paddle.to_tensor(float("nan"))
        if where == "loss":
            return type(found)(found.mean * bad, found.of_pictures)
        list(poison.trainer.side.parameters.values())[-1].register_hook(lambda gradient: gradient * bad)
        return found

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(flux_lora.FlowMatching, "losses_at", losses_at)


def state(trainer):
    """Every bit that a skipped step must leave alone."""
    from ppcoat.train.run_state import optimizer_tensors

    tensors = {f"weight {n}": p for n, p in trainer.side.parameters.items()}
    tensors |= {
        f"optimizer {n}": t
        for n, t in optimizer_tensors(trainer.side.optimizer, trainer.side.parameters).items()
    }
    tensors |= {f"mean {n}": t for n, t in trainer.state.ema.tensors.items()}
    bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return bits | {"schedule": (trainer.side.schedule.last_epoch, trainer.side.schedule.last_lr)}


@pytest.mark.parametrize(
    ("where", "coat"),
    [("loss", "true"), ("gradient", "false"),
     *(pytest.param(*each, marks=pytest.mark.slow) for each in (("loss", "false"), ("gradient", "true")))],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(make_config, monkeypatch, coat, where):
    seen, step = {}, Trainer.train_step

    def watched(trainer):
        before = state(trainer)
        result = step(trainer)
        seen[trainer.step] = (result.skipped, before == state(trainer))
        return result

    monkeypatch.setattr(Trainer, "train_step", watched)
    if where == "gradient":
        poison(monkeypatch, {2}, where)
    else:
        poison(monkeypatch, {1, 2}, where)
    config = make_config(f"coat.enabled={coat}", "train.steps=5", "train.lr_scheduler=cosine",
                         "train.ema.use_ema=true", "save.save_every=3")  # fmt: skip
    if where == "gradient":  # the hook stays: every step from then on is bad
        with pytest.raises(FloatingPointError, match="first bad tensor is the gradient of .*lora_B"):
            train_lora(config.model_copy(update={"train": config.train.model_copy(
                update={"max_skipped_in_a_row": 2})}))  # fmt: skip
        assert seen == {1: (False, False), 2: (False, False), 3: (True, True)}
        return
    result = train_lora(config)
    good = (False, False)
    assert seen == {1: good, 2: (True, True), 3: (True, True), 4: good, 5: good}
    assert [line["skipped_steps"] for line in log(config)] == [0, 1, 2, 2, 2]
    assert log(config)[1]["loss"] == "nan" and len(result.losses) == 3
    assert all(np.isfinite(value).all() for value in weights(result).values())


def test_skipped_steps_survive_a_resume(make_config, monkeypatch):
    config = make_config("train.steps=4", "train.max_skipped_in_a_row=3")
    bad = {0, 1, 2}
    poison(monkeypatch, bad, "loss")
    with pytest.raises(
        FloatingPointError, match="3 steps in a row .* in step 3 the first bad tensor is the loss"
    ):
        train_lora(config)
    assert (config.run_dir / "checkpoints" / "latest").read_text() == "000000002\n"
    with pytest.raises(FloatingPointError, match="3 steps in a row"):  # it had two before it went on
        train_lora(config)
    bad.clear()
    train_lora(config)
    assert [line["skipped_steps"] for line in log(config)] == [1, 2, 2, 2]


def test_the_first_bad_module_is_named(make_config, monkeypatch):
    built = lora_run.build_trainer

    def build(*arguments):
        trainer = built(*arguments)
        norm = trainer.model.norm_out.linear.weight
        norm.set_value(paddle.full_like(norm, 3e38))  # finite: what it makes is not
        return trainer

    monkeypatch.setattr(lora_run, "build_trainer", build)
    with pytest.raises(
        FloatingPointError, match=r"the loss, nan, and before it the output of norm_out\.linear\."
    ):
        train_lora(make_config("train.max_skipped_in_a_row=1"))


def test_the_gradient_norm_is_that_of_the_gradients(make_config, monkeypatch):
    norms = []
    update = Trainer._update

    def watched(trainer, *arguments):
        squares = [np.sum(p.grad.numpy().astype(np.float64) ** 2) for p in trainer.side.parameters.values()]
        norms.append(np.sqrt(np.sum(squares)))
        return update(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_update", watched)
    config = make_config("train.steps=3", "train.gradient_accumulation=2", "train.max_grad_norm=0.001")
    train_lora(config)
    np.testing.assert_allclose([line["grad_norm"] for line in log(config)], norms, rtol=1e-5)
    assert min(norms) > 0.001  # before clipping


def test_bins_hold_the_losses_of_their_noise_levels(make_config, monkeypatch):
    """With a level given for each of two pictures, two of the four bins have a mean, at each point."""
    noise = np.random.default_rng(0).standard_normal((2, 16, 64), dtype=np.float32)
    levels = np.array([0.3, 1.0], dtype=np.float32)
    monkeypatch.setattr(flux_lora.FlowMatching, "draw", lambda self, batch, rng: (levels, noise))
    config = make_config("train.steps=5", "logging.log_every=2")
    train_lora(config)
    lines = log(config)
    bins = [sorted(name for name in line if name.startswith("loss_sigma")) for line in lines]
    both = ["loss_sigma_0.25_0.50", "loss_sigma_0.75_1.00"]
    assert bins == [[], both, [], both, both]
    # both pictures are in each step, so the mean of the bins is the mean of the losses since the last point
    for at, since in ((1, (0, 1)), (3, (2, 3)), (4, (4,))):
        mean = np.mean([lines[at][name] for name in both])
        assert mean == pytest.approx(np.mean([lines[i]["loss"] for i in since]), rel=1e-5)


def test_bins_go_on_after_a_resume(make_config, stopped_in):
    whole = make_config("name=whole", "train.steps=4", "save.save_every=3", "logging.log_every=4")
    train_lora(whole)
    halves = make_config("name=halves", "train.steps=4", "save.save_every=3", "logging.log_every=4")
    stopped_in(3, train_lora, halves)
    train_lora(halves)
    assert log(whole) == log(halves) and any("loss_sigma" in name for name in log(whole)[-1])


def test_previews_come_first_if_wanted_and_do_not_change_training(make_config, capfd):
    common = ("train.steps=2", "network.dropout=0.2", *PREVIEWS)
    plain = train_lora(make_config("name=plain", *common))
    wanted = ("sample.sample_every=1", "sample.skip_first_sample=false", "sample.prompts=[a, b]")
    drawn = make_config("name=drawn", *common, *wanted)
    assert equal(weights(plain), weights(train_lora(drawn)))
    names = sorted(path.name for path in (drawn.run_dir / "samples").iterdir())
    assert names == [f"{step:09d}_{number:02d}.png" for step in (0, 1, 2) for number in (0, 1)]
    assert "step 0: 2 previews in " in capfd.readouterr().err
    more = make_config("name=drawn", *common, *wanted, "train.steps=3")
    train_lora(more)
    assert "step 2: 2 previews" not in capfd.readouterr().err
    forced = (*wanted, "train.steps=4", "sample.force_first_sample=true", "sample.prompts=[a]")
    train_lora(make_config("name=drawn", *common, *forced))
    assert "step 3: 1 preview in " in capfd.readouterr().err


def test_output_preservation_adds_its_gradient_in_a_pass_of_its_own(make_config, monkeypatch):
    """The first step's gradient against that of the sum of both losses in one graph."""
    flags = ["trigger_word=sks", "train.diff_output_preservation=true", "train.steps=1", "network.dropout=0",
             "train.diff_output_preservation_multiplier=3"]  # fmt: skip
    found = {}
    step = Trainer.train_step

    def compared(trainer):
        side, start = trainer.side, np.random.default_rng(3)
        for parameter in side.parameters.values():  # B is not 0, so that there is something to preserve
            parameter.set_value(
                paddle.to_tensor(0.1 * start.standard_normal(parameter.shape, dtype="float32"))
            )
        rng = np.random.default_rng([trainer.config.seed, trainer.step])
        rng.integers(2**31)
        order = trainer.state.batches.state_dict()
        _, mine = trainer._draw(rng)
        trainer.state.batches.load_state_dict(order)
        loss = side.objective.losses_at(trainer.model, *mine).mean
        preserved = 3 * side.objective.preservation_at(trainer.model, *mine)
        (loss + preserved).backward()
        wanted = np.sqrt(sum(float(p.grad.square().sum()) for p in side.parameters.values()))
        side.optimizer.clear_grad()
        result = step(trainer)
        found.update(norm=result.grad_norm / wanted, loss=result.loss / float(loss),
                     preservation=result.preservation / float(preserved))  # fmt: skip
        return result

    monkeypatch.setattr(Trainer, "train_step", compared)
    config = make_config(*flags, "coat.activation.policy=none")
    train_lora(config)
    assert found == pytest.approx(dict.fromkeys(("norm", "loss", "preservation"), 1.0), rel=1e-4)
    assert log(config)[0]["preservation_loss"] > 0
