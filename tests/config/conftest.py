"""Writing a config, loading it and catching what is said about it."""

import pytest

from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError

NESTED = """\
job: extension
config:
  name: shirts
  process:
    - type: sd_trainer
      network:
        network_kwargs: {ignore_if_contains: [norm]}
      datasets:
        - folder_path: photos
          buckets: false
      train:
        lr: 1e-4
      model:
        name_or_path: tiny
"""


@pytest.fixture
def load(tmp_path):
    """load("train.lr=1", ..., text=NESTED) -> RunConfig."""

    def load(*overrides, text=NESTED):
        path = tmp_path / "run.yaml"
        path.write_text(text, "utf-8")
        return load_config(path, overrides)

    return load


@pytest.fixture
def refusal(load, tmp_path):
    """refusal(...) -> the one line of the ConfigError, without the folder of the test."""

    def refusal(*overrides, text=NESTED):
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


@pytest.fixture
def warnings(load, caplog, tmp_path):
    """warnings(...) -> the warnings of a config that loads."""

    def warnings(*overrides, text=NESTED):
        caplog.clear()
        load(*overrides, text=text)
        return [record.getMessage().replace(f"{tmp_path}/", "") for record in caplog.records]

    return warnings
