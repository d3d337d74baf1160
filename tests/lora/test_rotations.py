"""PEFT's own OFT and BOFT: each version's formula by hand in float64, and what is refused.

test_programs.py holds them to PEFT itself.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ppcoat.errors import ConfigError
from ppcoat.lora import read_fitting, read_lora_file

Q = "transformer_blocks.0.attn.to_q"


def peft_folder(folder, tensors, **config):
    """A folder as PEFT writes it, with the tensors of to_q."""
    folder.mkdir()
    stem = f"base_model.model.{Q}"
    save_file(
        {f"{stem}.{role}": value for role, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def turned(weight, turn, strength):
    """W' - W where every four columns of W turn by turn^T."""
    return strength * (np.concatenate([part @ turn.T for part in np.split(weight, 16, 1)], 1) - weight)


ABOVE = np.float32([0.5, -0.25, 0.125, 0.75, -0.5, 0.25])  # of a skew 4 x 4
SKEW = np.zeros([4, 4])
SKEW[np.triu_indices(4, 1)] = ABOVE
SKEW -= SKEW.T
POWERS = [np.linalg.matrix_power(SKEW, power) for power in range(5)]
EXACT = (POWERS[0] - SKEW) @ np.linalg.inv(POWERS[0] + SKEW)
SHORT = SKEW / np.linalg.norm(SKEW) * 0.5 / 4  # of 16 blocks with eps 0.5
OLD = {
    "oft_r": np.float32(2 * np.triu(SKEW) + 3 * np.eye(4))[None].repeat(16, 0),
    "oft_s": np.full([64, 1], 2, "float32"),
}
PEFTS_OFT = {  # version and options of PEFT -> (tensors, config, R, factor of the rows)
    "0.18": ({}, {"peft_version": "0.18.0"}, POWERS[0] + 2 * (SKEW + POWERS[2] + POWERS[3]) + POWERS[4], 1),
    "0.17": ({}, {}, POWERS[0] + 2 * (SKEW + POWERS[2] + POWERS[3] + POWERS[4]), 1),
    "0.17, 3 terms": ({}, {"num_cayley_neumann_terms": 3}, POWERS[0] + 2 * (SKEW + POWERS[2]), 1),
    "0.18, 3 terms": ({}, {"num_cayley_neumann_terms": 3, "peft_version": "0.18.1@x"},
                      POWERS[0] + 2 * (SKEW + POWERS[2]) + POWERS[3], 1),
    "2 terms": ({}, {"num_cayley_neumann_terms": 2}, POWERS[0] + 2 * SKEW, 1),
    "exact": ({}, {"use_cayley_neumann": False}, EXACT, 1),
    "constrained": ({}, {"use_cayley_neumann": False, "coft": True, "eps": 0.5},
                    (POWERS[0] - SHORT) @ np.linalg.inv(POWERS[0] + SHORT), 1),
    "0.15": (OLD, {}, EXACT, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFTS_OFT)
def test_pefts_oft_of_every_version_and_option(tmp_path, name):
    tensors, config, turn, rows = PEFTS_OFT[name]
    tensors = tensors or {"oft_R.weight": ABOVE[None].repeat(16, 0)}
    folder = peft_folder(tmp_path / "oft", tensors, peft_type="OFT", r=16, oft_block_size=4, **config)
    file = read_lora_file(folder)
    (change,) = file.changes
    weight = np.random.default_rng(0).standard_normal([64, 64])
    for strength in (1.0, 0.5):
        want = strength * (rows * (weight + turned(weight, turn, 1.0)) - weight)
        np.testing.assert_allclose(change.kind.delta(weight, strength), want, atol=1e-6)
    assert file.what == "OFT of PEFT on 1 layer" and len(file.notes) == 1 and "no strength" in file.notes[0]


BUTTERFLY = np.zeros([4, 16, 4, 4], "float32")
ODD_PEFT = [  # tensors, config -> what is said
    ({"oft_R.weight": ABOVE[None]}, {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, "oft_R means nothing"),
    ({"oft_R.weight": ABOVE[None, :5]}, {"peft_type": "OFT"}, r"oft_R is \[1, 5\], wanted \[n, b"),
    ({"oft_R.weight": ABOVE[None, :1, None]}, {"peft_type": "OFT"}, r"oft_R is \[1, 1, 1\], wanted"),
    ({"oft_R.weight": ABOVE[None]}, {"peft_type": "OFT", "num_cayley_neumann_terms": 1e9}, "wanted 1 to 64"),
    ({"oft_R.weight": ABOVE[None]}, {"peft_type": "OFT", "eps": "x", "coft": True}, "eps must be a finite"),
    ({"oft_r": OLD["oft_r"]}, {"peft_type": "OFT", "r": 16}, "OFT of PEFT before 0.14"),
    ({"boft_R": BUTTERFLY[0]}, {"peft_type": "BOFT"}, r"boft_R is \[16, 4, 4\], wanted \[stages, n, b, b\]"),
    ({"boft_R": BUTTERFLY[:, :12]}, {"peft_type": "BOFT"}, r"BOFT of .*to_q: .* a multiple of 2\^3"),
    ({"boft_s": ABOVE[:, None]}, {"peft_type": "BOFT"}, "is incomplete: it has boft_s"),
    ({"x": ABOVE}, {"peft_type": "VERA", "r": 4}, "kind 'VERA', which is not known here, only LORA"),
    ({"x": ABOVE}, {"peft_type": "IA3"}, "PEFT's kind 'IA3'"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "said"), ODD_PEFT)
def test_pefts_adapters_that_mean_nothing_here_are_named(tmp_path, tensors, config, said):
    folder = peft_folder(tmp_path / "peft", tensors, **config)
    for source in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(ConfigError, match=said) as caught:
            read_lora_file(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "above", "fits"), [(1, 6, True), (1, 10, False), (16, 6, True), (8, 6, False)]
)
def test_a_block_that_turns_all_columns_must_divide_them(tmp_path, count, above, fits):
    config = {"peft_type": "OFT", "block_share": count == 1, "oft_block_size": 4}
    values = np.zeros([count, above], "float32")
    folder = peft_folder(tmp_path / "oft", {"oft_R.weight": values}, **config)
    shapes = {"transformer": {f"{Q}.weight": [64, 64]}}
    if fits:
        assert read_fitting(folder, shapes).what == "OFT of PEFT on 1 layer"
        return
    with pytest.raises(ConfigError, match="is for weight .* the model has"):
        read_fitting(folder, shapes)
