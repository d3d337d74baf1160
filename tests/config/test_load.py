"""load_config: numbers, overrides, variables, names, round trip, and one line for every mistake."""

import math
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ppcoat.config.explain import OTHER_WORDS, _all_keys, schema_keys
from ppcoat.config.load import dump_config, load_config
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError

BASE = "name: shirts\nmodel:\n  name_or_path: tiny\ndatasets:\n  - folder_path: photos\n"
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    return path


def load(tmp_path, text, *overrides):
    return load_config(write(tmp_path, text), overrides)


def refusal(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "")


def test_defaults_and_properties(tmp_path):
    config = load(tmp_path, BASE)
    assert (config.network.linear, config.train.lr, config.coat.enabled) == (16, 1e-4, False)
    assert config.run_dir == pathlib.Path("output/shirts")
    assert config.data.folder_path == "photos"
    with pytest.raises(ValidationError):
        config.train.lr = 3.0


def test_fp8_optimizer_follows_coat_or_its_name(tmp_path):
    assert not load(tmp_path, BASE).uses_fp8_optimizer
    assert load(tmp_path, BASE + "coat: {enabled: true}").uses_fp8_optimizer
    assert load(tmp_path, BASE + "train: {optimizer: coat_fp8_adamw}").uses_fp8_optimizer
    off = "coat: {enabled: true, optimizer: {use_fp8: false}}"
    assert not load(tmp_path, BASE + off).uses_fp8_optimizer


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-04", ".0001", "0.0001", "+1e-4"])
def test_scientific_notation_is_a_number(tmp_path, text):
    assert load(tmp_path, BASE + f"train: {{lr: {text}}}").train.lr == 1e-4
    assert load(tmp_path, BASE, f"train.lr={text}").train.lr == 1e-4


def test_overrides_reach_every_place_and_the_last_wins(tmp_path):
    config = load(
        tmp_path,
        BASE,
        "train.steps=7",
        "train.steps=9",
        "datasets.0.folder_path=other",
        "coat.optimizer.m2_format=e5m2",
        "network.targets=[to_q, to_k]",
        "trigger_word=a=b",
    )
    assert config.train.steps == 9
    assert config.data.folder_path == "other"
    assert config.coat.optimizer.m2_format == "e5m2"
    assert config.network.targets == ("to_q", "to_k")
    assert config.trigger_word == "a=b"


def test_overrides_can_make_a_whole_config(tmp_path):
    config = load(tmp_path, "", "name=x", "model.name_or_path=m", "datasets.0.folder_path=d")
    assert (config.name, config.data.folder_path) == ("x", "d")


def test_name_and_variables_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("PHOTOS", "/data/[x]: y")
    monkeypatch.setenv("RATE", "3e-5")
    text = "name: a\nmodel:\n  name_or_path: base/[name]\ndatasets:\n  - folder_path: ${PHOTOS}\n"
    config = load(tmp_path, text + "train:\n  lr: ${RATE}\n", "output_dir=${PHOTOS}")
    assert config.model.name_or_path == "base/a"
    assert config.data.folder_path == config.output_dir == "/data/[x]: y"  # text only, never structure
    assert config.train.lr == 3e-5
    assert load(tmp_path, BASE + "trigger_word: $${x}").trigger_word == "${x}"


def test_unset_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    message = refusal(tmp_path, BASE + "trigger_word: ${NO_SUCH}")
    assert "run.yaml:6" in message and "${NO_SUCH}" in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stepz", "train.steps"),
        ("trian", "train"),
        ("datasets.0.captionext", "datasets.0.caption_ext"),
        ("coat.optimizer.blocksize", "coat.optimizer.block_size"),
        ("lr", "train.lr"),
        ("train.learning_rat", "train.lr"),  # another program's word, and a slip in it
        ("learning_rate", "train.lr"),
        ("train.max_train_steps", "train.steps"),
        ("sample.steps", "sample.sample_steps"),  # not train.steps
        ("train.warmup", "train.lr_warmup_steps"),
        ("network.dim", "network.linear"),
        ("model.path", "model.name_or_path"),
        ("datasets.0.path", "datasets.0.folder_path"),
        ("sample.size", "sample.width"),
    ],
)
def test_unknown_key_names_line_key_and_what_was_meant(tmp_path, key, meant):
    message = refusal(tmp_path, BASE, f"{key}=3")
    assert message == f"--set {key}=3: unknown key '{key}'; the nearest known key is '{meant}'"


def test_all_keys_with_problems_are_named(tmp_path):
    assert refusal(tmp_path, "name: a\n").endswith(" (and 1 more: datasets)")
    message = refusal(tmp_path, BASE + "train: {steps: a, lr: b}\nsave: {save_every: c}\n")
    assert message.endswith(" (and 2 more: train.lr, save.save_every)")


def test_one_text_in_the_place_of_a_list_is_shown_as_one(tmp_path):
    for text in ("kohya", "{x}"):
        message = refusal(tmp_path, BASE, f"save.format='{text}'")
        assert f"came '{text}', wanted a list such as [{text}] (" in message


def test_an_override_has_no_lines(tmp_path):
    said = refusal(tmp_path, BASE, "trigger_word=${NOT_SET_ANYWHERE}")
    assert said.startswith("--set trigger_word=${NOT_SET_ANYWHERE}: the environment variable")


def test_a_key_like_no_other_is_answered_with_those_of_its_section(tmp_path):
    for key in ("colours", "1"):  # control_path_1 has no word of it
        message = refusal(tmp_path, BASE + f"logging: {{{key}: 3}}\n")
        assert message.endswith(f"unknown key 'logging.{key}'; known are log_every, visualdl")


def test_no_key_is_suggested_that_would_be_refused(tmp_path):
    """train.embedding_lr and train.xformers are ai-toolkit's, and not followed."""
    for key in ("train.embeding_lr", "train.xformrs", "model.is_v_prd"):
        said = refusal(tmp_path, BASE, f"{key}=3")
        assert not any(known in said for known in ("embedding_lr", "xformers", "is_v_pred"))
    assert set(OTHER_WORDS.values()) <= schema_keys()


def test_unknown_key_in_the_file_names_the_line(tmp_path):
    message = refusal(tmp_path, BASE + "seed: 3\ntrain:\n  steps: 5\n  stepz: 6\n")
    assert message == "/run.yaml:9: unknown key 'train.stepz'; the nearest known key is 'train.steps'"


WRONG = [
    ("train: {steps: '5'}", "train.steps", "'5'", "whole number"),
    ("train: {steps: 5.0}", "train.steps", "5.0", "whole number"),
    ("train: {steps: 0123}", "train.steps", "123.0", "whole number"),
    ("train: {steps: true}", "train.steps", "True", "whole number"),
    ("train: {steps: -1}", "train.steps", "-1", "greater than or equal to 1"),
    ("train: {steps: 99999999999999999999}", "train.steps", "1e+20", "whole number"),
    ("train: {lr: '1e-4'}", "train.lr", "'1e-4'", "number without quotes"),
    ("train: {lr: 0}", "train.lr", "0", "greater than 0"),
    ("train: {lr: -1e-4}", "train.lr", "-0.0001", "greater than 0"),
    ("train: {lr: .nan}", "train.lr", "nan", "finite"),
    ("train: {lr: 1e309}", "train.lr", "inf", "finite"),
    ("train: {lr: [1]}", "train.lr", "[1]", "number"),
    ("train: {lr: }", "train.lr", "nothing", "number"),
    (
        "train: {timestep_type: foo}",
        "train.timestep_type",
        "'foo'",
        "'sigmoid', 'linear', 'shift' or 'weighted'",
    ),
    ("train: 5", "train", "5", "section"),
    ("train: {ema: null}", "train.ema", "nothing", "section"),
    ("coat: {enabled: 1}", "coat.enabled", "1", "true or false"),
    ("coat: {enabled: 'true'}", "coat.enabled", "'true'", "true or false"),
    ("coat: {optimizer: {m1_format: e3m4}}", "coat.optimizer.m1_format", "'e3m4'", "'e4m3' or 'e5m2'"),
    ("sample: {prompts: {a: b}}", "sample.prompts", "{'a': 'b'}", "a list"),
    ("train: {validation: {resolution: 100}}", "train.validation.resolution", "100", "multiple of 16"),
    ("sample:\n  prompts:\n    - a\n    - 5", "sample.prompts.1", "5", "quotes"),
    ("network: {targets: []}", "network.targets", "[]", "at least 1"),
    ("network: {linear: 0}", "network.linear", "0", "greater than or equal to 1"),
    ("trigger_word: 5", "trigger_word", "5", "quotes"),
    ("device: tpu", "device", "'tpu'", "gpu:N"),
    ("seed: -1", "seed", "-1", "greater than or equal to 0"),
]


@pytest.mark.parametrize(("text", "key", "came", "wanted"), WRONG)
def test_wrong_values_are_one_line(tmp_path, text, key, came, wanted):
    message = refusal(tmp_path, BASE + text)
    line = 6 + text.count("\n")
    assert message.startswith(f"/run.yaml:{line}: {key}: came {came}, wanted ")
    assert wanted in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {lr_warmup_steps: 5}", "constant_with_warmup"),
        ("train: {lr_warmup_steps: 5, steps: 4, lr_scheduler: linear}", "more than steps"),
        ("train: {optimizer: coat_fp8_adamw}\ncoat: {optimizer: {use_fp8: false}}", "contradicts"),
        ("trigger_word: ' '", "blank"),
        ("trigger_word: '[trigger]'", "replaces"),
    ],
)
def test_contradictions(tmp_path, text, part):
    assert part in refusal(tmp_path, BASE + text)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "''", "' a'", '"a\\nb"', "'a\\b'", "'[name]'"])
def test_names_that_are_no_folder_are_refused(tmp_path, name):
    assert "name" in refusal(tmp_path, BASE.replace("shirts", name))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the key 'name' is missing"),
        ("- a", "wanted sections"),
        ("a: [b", "run.yaml:1: this is not YAML"),
        (BASE + 'trigger_word: "\\ud800"', "run.yaml:6: \\ud800 holds half of a character"),
        (BASE + "name: again", "run.yaml:6: the key 'name' stands twice"),
        (BASE + "seed: 1\ntrain: {lr: 1.0, lr: 0.5}", "run.yaml:7: the key 'lr' stands twice"),
        (BASE + "seed: !!python/object/apply:os.system ['true']", "run.yaml:6: came the YAML tag"),
        (BASE + "seed: !!int 'x'", "tag"),
        (BASE + "a: &x [1]\nb: *x", "run.yaml:6: came a YAML alias or anchor"),
        (BASE + "[1]: 2", "as a key"),
        (BASE + "seed: \x00", "this is not YAML"),
        (BASE + "date: 2020-99-99", "unknown key 'date'"),
        ("[" * 5000, "nested deeper than 64 levels"),
        ("#" * (1 << 20) + "\n", "more than"),
        (BASE.replace("folder_path", "folder_pth"), "unknown key 'datasets.0.folder_pth'"),
        (BASE.replace("  - folder_path: photos\n", "  []\n"), "at least 1 entry"),
        (BASE + "train:\n\tsteps: 3", "run.yaml:7: this is not YAML: found character '\\t'"),
        (BASE + "train:\n\tsteps: 3", "there is a tab: indent with spaces"),
        (BASE + "seed:3\n", "a key wants a colon and a space before its value"),
        (
            BASE + "seed\uff1a3\n",
            "there is '\uff1a', a mark that only looks like one of YAML's: type it anew",
        ),
        (BASE + "train:\n\u3000steps: 3\n  lr: 1", "there is '\\u3000', a mark that only looks"),
        (BASE.replace("photos", "%HOME%/x"), "put the value in single quotes"),
        (BASE + "train: [1, 2\nseed: 3", "check the indentation, colons, quotes and brackets"),
    ],
)
def test_yaml_traps(tmp_path, text, part):
    assert part in refusal(tmp_path, text)


def test_a_config_of_more_keys_than_any_has_is_refused_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ppcoat.config.load.MAX_NODES", 40)
    assert "nothing" in refusal(tmp_path, BASE + "nothing: 1")
    many = "".join(f"k{i}: 1\n" for i in range(40))
    assert "more than 40 keys and values; wanted sections" in refusal(tmp_path, BASE + many)


def test_a_section_without_keys_is_as_if_it_were_not_there(tmp_path):
    """All of its keys commented out."""
    assert load(tmp_path, BASE + "train:\n# lr: 1\nsample:\ncoat: null\n") == load(tmp_path, BASE)
    assert load(tmp_path, BASE + "train:\n", "train.steps=3").train.steps == 3


def test_a_name_that_is_too_long_for_its_files_is_refused_before_they_are_written(tmp_path):
    load(tmp_path, BASE, "name=" + "x" * 160)
    said = refusal(tmp_path, BASE, "name=" + "\u88d9" * 54)
    assert "name: the name has 162 bytes as UTF-8, wanted at most 160" in said


def test_the_ending_of_a_config_may_have_capitals(tmp_path):
    for name, text in {"a.YAML": BASE, "a.Yml": BASE, "a.JSON": '{"name": "x"}'}.items():
        (tmp_path / name).write_text(text)
    assert load_config(tmp_path / "a.YAML") == load_config(tmp_path / "a.Yml")
    with pytest.raises(ConfigError, match="the key 'model' is missing"):
        load_config(tmp_path / "a.JSON")
    with pytest.raises(
        ConfigError, match="came the ending '.txt', wanted .yaml .* rename it, or check the path"
    ):
        load_config(tmp_path / "run.yaml.txt")


@pytest.mark.parametrize(
    "override",
    [
        "train",
        "=5",
        "train..lr=3",
        "name.x=3",
        "datasets.7.folder_path=x",
        "datasets.x=3",
        "0.a=1",
        "Train.lr=3",
        "datasets[0].folder_path=x",
    ],
)
def test_bad_overrides_are_named(tmp_path, override):
    assert refusal(tmp_path, BASE, override).startswith(f"--set {override}: ")


def test_unreadable_files(tmp_path):
    for path, part in ((tmp_path / "no.yaml", "No such file"), (tmp_path / "a.txt", "wanted .yaml")):
        with pytest.raises(ConfigError, match=part):
            load_config(path)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="no regular file but a folder"):
        load_config(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load_and_round_trip(tmp_path, path):
    config = load_config(path)
    assert load(tmp_path, dump_config(config)) == config


fuzz = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
awkward = st.sampled_from(
    ["1e-4", "yes", "null", "~", "01", "1:30", "2020-01-01", "${X}", "$${X}", "$", "a: b", "#"]
)


@fuzz
@given(
    word=texts | awkward,
    prompts=st.lists(texts | awkward, max_size=3),
    lr=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_dump_round_trips(tmp_path, word, prompts, lr, seed):
    base = load(tmp_path, BASE).model_dump()
    base |= {"trigger_word": None if "[" in word else word, "seed": seed}
    base["train"]["lr"], base["sample"]["prompts"] = (
        lr,
        [text.replace("[name]", "").replace("--", "") for text in prompts],
    )
    config = RunConfig.model_validate(base)
    assert load(tmp_path, dump_config(config)) == config


KEYS = [key for key in _all_keys(RunConfig, "") if key != "name"]
junk = st.one_of(
    st.sampled_from(
        [".nan", "1e309", "-1e309", "-1", "-0.5", "{}", "[]", "{a: 1}", "'x'", "", "!!int 3", "*x", "["]
    ),
    st.text(max_size=8),
)


@fuzz
@given(key=st.sampled_from(KEYS) | texts, value=junk)
def test_fuzzed_settings_load_finite_or_are_refused_in_one_line(tmp_path, key, value):
    try:
        config = load(tmp_path, BASE, f"{key}={value}")
    except ConfigError as error:
        assert str(error).startswith("--set ") or "run.yaml" in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        numbers = [each for section in config.model_dump().values() if isinstance(section, dict) for each in
                   section.values() if isinstance(each, float)]  # fmt: skip
        assert all(math.isfinite(number) and number >= 0 for number in numbers)


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ('"D:\\new\\train"', "a line end and a tab; write the path with forward slashes or in single quotes"),
        ('"D:\\bilder"', "a backspace"),
        ('"D:\\Users"', "a path with backslashes wants single quotes"),  # YAML knows no \\U
    ],
)
def test_backslashes_in_double_quotes_are_explained(tmp_path, written, part):
    message = refusal(tmp_path, BASE.replace("folder_path: photos", f"folder_path: {written}"))
    assert message.startswith("/run.yaml:5: ") and part in message


def test_no_places_beside_the_model_may_be_written_as_null(tmp_path):
    nothing = ["model.text_encoders=null", "model.tokenizers=null", "model.vae=null"]
    config = load(tmp_path, BASE, *nothing)
    assert config.model.beside == {"text_encoders": (), "tokenizers": ()}


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        tmp_path, BASE.replace("folder_path: photos", "folder_path: ~/photos") + "output_dir: ~/runs\n"
    )
    assert (config.data.folder_path, config.output_dir) == ("/home/me/photos", "/home/me/runs")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gb18030"])
def test_a_file_in_another_encoding_is_told_how_to_be_saved(tmp_path, encoding):
    path = tmp_path / "run.yaml"
    path.write_bytes((BASE + "\n# \u7ea2" * (encoding != "utf-16-le")).encode(encoding))
    with pytest.raises(ConfigError, match="it is UTF-16|line 7 is not UTF-8") as caught:
        load_config(path)
    assert ("UTF-16" in str(caught.value)) == encoding.startswith("utf-16")
    assert "save it as UTF-8: in the editor" in str(caught.value)
