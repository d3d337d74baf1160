"""What a step asks of the host on a card: Paddle calls, launches, casts, reads, copies to the device.

Counted without one, see host_work.py, for one double and two single blocks with a LoRA on each of their 22
Linears; the bounds are what was reached, rounded up. `pytest -s` prints the table. That a whole step of the
trainer reads from the device once is in tests/train/test_trainer.py.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINEARS = 22
BOUNDS = {  # case -> Paddle calls, those of them in the blocks' forward, launches of our kernels
    "none": (750, 325, 3),
    "coat": (505, 135, 78),
    "coat dropout": (505, 135, 138),
    "coat+recompute": (530, 145, 70),
    "coat+recompute dropout checkpoints": (635, 265, 164),
    "coat+recompute+attention fp8": (530, 145, 139),
    "coat+recompute products": (570, 165, 169),  # W^T into scratch is one a Linear
    "coat+recompute dora": (1320, 605, 114),  # 2 launches more a Linear, for what the lengths multiply
    "coat+recompute lokr": (795, 230, 70),
}
COLUMNS = ("calls", "calls in blocks, forward", "launches", "call cast", "syncs", "copies")


@pytest.fixture(scope="module")
def counts(in_fork):
    """Case -> how often each thing happened in a step."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def count():
        """In a fork, which has all libraries, and imports ppcoat anew: no kernel is defined for the
        interpreter."""
        os.environ["TRITON_INTERPRET"] = "0"
        for name in [name for name in sys.modules if name.partition(".")[0] == "ppcoat"]:
            del sys.modules[name]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(HERE / "host_work.py"))["main"](list(BOUNDS))
        return json.loads(printed.getvalue().splitlines()[-1])

    found = in_fork(count)
    print(f"\n{'':36}" + "".join(f"{column:>26}" for column in COLUMNS))
    for case, found_there in found.items():
        print(f"{case:36}" + "".join(f"{found_there.get(column, 0):26}" for column in COLUMNS))
    return found


@pytest.mark.parametrize("case", BOUNDS)
def test_calls_and_launches_stay_below_what_was_reached(case, counts):
    found = counts[case]
    reached = tuple(found.get(column, 0) for column in COLUMNS[:3])
    assert all(got <= most for got, most in zip(reached, BOUNDS[case], strict=True)), reached
    assert found["calls"] > 20 * LINEARS and found["launches"]  # it is counted at all


@pytest.mark.parametrize("case", BOUNDS)
def test_nobody_waits_for_the_device_and_nothing_is_copied_to_it(case, counts):
    assert counts[case].get("syncs", 0) == counts[case].get("copies", 0) == 0


@pytest.mark.parametrize("case", [case for case in BOUNDS if case != "none" and "lokr" not in case])
def test_factors_are_cast_together(case, counts):
    """The gradients of a LoRA are cast to float32, and a dozen small things outside of the blocks. A DoRA has
    one gradient more, and casts a product and g - 1, forward and backward."""
    assert counts[case]["call cast"] <= (6 if "dora" in case else 2) * LINEARS + 12


def test_dropout_is_one_launch_forward_and_two_backward(counts):
    """Of x, again of x for the gradient of A, and of what goes back through A."""
    more = counts["coat dropout"]["launches"] - counts["coat"]["launches"]
    assert more == counts["coat dropout"]["launch dropout_kernel"] <= 3 * LINEARS
    assert counts["coat dropout"]["calls"] == counts["coat"]["calls"]


def test_residuals_and_fp8_weights_are_one_kernel_each_way(counts):
    found, plain = counts["coat+recompute+attention fp8"], counts["coat+recompute"]
    # queries and keys of three attentions; their values become FP8 and come back
    assert (
        found["launch quantize_with_residual_kernel"] == found["launch dequantize_with_residual_kernel"] == 6
    )
    assert found["launch quantize_kernel"] - plain["launch quantize_kernel"] == 3
    assert found["launch dequantize_kernel"] - plain["launch dequantize_kernel"] == 3
    # forward of every Linear of the model, and for dx of those that a gradient goes through
    weights = found["launch dequantize_blocks_kernel"]
    assert found["launches"] - plain["launches"] == 12 + 6 + weights and 34 < weights <= 2 * 34
    assert found["calls"] == plain["calls"]


def test_inputs_of_fp8_products_are_quantised_once(counts):
    """12 inputs of Linears and 22 gradients of their outputs; the rest are those that are saved."""
    found, plain = counts["coat+recompute products"], counts["coat+recompute"]
    products = found["launch quantize_kernel"] - plain["launch quantize_kernel"]
    assert products <= 12 + LINEARS


def test_checkpoints_are_one_kernel_each_way(counts):
    """Tokens of both streams of the double block, of each single one, and what norms outside of them save."""
    found = counts["coat+recompute dropout checkpoints"]
    assert found["launch quantize_kernel"] == 5 and found["launch dequantize_kernel"] == 4
