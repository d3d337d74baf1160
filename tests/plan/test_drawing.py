"""The plan of drawing against Paddle's allocator, and what it chooses for a card."""

import gc
from pathlib import Path

import paddle
import pytest

import ppcoat
from ppcoat.cli.plan import DrawingFlags, drawing_plan
from ppcoat.errors import ConfigError
from ppcoat.models import vae_tiling
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.models.offload import Placement
from ppcoat.models.pictures import unpack_latents
from ppcoat.plan.drawing import Drawn, NewbieDrawingMemory, drawing_memory, plan_drawing

TINY = Path(ppcoat.__path__[0]) / "assets" / "tiny_flux"
core = paddle.base.core


@pytest.fixture(scope="module")
def dev():
    """FLUX.1-dev at 1024 px on a card, by its shapes."""
    return drawing_memory(Drawn("no/such/FLUX.1-dev", 1024, 1024), on_gpu=True)


def allocated():
    gc.collect()
    return core.host_memory_stat_current_value("Allocated", 0)


def peak_of(work):
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    result = work()
    return core.host_memory_stat_peak_value("Allocated", 0), result


@pytest.mark.parametrize(
    "placement", [pytest.param(Placement(), marks=pytest.mark.slow), Placement("int8", vae_tiling=True)]
)
@paddle.no_grad()
def test_phases_of_the_built_in_flux_are_those_of_the_allocator(placement, monkeypatch):
    """Without what stands beside the tensors. 192 x 256: twelve tiles."""
    monkeypatch.setattr(vae_tiling, "ROUNDS", 0)  # of which the memory is the same
    before = allocated()
    pipeline = FluxPipeline.from_pretrained(TINY, "float32", quantize=placement.quantize or None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling(placement.vae_tiling)
    size = {"height": 192, "width": 256, "num_inference_steps": 1, "output_type": "latent"}
    encoded, (embeds, pooled, _) = peak_of(lambda: pipeline.encode_prompt("a red dress"))
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    denoised, latents = peak_of(lambda: pipeline(**given, **size).images)
    decoded, _ = peak_of(lambda: pipeline.pictures(unpack_latents(latents, 24, 32), "np"))
    phases = drawing_memory(Drawn(str(TINY), 192, 256), on_gpu=False).drawing_phases(placement)
    for phase, peak in zip(phases, (encoded, denoised, decoded), strict=True):
        assert phase.total - phase.parts["context"] == pytest.approx(peak - before, rel=0.10), phase.name


@paddle.no_grad()
def test_a_step_of_newbie_is_that_of_the_allocator():
    settings = {"dim": 384, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64,
                "cap_feat_dim": 96, "clip_text_dim": 64, "axes_dims": (48, 24, 24)}  # fmt: skip
    before = allocated()
    model = NextDiT_CLIP(**settings).eval()
    x, words = paddle.randn([2, 16, 24, 32]), paddle.randn([2, 64, 96])
    mask, pooled = paddle.ones([2, 64], dtype="int64"), paddle.randn([2, 64])
    peak, _ = peak_of(lambda: model(x, paddle.full([2], 0.5), words, mask, pooled))
    drawn = Drawn("no/such/newbie", 192, 256, family="newbie", max_sequence_length=64)
    memory = NewbieDrawingMemory(drawn, on_gpu=False, transformer=settings)
    (_, phase, _) = memory.drawing_phases(Placement())
    assert phase.parts["base"] + phase.parts["working"] == pytest.approx(peak - before, rel=0.10)


def test_what_is_chosen_for_flux_dev(dev):
    """The table of docs/small_cards.md."""
    found = {}
    for vram in (8, 12, 16, 24, 48):
        planned = plan_drawing(dev, vram)
        assert planned.peak.total <= vram * 1e9
        found[vram] = planned.placement
    assert found == {
        8: Placement("fp4", offload=True, stream_encoders=True, blocks_to_swap=4),
        12: Placement("fp4", offload=True),
        16: Placement("int8", offload=True),
        24: Placement("int8", offload=True),
        48: Placement(),
    }
    assert plan_drawing(dev, 8).sent == pytest.approx(4 * 15 * 3072**2 * 4.5 / 8, rel=0.01)


def test_what_is_asked_for_is_done(dev):
    offloaded = plan_drawing(dev, 48, Placement(offload=True))
    assert offloaded.placement == Placement(offload=True)
    assert plan_drawing(dev, 16, Placement("fp8"), ("fp8",)).placement.quantize == "fp8"
    assert plan_drawing(dev, placement=Placement("nf4")).placement == Placement("nf4")


def test_large_pictures_are_decoded_in_tiles_and_several_one_by_one():
    memory = drawing_memory(Drawn("no/such/FLUX.1-dev", 2048, 2048, pictures=2), on_gpu=True)
    planned = plan_drawing(memory, 12)
    assert planned.placement.vae_tiling and planned.placement.vae_slicing
    whole, tiled = (memory.drawing_phases(Placement(vae_tiling=tiling))[2] for tiling in (False, True))
    assert tiled.parts["working"] < 0.1 * whole.parts["working"]


def test_newbie_fits_too():
    memory = drawing_memory(Drawn("no/such/newbie", 1024, 1024, family="newbie"), on_gpu=True)
    assert plan_drawing(memory, 12).placement == Placement(offload=True)
    assert plan_drawing(memory, 8).placement == Placement("int8", offload=True, stream_encoders=True)


def test_a_budget_that_nothing_fits_names_the_least_need(dev):
    with pytest.raises(ConfigError, match=r"nothing fits into 2 GB: the least possible need is 2\.\d GB, in"):
        plan_drawing(dev, 2)
    with pytest.raises(ConfigError, match="vram: came -1"):
        plan_drawing(dev, -1)


def test_the_table_that_a_user_sees():
    text = drawing_plan(DrawingFlags(model="no/such/FLUX.1-dev"), 8)
    lines = text.splitlines()
    assert lines[3].startswith("FP4 base; text encoders first, then off the card, their blocks one by one;")
    assert lines[4].split()[-3:] == ["encode", "denoise", "decode"]
    assert "PCIe: 0.32 GB a step" in lines and lines[-1] == "generate --vram 8 chooses this"
    assert "PCIe" not in drawing_plan(DrawingFlags(model=str(TINY), height=64, width=64))
    with pytest.raises(ConfigError, match="height: came 1000, wanted a multiple of 16"):
        drawing_plan(DrawingFlags(height=1000))
    with pytest.raises(ConfigError, match="num_images: came 0"):
        drawing_plan(DrawingFlags(num_images=0))
