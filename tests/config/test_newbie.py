"""The NewBie trainer's TOML: every key read, differences said, mistakes named with their line."""

import logging
import tracemalloc
from pathlib import Path

import pytest

from ppcoat.config.load import dump_config, load_config
from ppcoat.config.newbie import DEFAULT_TARGETS, known_keys, load_newbie_config
from ppcoat.errors import ConfigError
from ppcoat.models.newbie.pipeline import PROMPT_PREFIX

CONFIGS = Path(__file__).parents[2] / "configs"
# Keys that the published trainer reads.
PUBLISHED = """base_model_path trust_remote_code output_dir output_name train_data_dir resolution
dataloader_num_workers enable_bucket use_cache gemma3_prompt train_batch_size num_epochs save_epochs_interval
learning_rate lr_scheduler lr_warmup_steps gradient_checkpointing mixed_precision adapter_type lora_rank
lora_alpha lora_dropout lora_target_modules lokr_rank lokr_alpha lokr_target_modules lokr_dropout
lokr_rank_dropout lokr_module_dropout lokr_factor lokr_train_norm gemma_model_path clip_model_path
transformer_path vae_path optimizer_type gradient_clip_norm use_flash_attention_2"""
MINIMAL = """[Model]
base_model_path = "m"
output_dir = "o"
output_name = "n"
train_data_dir = "d"
"""


@pytest.fixture
def load(tmp_path):
    """load("[Model] lines", "overrides") -> RunConfig of MINIMAL and these lines."""
    file = tmp_path / "my.toml"

    def read(text="", *overrides):
        file.write_text(MINIMAL + text, encoding="utf-8")
        return load_newbie_config(file, overrides)

    return read


def test_all_published_keys_are_known():
    assert known_keys() == sorted(PUBLISHED.split())


def test_the_template_becomes_a_run_of_the_same_numbers():
    config = load_newbie_config(CONFIGS / "newbie_lora.toml")
    assert config.model.family == "newbie" and config.model.dtype == "auto"
    assert config.model.prompt_prefix == PROMPT_PREFIX
    train, network, data = config.train, config.network, config.data
    assert (train.num_epochs, train.lr, train.lr_scheduler, train.lr_warmup_steps) == (
        50,
        1e-4,
        "cosine",
        100,
    )
    assert (train.batch_size, train.max_grad_norm, train.gradient_checkpointing) == (1, 1.0, True)
    assert train.optimizer == "coat_fp8_adamw" and config.uses_fp8_optimizer and not config.coat.enabled
    assert (network.type, network.linear, network.linear_alpha, network.dropout) == ("lora", 32, 32, 0.05)
    assert network.targets == DEFAULT_TARGETS
    assert (data.folder_path, data.resolution, data.bucket_rule) == ("data/train", 1024, "aspect")
    assert data.cache_to_disk and data.default_caption == ""
    assert str(config.run_dir) == "output/newbie_lora" and config.save.save_every_epochs == 5
    assert (config.sample.guidance_scale, config.sample.sample_steps, config.sample.width) == (5.0, 28, 1024)


@pytest.mark.parametrize(
    ("name", "rank", "resolution", "rate", "targets"),
    [("_16gb", 16, 768, 5e-5, 3), ("", 32, 1024, 1e-4, 5), ("_40gb", 64, 1024, 2e-4, 9)],
)
def test_the_three_strategies(name, rank, resolution, rate, targets):
    config = load_newbie_config(CONFIGS / f"newbie_lora{name}.toml")
    assert (config.network.linear, config.data.resolution, config.train.lr) == (rank, resolution, rate)
    assert len(config.network.targets) == targets
    assert config.name == f"newbie_lora{name}"


def test_no_two_files_hold_one_strategy():
    """Their own name apart."""
    configs = [load_newbie_config(file).model_copy(update={"name": ""})
               for file in sorted(CONFIGS.glob("newbie*.toml"))]  # fmt: skip
    assert len(configs) == 3
    assert all(first != second for i, first in enumerate(configs) for second in configs[:i])


def test_what_is_left_out_is_as_in_the_template(load):
    left_out, given = load(), load_newbie_config(CONFIGS / "newbie_lora.toml")
    same = {name: getattr(given, name) for name in ("name", "output_dir", "model", "datasets", "save")}
    assert left_out.model_copy(update=same) == given
    assert left_out.save.save_every_epochs == 1 and left_out.model.prompt_prefix is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('adapter_type = "lyco-lokr"\nlora_rank = 9\nlora_alpha = 3', ("lokr", 9, 3.0, -1)),
        ('adapter_type = "lokr"\nlokr_rank = 114514\nlokr_factor = 8', ("lokr", 114514, 114514.0, 8)),
        (
            'adapter_type = "lycoris_lokr"\nlokr_rank = 4\nlokr_alpha = 1\nlora_alpha = 7',
            ("lokr", 4, 1.0, -1),
        ),
        ("lora_rank = 8\nlora_alpha = 4\nlokr_rank = 2", ("lora", 8, 4.0, -1)),
        ("lora_rank = 8", ("lora", 8, 8.0, -1)),
    ],
)
def test_adapters(load, text, expected):
    network = load(text).network
    assert (network.type, network.linear, network.linear_alpha, network.lokr_factor) == expected


def test_what_has_no_effect_or_another_one_is_said(load, caplog):
    text = """trust_remote_code = true
dataloader_num_workers = 4
mixed_precision = "fp16"
lr_scheduler = "constant"
lr_warmup_steps = 100
gemma3_prompt = "Draw. <Prompt Start>"
adapter_type = "lokr"
lokr_dropout = 0.1
lokr_train_norm = true
[Optimization]
use_flash_attention_2 = true
"""
    with caplog.at_level(logging.WARNING):
        config = load(text)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "no effect here: trust_remote_code, dataloader_num_workers, use_flash_attention_2" in said
    assert "fp16 becomes bf16" in said and "constant has no warmup" in said and "without the space" in said
    assert "lokr_dropout has no effect" in said and "my.toml:14: norms stay frozen" in said
    assert config.train.lr_warmup_steps == 0 and config.network.dropout == 0
    assert config.model.prompt_prefix == "Draw. <Prompt Start>"


def test_own_tables_and_overrides_win(load):
    config = load(
        "lora_rank = 8\nlr_warmup_steps = 5\n[coat]\nenabled = true\n"
        '[sample]\nprompts = ["a"]\nwidth = 64\n[network]\ndropout = 0.5',
        "train.steps=7",
        "name=other",
    )
    assert config.coat.enabled and config.sample.prompts == ("a",) and config.sample.width == 64
    assert (config.network.linear, config.network.dropout, config.name) == (8, 0.5, "other")
    assert (config.train.steps, config.train.num_epochs, config.save.save_every_epochs) == (7, None, None)


def test_optimizers_are_named_and_rated_as_in_yaml(load, caplog):
    train = load('[train]\noptimizer = "Prodigy8bit"\n').train
    assert (train.optimizer, train.lr, train.weight_decay, train.fp8_states) == ("prodigy", 1.0, 0.0, True)
    assert "train.lr: came 0.0001, read as 1" in caplog.text
    with pytest.raises(
        ConfigError, match="train.optimizer: came 'sgd'; unknown optimizer 'sgd', the nearest"
    ):
        load("", "train.optimizer=sgd")


def test_the_saved_settings_are_read_back_equal(load, tmp_path):
    config = load("lora_rank = 8")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lora_rnak = 8", "my.toml:6: unknown key 'lora_rnak'; the nearest known key is 'lora_rank'"),
        ("\nresolution = 100", "my.toml:7: resolution: came 100, wanted .*multiple of 16"),
        ('learning_rate = "fast"', "my.toml:6: learning_rate: came 'fast', wanted a number"),
        ('lr_scheduler = "cosin"', "my.toml:6: lr_scheduler: came 'cosin', wanted"),
        ('optimizer_type = "Lion"', "my.toml:6: optimizer_type: came 'Lion', wanted one of AdamW, AdamW8bit"),
        ('enable_bucket = "yes"', "enable_bucket: came 'yes', wanted one of true, false"),
        ("adapter_type = 1", "adapter_type: came 1"),
        ('vae_path = "v"', "vae_path: give base_model_path, .*convert_newbie_to_diffusers.py"),
        ("[Modle]\na = 1", "unknown table or key 'Modle'; known are Model, Optimization"),
        ("[coat]\nenabeld = true", "unknown key 'coat.enabeld'; the nearest known key is 'coat.enabled'"),
        ("lora_rank = ", "this is not TOML"),
        ("lora_rank = 0", "my.toml:6: lora_rank: came 0, wanted"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(load, text, part):
    with pytest.raises(ConfigError, match=part):
        load(text)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"the ending '.yaml', wanted .toml"):
        load_newbie_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_newbie_config(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text("[Model]\nbase_model_path = 'm'\n")
    with pytest.raises(ConfigError, match="the key '.*' is missing"):
        load_newbie_config(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is UTF-16"):
        load_newbie_config(tmp_path / "c.toml")


def test_of_a_file_that_is_no_config_only_the_beginning_is_read(tmp_path):
    file = tmp_path / "weights.toml"
    with file.open("wb") as stream:
        stream.truncate(200_000_000)  # a hole: it takes no room
    tracemalloc.start()
    with pytest.raises(ConfigError, match="more than 1048576 bytes; is this the right file"):
        load_newbie_config(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


def test_doras_are_trained_on_flux_only(load):
    with pytest.raises(
        ConfigError, match="network.type dora is for model.family flux only; use lora or lokr"
    ):
        load("", "network.type=dora")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.prompt_prefix=a", "model.prompt_prefix is for model.family newbie only"),
        ("train.max_sequence_length=513", "came 513, but FLUX's T5 reads at most 512"),
        ("save.save_every_epochs=2", "save_every_epochs needs train.num_epochs"),
    ],
)
def test_flux_runs_refuse_what_is_newbie_s(tmp_path, override, part):
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nmodel: {name_or_path: m}\ndatasets: [{folder_path: d}]\n")
    with pytest.raises(ConfigError, match=part):
        load_config(file, [override])


def test_released_weights_and_backslashes_are_told_what_to_do(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[Model]\nbase_model_path = 'consolidated.00-of-01.pth'\n")
    with pytest.raises(
        ConfigError, match=r"a.toml:2: base_model_path: came 'cons.*convert-newbie --checkpoint"
    ):
        load_newbie_config(path)
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "consolidated.00-of-01.pth").touch()
    path.write_text(f"[Model]\nbase_model_path = '{tmp_path / 'released'}'\n")
    with pytest.raises(
        ConfigError, match=r"released', a folder of .*--checkpoint .*released.consol.*pth \.\.\."
    ):
        load_newbie_config(path)
    path.write_text('[Model]\ntrain_data_dir = "D:\\Train\\set"\n')
    with pytest.raises(ConfigError, match="not TOML.* a path with backslashes wants single quotes"):
        load_newbie_config(path)
