"""The Linears of FLUX.1-dev that a config chooses."""

import logging
import re

import paddle

from ppcoat.coat import chosen_modules
from ppcoat.config.load import load_config
from ppcoat.models.flux.transformer import FluxTransformer2DModel

AI_TOOLKIT = """\
job: extension
config:
  name: shirts
  process:
    - type: sd_trainer
      training_folder: output
      network: {type: lora, linear: 16, linear_alpha: 16}
      datasets: [{folder_path: photos}]
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
"""


def test_what_the_warning_advises_trains_what_ai_toolkit_trains(tmp_path, caplog):
    """All 494 Linears in the blocks (19 times 14, 38 times 6), 76 of modulation among them; and it is not
    warned again."""
    file = tmp_path / "run.yaml"
    file.write_text(AI_TOOLKIT, "utf-8")
    with paddle.LazyGuard():
        flux = FluxTransformer2DModel(guidance_embeds=True)
    with caplog.at_level(logging.WARNING):
        plain = chosen_modules(load_config(file).network, flux)
    assert len(plain) == 418
    form = r"network.targets: (\[.+?\]) and network_kwargs.ignore_if_contains: (\[.+?\]);"
    advice = re.search(form, caplog.text)
    caplog.clear()
    kwargs = f"targets: {advice[1]}, network_kwargs: {{ignore_if_contains: {advice[2]}}}"
    file.write_text(AI_TOOLKIT.replace("linear_alpha: 16", f"linear_alpha: 16, {kwargs}"), "utf-8")
    with caplog.at_level(logging.WARNING):
        chosen = chosen_modules(load_config(file).network, flux)
    assert len(chosen) == 494 and set(plain) < set(chosen)
    assert all(path.startswith(("transformer_blocks.", "single_transformer_blocks.")) for path in chosen)
    assert "modulation" not in caplog.text
