"""The tiny random FLUX folders and the outputs that diffusers computed from them."""

import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from paddle import nn

from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.nn.base_weight import FP8Weight

FIXTURES = Path(__file__).parent.parent / "fixtures"
sys.path.append(str(FIXTURES.parent / "storm"))  # model_mutations


@pytest.fixture(scope="session")
def fp32_folder() -> Path:
    return FIXTURES / "tiny_flux_fp32"


@pytest.fixture(scope="session")
def torch_refs(fp32_folder) -> dict[str, np.ndarray]:
    with np.load(fp32_folder / "torch_refs.npz") as refs:
        return dict(refs)


@pytest.fixture(scope="session")
def pipeline(fp32_folder) -> FluxPipeline:
    """Shared: a test that changes it puts it back."""
    pipeline = FluxPipeline.from_pretrained(fp32_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def rounded() -> Callable[[np.ndarray], np.ndarray]:
    """rounded(weight) : float [in, out] -> E4M3 in blocks of 128 x 128 with power-of-two scales, by
    ml_dtypes."""

    def rounded(weight: np.ndarray) -> np.ndarray:
        values = np.empty_like(weight)
        for i in range(0, weight.shape[0], 128):
            for j in range(0, weight.shape[1], 128):
                part = weight[i : i + 128, j : j + 128]
                scale = np.float32(2.0 ** np.ceil(np.log2(np.abs(part).max().astype("float64") / 448)))
                codes = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype("float32")
                values[i : i + 128, j : j + 128] = codes * scale
        return values

    return rounded


@pytest.fixture(scope="session")
def assert_same() -> Callable[[nn.Layer, nn.Layer], None]:
    """assert_same(got, wanted): two models have the same state, name for name and bit for bit."""

    def assert_same(got: nn.Layer, wanted: nn.Layer) -> None:
        got, wanted = got.state_dict(), wanted.state_dict()
        assert list(got) == list(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(got[name].numpy(), value.numpy(), err_msg=name)

    return assert_same


@pytest.fixture(scope="session")
def assert_rounded_once(rounded) -> Callable[[nn.Layer, nn.Layer], dict[str, FP8Weight]]:
    """assert_rounded_once(model, exact) -> the FP8 weights of `model` by path: each is that of `exact`
    rounded, all other parameters are as they were."""

    def assert_rounded_once(model: nn.Layer, exact: nn.Layer) -> dict[str, FP8Weight]:
        assert not model.training and model.source_config == exact.source_config
        fp8 = {path: layer for path, layer in model.named_sublayers() if isinstance(layer, FP8Weight)}
        left = dict(model.named_parameters())
        for name, parameter in exact.named_parameters():
            if name in fp8:
                got, wanted = fp8[name].dequantized("float32"), rounded(parameter.numpy())
            else:
                got, wanted = left[name], parameter.numpy()
            np.testing.assert_array_equal(got.numpy(), wanted, err_msg=name)
        return fp8

    return assert_rounded_once
