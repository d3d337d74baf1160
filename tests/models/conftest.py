"""The tiny random FLUX folders and the outputs that diffusers computed from them."""

from pathlib import Path

import numpy as np
import pytest

from ppcoat.models.flux_pipeline import FluxPipeline

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fp32_folder() -> Path:
    return FIXTURES / "tiny_flux_fp32"


@pytest.fixture(scope="session")
def bf16_folder() -> Path:
    return FIXTURES / "tiny_flux_bf16_sharded"


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
