"""Values that need more than another name."""

import pytest


@pytest.mark.parametrize(
    ("written", "ours"),
    [("cuda", "auto"), ("cuda:0", "auto"), ("cuda:3", "gpu:3"), ("cpu", "cpu"), ("gpu:1", "gpu:1")],
)
def test_devices(load, warnings, written, ours):
    assert load(f"device={written}").device == ours
    assert len(warnings(f"device={written}")) == (ours == "auto")  # a run on the CPU should be no surprise


@pytest.mark.parametrize(("written", "ours"), [("bf16", "auto"), ("bfloat16", "auto"), ("fp32", "float32")])
def test_train_dtype_runs_on_a_cpu_too(load, written, ours):
    assert load(f"train.dtype={written}").model.dtype == ours


def test_adamw8bit_keeps_its_states_in_fp8_unless_that_is_forbidden(load, warnings):
    config = load("train.optimizer=adamw8bit")
    assert config.train.optimizer == "coat_fp8_adamw" and config.uses_fp8_optimizer
    off = ("train.optimizer=adamw8bit", "coat.optimizer.use_fp8=false")
    assert not load(*off).uses_fp8_optimizer
    assert "kept in full" in warnings(*off)[0]


@pytest.mark.parametrize(
    "spelling", ["train.adam8bit=true", "train.optimizer=adam8bit", "train.optimizer=AdamW8bit"]
)
def test_each_spelling_of_8_bit_adam_is_read_as_fp8_with_one_line(load, warnings, spelling):
    assert load(spelling).train.optimizer == "coat_fp8_adamw"
    assert len(warnings(spelling)) == 1 and "FP8" in warnings(spelling)[0]


@pytest.mark.parametrize(
    ("written", "ours", "fp8"),
    [
        ("prodigy", "prodigy", False),
        ("Prodigy", "prodigy", False),
        ("prodigy8bit", "prodigy", True),
        ("lion", "lion", False),
        ("Lion8bit", "lion", True),
        ("AdaFactor", "adafactor", False),
        ("AdamWScheduleFree", "schedulefree_adamw", False),
        ("PagedAdamW8bit", "coat_fp8_adamw", True),
    ],
)
def test_names_of_ai_toolkit_and_kohya_are_read(load, warnings, written, ours, fp8):
    config = load(f"train.optimizer={written}", "train.lr=1")
    assert (config.train.optimizer, config.uses_fp8_optimizer) == (ours, fp8)
    assert len(warnings(f"train.optimizer={written}", "train.lr=1")) == fp8
    assert config.train.weight_decay == (0.01 if ours == "adamw" or "coat" in ours else 0.0)


def test_an_optimizer_that_nobody_has_is_answered_with_the_nearest(refusal):
    said = refusal("train.optimizer=prodogy")
    assert "unknown optimizer 'prodogy', the nearest is 'prodigy'" in said and "lion8bit" in said
    assert "the nearest known key is 'train.optimizer_params.d_coef'" in refusal(
        "train.optimizer=prodigy", "train.optimizer_params.d_coeff=2"
    )


def test_prodigy_needs_no_rate_and_a_small_one_becomes_1_with_a_line(load, warnings):
    (said,) = warnings("train.optimizer=prodigy", "train.lr=1e-4")
    assert "read as 1: prodigy finds the rate by itself" in said
    assert load("train.optimizer=prodigy", "train.lr=1e-4").train.lr == 1.0
    assert load("train.optimizer=prodigy", "train.lr=0.5").train.lr == 0.5
    assert load("train.optimizer=lion", "train.lr=1e-4").train.lr == 1e-4


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.optimizer_params.d0=1e-4"], "prodigy has no effect with optimizer adamw"),
        (["train.optimizer=adafactor", "train.beta1=0.8"], "adafactor.beta1 is its momentum"),
        (
            ["train.optimizer=prodigy", "train.optimizer_params.decouple=false"],
            "always decoupled; wanted true",
        ),
        (["train.optimizer=schedulefree_adamw", "train.beta1=0"], "beta1 must be above 0"),
        (
            ["train.optimizer=schedulefree_adamw", "train.ema_config.use_ema=true"],
            "writes an average by itself",
        ),
        (["train.optimizer=adafactor", "train.adafactor.warmup_init=true"], "without relative_step: true"),
        (["train.fp8_states=true", "coat.optimizer.use_fp8=false"], "fp8_states: true contradicts"),
    ],
)
def test_settings_that_an_optimizer_does_not_read_are_refused(refusal, overrides, part):
    assert part in refusal(*overrides)


def test_the_older_accumulation_counts_forward_passes(load, warnings):
    """ai-toolkit: with N, every forward pass is a step, so updates = steps / N and a save every S steps
    is one every S / N updates."""
    given = ("train.gradient_accumulation_steps=4", "train.steps=5001", "save.save_every=500",
             "sample.sample_every=250", "logging.log_every=10")  # fmt: skip
    config = load(*given)
    assert (config.train.gradient_accumulation, config.train.steps) == (4, 1250)
    assert (config.save.save_every, config.sample.sample_every, config.logging.log_every) == (125, 62, 2)
    (said,) = warnings(*given)
    assert "train.steps 1250, save.save_every 125, sample.sample_every 62, logging.log_every 2" in said
    assert load(*given, "train.disable_sampling=true").sample.sample_every == 0


def test_the_older_accumulation_and_the_newer_one_exclude_each_other(refusal):
    message = refusal("train.gradient_accumulation_steps=2", "train.gradient_accumulation=2")
    assert "remove one of them" in message
    assert "not one whole update" in refusal("train.gradient_accumulation_steps=4", "train.steps=3")


@pytest.mark.parametrize(
    ("name", "params", "warmup"),
    [
        ("constant", "{}", 0),
        ("constant_with_warmup", "{num_warmup_steps: 30}", 30),
        ("constant_with_warmup", "{}", 1000),  # ai-toolkit's default
        ("cosine", "{eta_min: 0.0, total_iters: 2000}", 0),
        ("linear", "{start_factor: 1.0, end_factor: 0.0}", 0),
        ("cosine_with_restarts", "{T_0: 2000}", 0),
        ("polynomial", "{power: 2.0, num_warmup_steps: 10}", 10),
        ("step", "{step_size: 500, gamma: 0.5}", 0),
    ],
)
def test_schedules_that_are_the_same_in_both(load, name, params, warmup):
    given = (f"train.lr_scheduler={name}", f"train.lr_scheduler_params={params}", "train.steps=2000")
    config = load(*given)
    assert (config.train.lr_scheduler, config.train.lr_warmup_steps) == (name, warmup)
    scaled = load(*given, "train.gradient_accumulation_steps=2")
    assert (scaled.train.steps, scaled.train.lr_warmup_steps) == (1000, warmup // 2)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("linear", "{}"),  # rises from lr / 3 to lr
        ("linear", "{end_factor: 0.0}"),
        ("cosine", "{eta_min: 1e-6}"),
        ("cosine", "{total_iters: 500}"),
        ("constant", "{gamma: 1}"),
        ("constant", "5"),
        ("cosine_with_restarts", "{T_0: 500}"),  # restarts of unequal meaning: num_cycles says it here
        ("step", "{}"),
        ("step", "{gamma: 0.5}"),
    ],
)
def test_schedules_that_would_differ(refusal, name, params):
    message = refusal(f"train.lr_scheduler={name}", f"train.lr_scheduler_params={params}", "train.steps=2000")
    assert "train.lr_scheduler" in message and "lr" in message


def test_linear_in_the_short_form_falls_as_it_always_did(load):
    text = "name: a\nmodel: {name_or_path: m}\ndatasets: [{folder_path: d}]\ntrain: {lr_scheduler: linear}\n"
    assert load(text=text).train.lr_scheduler == "linear"


def test_what_shapes_a_schedule_arrives_counted_in_updates(load):
    params = "train.lr_scheduler_params={step_size: 500, gamma: 0.5}"
    train = load("train.lr_scheduler=step", params, "train.gradient_accumulation_steps=4").train
    assert (train.lr_step_size, train.lr_gamma) == (125, 0.5)
    cycles = load("train.lr_scheduler=cosine_with_restarts", "train.lr_scheduler_params={num_cycles: 3}")
    assert cycles.train.lr_num_cycles == 3
