"""ai-toolkit's form: nesting, defaults, overrides, other spellings, places in messages."""

import json
import pathlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppcoat.config import ai_toolkit
from ppcoat.config.ai_toolkit_keys import KEYS
from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = ROOT / "tests/fixtures/ai_toolkit/train_lora_flux_24gb.yaml"
POSSIBLE = ("train.ema_config.use_ema=false",)


def nested(*lines, **replaced):
    """A nested config with `lines` added to its process."""
    text = """\
job: extension
config:
  name: shirts
  process:
    - type: sd_trainer
      datasets: [{folder_path: photos, buckets: false}]
      model: {name_or_path: tiny}
"""
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text + "".join(f"      {line}\n" for line in lines)


def test_the_published_example_means_what_it_says(caplog):
    config = load_config(PUBLISHED, POSSIBLE)
    assert config.name == "first_flux_lora" and config.output_dir == "output" and config.device == "auto"
    assert (config.network.linear, config.network.linear_alpha, config.network.dropout) == (16, 16.0, 0.0)
    assert (config.save.dtype, config.save.save_every, config.save.max_step_saves_to_keep) == (
        "float16",
        250,
        4,
    )
    data = config.data
    assert (data.folder_path, data.caption_ext) == ("/path/to/images/folder", "txt")
    assert (data.caption_dropout_rate, data.bucket_rule, data.cache_to_disk) == (0.05, "ai-toolkit", True)
    assert [each.resolution for each in config.datasets] == [512, 768, 1024]
    assert len({each.folder_path for each in config.datasets}) == 1
    train = config.train
    assert (train.batch_size, train.steps, train.gradient_accumulation, train.lr) == (1, 2000, 1, 1e-4)
    assert train.gradient_checkpointing and train.optimizer == "coat_fp8_adamw" and train.epsilon == 1e-6
    assert (train.timestep_type, train.loss_type, train.lr_scheduler) == ("sigmoid", "mse", "constant")
    assert (config.model.name_or_path, config.model.dtype) == ("black-forest-labs/FLUX.1-dev", "auto")
    sample = config.sample
    assert (sample.sample_every, sample.width, sample.height, sample.seed) == (250, 1024, 1024, 42)
    assert (sample.guidance_scale, sample.sample_steps, sample.walk_seed) == (4.0, 20, True)
    assert sample.prompts[0] == "a red dress on a hanger, first_flux_lora"
    assert not config.coat.enabled
    said = [record.getMessage() for record in caplog.records]
    keys = ["device", "train.optimizer", "modulation"]
    assert len(said) == len(keys)  # each of them once
    for key in keys:
        assert sum(key in line for line in said) == 1, key


def test_the_shipped_clothing_config_needs_no_warning(caplog):
    config = load_config(ROOT / "configs/coat_flux_lora.yaml")
    assert not caplog.records
    assert config.coat.enabled and config.coat.memory.log_memory_stats and config.uses_fp8_optimizer
    assert (config.train.steps, config.train.gradient_accumulation, config.trigger_word) == (5000, 4, "sks")


def test_what_a_nested_file_leaves_out_is_as_in_ai_toolkit(load):
    """Figures of ai-toolkit's section classes; alpha is the rank for FLUX whatever it says."""
    config = load(text=nested())
    assert (config.network.linear, config.network.linear_alpha) == (4, 4.0)
    assert (config.train.lr, config.train.steps, config.train.epsilon) == (1e-6, 1000, 1e-6)
    assert config.train.gradient_checkpointing and config.data.resolution == 512
    assert (config.save.save_every, config.save.max_step_saves_to_keep) == (1000, 5)
    assert config.save.dtype == "float16" and config.logging.log_every == 100
    sample = config.sample
    assert (sample.sample_every, sample.seed, sample.guidance_scale, sample.sample_steps) == (100, 0, 7.0, 20)
    assert load("network.rank=8", text=nested()).network.linear_alpha == 8.0
    assert load("network.rank=null", text=nested()) == config


SHORT = "name: shirts\nmodel: {name_or_path: tiny}\ndatasets: [{folder_path: photos}]\n"


def test_the_short_form_takes_the_same_keys_and_keeps_our_defaults(load, warnings):
    text = SHORT + (
        "training_folder: runs\ntraining_seed: 3\n"
        "network: {rank: 8, network_kwargs: {only_if_contains: [to_q]}}\n"
        "train: {optimizer: adamw8bit, optimizer_params: {weight_decay: 0.1, betas: [0.8, 0.9]}, "
        "dtype: fp32, gradient_clipping: 0.5}\n"
    )
    config = load(text=text)
    assert (config.output_dir, config.seed, config.model.dtype) == ("runs", 3, "float32")
    assert (config.network.linear, config.network.only_if_contains) == (8, ("to_q",))
    train = config.train
    assert (train.weight_decay, train.beta1, train.beta2, train.max_grad_norm) == (0.1, 0.8, 0.9, 0.5)
    assert (train.optimizer, train.lr, config.network.linear_alpha) == ("coat_fp8_adamw", 1e-4, 16.0)
    assert len(warnings(text=text)) == 1  # adamw8bit
    assert not warnings(text=SHORT)


def test_alpha_is_honoured_and_the_difference_named(load, warnings):
    text = nested("network: {linear: 16, linear_alpha: 8, network_kwargs: {ignore_if_contains: [norm]}}")
    assert load(text=text).network.linear_alpha == 8.0
    (said,) = warnings(text=text)
    assert said.startswith("run.yaml:8: network.linear_alpha: 8 is honoured")


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        ("{}", "76"),
        ("{only_if_contains: [transformer.single_transformer_blocks.7.]}", "1"),
        ("{only_if_contains: [transformer.single_transformer_blocks.7.proj_out]}", None),
        ("{ignore_if_contains: [norm1]}", "38"),
    ],
)
def test_modulation_that_ai_toolkit_would_adapt_is_counted(warnings, kwargs, count):
    """19 double blocks with two, 38 single blocks with one."""
    said = [
        line for line in warnings(text=nested(f"network: {{network_kwargs: {kwargs}}}")) if "adapts" in line
    ]
    assert len(said) == (count is not None)
    assert all(f"also adapts {count} modulation" in line for line in said)


def test_overrides_take_both_forms_of_a_key_and_win_over_other_spellings(load):
    text = nested("training_folder: out", "train: {dtype: bf16, unet_lr: 2e-4}", "sample: {samples: []}")
    for start in ("", "config.process.0."):
        config = load(f"{start}train.steps=7", f"{start}train.lr=3e-4", f"{start}network.network_kwargs."
                      "ignore_if_contains=[ff]", text=text)  # fmt: skip
        assert (config.train.steps, config.train.lr) == (7, 3e-4)
        assert config.network.ignore_if_contains == ("ff",)
    config = load(
        "config.name=coats", "output_dir=runs", "model.dtype=float32", "sample.prompts=[a]", text=text
    )
    assert (config.name, config.output_dir, config.model.dtype) == ("coats", "runs", "float32")
    assert config.sample.prompts == ("a",)


def test_coat_stands_on_any_level_but_says_one_thing(load, refusal):
    coat = "coat: {enabled: true}"
    places = {
        "root": nested() + coat + "\n",
        "config": nested(config_=coat).replace("  name: shirts\n", f"  name: shirts\n  {coat}\n"),
        "process": nested(coat),
    }
    for text in places.values():
        assert load(text=text).coat.enabled
        assert not load("coat.enabled=false", text=text).coat.enabled
    assert load(text=nested(coat) + coat).coat.enabled
    message = refusal(text=nested("coat: {enabled: false}") + coat)
    assert message == "run.yaml:8: this coat section is not the one at run.yaml:9; keep one of them"
    assert refusal(text=nested() + "coat:\n  optimiser: 3\n").startswith(
        "run.yaml:9: unknown key 'coat.optimiser'"
    )


def test_variables_and_names_are_filled_in(load, refusal, monkeypatch):
    monkeypatch.setenv("PHOTOS", "/data")
    monkeypatch.delenv("NO_SUCH", raising=False)
    config = load(text=nested("training_folder: runs/[name]", photos="'${PHOTOS}/[name]'"))
    assert (config.data.folder_path, config.output_dir) == ("/data/shirts", "runs/shirts")
    message = refusal(text=nested("training_folder: ${NO_SUCH}"))
    assert message.startswith("run.yaml:8: the environment variable ${NO_SUCH} is not set")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian: {lr: 1}", "unknown key 'trian'; the nearest known key is 'train'"),
        ("skip_bad: true", "unknown key 'skip_bad'; the nearest known key is 'datasets.0.skip_bad'"),
        (
            "train: {skip_frist_sample: true}",
            "unknown key 'train.skip_frist_sample'; the nearest known key is 'train.skip_first_sample'",
        ),
        (
            "train: {ema_config: {use_emma: 1}}",
            "unknown key 'train.ema_config.use_emma'; the nearest known key is 'train.ema_config.use_ema'",
        ),
        ("train: {ema_config: 5}", "train.ema_config: came 5, wanted a section with keys"),
        ("train: {lr: a}", "train.lr: came 'a', wanted a number without quotes (peak learning rate)"),
        (
            "train: {unet_lr: a}",
            "train.unet_lr: came 'a', wanted a number without quotes (peak learning rate)",
        ),
        (
            "train: {lr: 1e-4, unet_lr: 2e-4}",
            "train.lr and train.unet_lr are one setting and differ; remove one of them",
        ),
        ("name: x", "the name of the run is config.name; remove this one"),
        ("network: 5", "network: came 5, wanted a section with keys (the LoRA)"),
    ],
)
def test_mistakes_name_line_key_and_nearest(refusal, line, message):
    assert refusal(text=nested(line)) == f"run.yaml:8: {message}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (nested(extension="generate"), "run.yaml:1: job: came 'generate'"),
        (nested().replace("  process:", "  processes:"), "run.yaml:2: config.process: wanted a list"),
        ("job: extension\nconfig: 5\n", "run.yaml:2: config: wanted a section"),
        ("job: extension\n", "config: wanted a section"),
        (nested() + "    - type: sd_trainer\n", "run.yaml:4: config.process: wanted a list with exactly one"),
        (nested() + "seed: 3\n", "run.yaml:8: unknown key 'seed'; wanted job, config, coat, meta"),
        (nested().replace("shirts", "shirts\n  device: cpu"), "run.yaml:4: unknown key 'config.device'"),
        (nested().replace("name: shirts", "process_: 1"), "run.yaml:3: unknown key 'config.process_'"),
        (nested().replace("  name: shirts\n", ""), "the key 'name' is missing"),
        (nested(sd_trainer="concept_slider"), "run.yaml:5: type: came 'concept_slider'"),
    ],
)  # fmt: skip
def test_other_outer_forms_are_refused(refusal, text, part):
    assert part in refusal(text=text)


def test_all_that_cannot_be_followed_is_listed_at_once(refusal):
    message = refusal(text=nested("train: {noise_offset: 0.1, train_text_encoder: true, optimizer: dadapt}"))
    assert message.startswith("run.yaml:8: train.train_text_encoder: came True, which cannot be followed")
    assert message.endswith("(and 2 more: train.optimizer, train.noise_offset)")


junk = st.sampled_from(
    [
        "",
        "{}",
        "[]",
        "{a: 1}",
        "[1, 2]",
        "[{a: 1}]",
        "'x'",
        "-1",
        "0",
        "1",
        "3",
        "2.5",
        "1e309",
        ".nan",
        "true",
    ]
    + ["no", "[a --w 3, b --w]", "[{prompt: a, width: b}]", "{num_warmup_steps: a}", "cuda:x", "flux"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.sampled_from(sorted(KEYS)), junk), min_size=1, max_size=3))
def test_any_value_of_any_key_loads_or_is_refused_in_one_line(load, pairs):
    overrides = [f"{key.replace('[]', '.0')}={value}" for key, value in pairs]
    try:
        load(*overrides)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).startswith("--set ") or "run.yaml" in str(error)


def test_buckets_are_ai_toolkit_s_unless_the_file_says_otherwise(load):
    rules = {
        "{folder_path: photos}": "ai-toolkit",
        "{folder_path: photos, buckets: false}": "square",
        "{folder_path: photos, square_crop: true}": "square",
        "{folder_path: photos, bucket_rule: aspect}": "aspect",
    }
    for entry, rule in rules.items():
        text = nested().replace("{folder_path: photos, buckets: false}", entry)
        assert load(text=text).data.bucket_rule == rule, entry
    assert load(text=SHORT).data.bucket_rule == "aspect"


def test_a_trigger_word_of_all_datasets_is_the_run_s(load):
    both = "datasets: [{folder_path: a, trigger_word: sks}, {folder_path: b, trigger_word: %s}]\n"
    start = "name: shirts\nmodel: {name_or_path: tiny}\n"
    config = load(text=start + both % "sks")
    assert (config.trigger_word, config.datasets[1].trigger_word) == ("sks", "sks")
    config = load(text=start + both % "ohwx")
    assert (config.trigger_word, config.datasets[1].trigger_word) == (None, "ohwx")
    assert load(text=start + "trigger_word: run\n" + both % "sks").trigger_word == "run"


def test_a_bad_bucket_switch_is_refused_under_its_name(refusal):
    for key in ("buckets", "square_crop"):
        message = refusal(f"datasets.0.{key}=2", text=nested())
        assert message == f"--set datasets.0.{key}=2: datasets.0.{key}: came 2; wanted true or false"


def test_keys_of_a_newer_version_that_ask_for_nothing_are_left_out_and_told(load, warnings, refusal):
    text = nested("train: {new_switch: false, some_list: [], an_option: null}", "model_extras: {}")
    assert load(text=text) == load(text=nested())
    said = [line for line in warnings(text=text) if "an unknown key that asks for nothing" in line]
    assert len(said) == 4
    assert "unknown key 'train.new_switch'" in refusal(text=nested("train: {new_switch: true}"))
    # a slip of a switch that is on by default is not nothing
    assert "nearest known key is 'train.gradient_checkpointing'" in refusal(
        text=nested("train: {gradient_checkpointng: false}")
    )
    assert "unknown key 'some_list'" in refusal(text=SHORT + "some_list: []\n")


def test_emptied_boxes_of_the_web_interface_ask_for_nothing(load, warnings):
    emptied = "trigger_word: ''", "training_folder: ''", "sample: null", "logging: null", "network: null"
    assert load(text=nested(*emptied)) == load(text=nested())
    assert not [line for line in warnings(text=nested(*emptied)) if "ai-toolkit also adapts" not in line]


@pytest.mark.parametrize(
    ("qtype", "base"),
    [("qfloat8", "fp8"), ("FLOAT_8", "fp8"), ("qint8", "int8"), ("NFLOAT_4", "nf4"), ("", "fp8"),
     ("uint4", "fp4"), ("uint6", "fp8")],
)  # fmt: skip
def test_names_of_formats_of_the_base_are_taken(load, qtype, base):
    assert load("model.quantize=true", f"model.qtype='{qtype}'", text=nested()).model.quantize == base
    assert load("model.quantize=false", f"model.qtype='{qtype}'", text=nested()).model.quantize is False


def test_another_kind_of_base_is_told_where_it_is_asked_for(warnings):
    told = "model.qtype: came 'uint4', the base is stored in fp4 instead"
    for quantize, number in (("true", 1), ("false", 0)):
        said = warnings(f"model.quantize={quantize}", "model.qtype=uint4", text=nested())
        assert sum(told in line for line in said) == number


def test_all_unknown_keys_are_in_one_message(refusal):
    message = refusal(text=nested("train: {stepz: 3, lion: true}", "model_id: 5", "network: {rnk: 3}"))
    first = "run.yaml:8: unknown key 'train.stepz'; the nearest known key is 'train.steps'"
    assert message == f"{first} (and 3 more: train.lion, model_id, network.rnk)"


def test_what_was_meant_is_looked_for_once_however_many_keys_are_unknown(refusal, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ai_toolkit, "known_instead", lambda location: asked.append(location) or "known are none"
    )
    message = refusal(text=SHORT + "train: {" + ", ".join(f"key_{i}: 1" for i in range(300)) + "}\n")
    assert len(asked) == 1 and message.endswith("train.key_299)")


def test_json_says_the_same_as_yaml(load, tmp_path):
    """As the web interface exports it: tabs, escapes beyond 16 bits, and comments of .jsonc."""
    data = {"job": "extension", "config": {"name": "shirts", "process": [{
        "type": "sd_trainer", "trigger_word": "sks", "training_folder": "a/b", "train": {"lr": 1e-4},
        "datasets": [{"folder_path": "photos", "default_caption": "\U0001f457 // no \"comment\""}],
        "model": {"name_or_path": "tiny"}}]}}  # fmt: skip
    text = json.dumps(data, indent="\t").replace("a/b", "a\\/b")
    config = load(text=yaml.safe_dump(data))
    for name, written in {"run.json": text, "run.jsonc": f"// by hand\n/* two\nlines */{text}"}.items():
        path = tmp_path / name
        path.write_text(written, "utf-8")
        assert load_config(path) == config
    assert config.data.default_caption == '\U0001f457 // no "comment"'
    path.write_text("// one\n" + text.replace('"lr": 0.0001', '"lr": "x"'), "utf-8")
    with pytest.raises(ConfigError, match=r"run\.jsonc:12: train\.lr: came 'x'"):
        load_config(path)
