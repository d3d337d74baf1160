"""Triton on a card: its driver, what happens when nothing can be built, what an op call costs. Without a
card, in processes where CUDA is pretended (pretended_card.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a CPU wheel is what can pretend")
INSTALL_GCC = "install gcc (apt install gcc)"
COST = 100  # microseconds of an op call beyond its launcher's


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """{name of a scenario in pretended_card.py: what it found}"""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = tmp_path_factory.mktemp("card")
    path = os.pathsep.join([str(HERE.parents[1]), *(entry for entry in sys.path if entry)])
    left_out = ("PPCOAT_BACKEND", "CC", "TRITON_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, str(HERE / "pretended_card.py"), str(folder)],
        capture_output=True, text=True, timeout=300,
        env={**env, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kernel_starts_whatever_was_imported_first(scenarios, when):
    """`import ppcoat` imports Triton, by way of paddlenlp. torch stands by and is asked for nothing."""
    found = scenarios[f"starts_{when}_the_package"]
    assert found["launches"] == 1 and found["words"] == [], found
    assert found["driver"] == "ppcoat.fp8.driver_triton" and found["active"]
    assert found["place"] == "place 0" and found["benchmarked"] == 1.0
    assert found["finders"], "sys.meta_path has changed"
    assert found["stream"] == 1000
    assert scenarios["goes_on"]["launches"] == 1, scenarios["goes_on"]


def test_an_op_call_costs_little_on_the_host(scenarios):
    assert scenarios["costs"]["launches"] == 1
    assert scenarios["costs"]["beyond"] < COST
    assert scenarios["costs"]["finders"] == 0, "sys.meta_path has grown"


def test_the_current_card_is_asked_for_its_stream_and_capability(scenarios):
    found = scenarios["other_card"]
    assert (found["first"], found["second"]) == ([1000, 90], [1001, 80]) and found["words"] == []


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("without_compiler", f"there is no C compiler: {INSTALL_GCC}"),
        ("with_wrong_compiler", f"which is not there: {INSTALL_GCC}"),
        ("without_headers", "install Python's headers (apt install python3-dev)"),
    ],
)
def test_where_nothing_can_be_built_the_reference_runs_and_the_reason_is_said_once(
    scenarios, scenario, reason
):
    found = scenarios[scenario]
    assert found["launches"] == 0 and found["right"], found
    assert found["reason"].endswith(reason)
    assert [word for word in found["words"] if "triton" in word] == [
        f"no op runs in triton: {found['reason']}"
    ]


def test_a_kernel_that_cannot_be_built_later_falls_back_too(scenarios):
    found = scenarios["compiler_goes"]
    assert found["first"]["launches"] == 1
    for call in (found["second"], found["third"]):
        assert call["launches"] == 0 and call["right"], call
        (word,) = (word for word in call["words"] if "in triton" in word)
        assert word.startswith("quantize does not run in triton") and word.endswith(INSTALL_GCC)


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("ptxas_fails", "PTXASError: PTXAS error: `ptxas` failed with error code 1"),
        ("cache_is_full", "No such file or directory: '/proc/nowhere'"),
    ],
)
def test_whatever_fails_in_building_is_a_reason_in_one_line(scenarios, scenario, reason):
    found = scenarios[scenario]
    assert found["right"], found
    (word,) = (word for word in found["words"] if "in triton" in word)
    assert reason in word and "\n" not in word


def test_what_is_no_matter_of_building_is_raised(scenarios):
    """A launch that fails leaves a card on which nothing works; Ctrl-C is the user's."""
    assert scenarios["launch_fails"] == {
        "raised": "RuntimeError: Triton Error [CUDA]: an illegal address", "words": []
    }  # fmt: skip
    assert scenarios["interrupted"] == {"raised": "KeyboardInterrupt: ", "words": []}


def test_benchmark_kernels_reaches_its_first_launch(scenarios):
    found = scenarios["benchmark"]
    assert found["launches"] == 1 and "Triton Error [CUDA]" in found["raised"], found


def test_fp8_products_are_for_cards_that_multiply_fp8(scenarios):
    assert scenarios["fp8_products"] == {"given": [True, False]}  # sm_90, sm_80
