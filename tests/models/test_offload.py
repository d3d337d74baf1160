"""Drawing with parts of a pipeline that come and go, on a host where every number is another one: whoever
computes with what lies there draws another picture."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.models.quantized_base import load_quantized_transformer
from ppcoat.nn.base_weight import BASES
from ppcoat.nn.swap import take_data

FIXTURES = Path(__file__).parent.parent / "fixtures"
BOTH = pytest.mark.parametrize("drawn", ["flux", "newbie"], indirect=True)
ORDER = {
    "flux": ["text_encoder", "text_encoder_2", "transformer", "vae"],
    "newbie": ["text_encoder", "clip_model", "transformer", "vae"],
}


class Scrambled:
    """A Carrier for whose host tensors lie hidden. on_device: ids of those that do not."""

    def __init__(self, pipeline):
        self.known = ids(pipeline, *ORDER[kind_of(pipeline)])
        self.on_device = set(self.known)

    def to_device(self, x):
        if id(x) in self.known - self.on_device:
            self.on_device.add(id(x))
            take_data(x, _hidden(x))

    def to_host(self, x):
        if id(x) in self.on_device:
            self.on_device.remove(id(x))
            take_data(x, _hidden(x))


def kind_of(pipeline):
    return "flux" if isinstance(pipeline, FluxPipeline) else "newbie"


def ids(pipeline, *parts):
    """Of all tensors of these parts that are not swapped."""
    swapped = {id(x) for each in pipeline.__dict__.get("_swappers", {}).values() for x in each.tensors}
    models = [getattr(pipeline, part) for part in parts]
    return {id(x) for model in models for x in (*model.parameters(), *model.buffers())} - swapped


def _hidden(x):
    """What lies on the host; of that, x again."""
    return 255 - x if x.dtype == paddle.uint8 else -x


class Travelling:
    """A Transport of blocks that lie hidden on the host. most: so many of a model's were there at once."""

    def __init__(self):
        self.most, self.swapper = 0, None

    def to_host(self, x):
        return _hidden(x)

    def start(self, hosts):
        self.most = max(self.most, 1 + len(self.swapper.resident))
        return [_hidden(host) for host in hosts], None

    def wait(self, ticket):
        return None


def loaded(kind, **options):
    if kind == "flux":
        pipeline = FluxPipeline.from_pretrained(FIXTURES / "tiny_flux_fp32", **options)
    else:
        pipeline = NewbiePipeline.from_pretrained(FIXTURES / "tiny_newbie", "float32", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    options = {"num_inference_steps": 2, "height": 32, "width": 48, "seed": 1, "output_type": "np"} | options
    return pipeline("a cat", max_sequence_length=16, **options).images


@pytest.fixture(scope="module")
def loaded_once():
    """kind -> (a pipeline, the picture that it draws)."""
    pipelines = {kind: loaded(kind) for kind in ORDER}
    return {kind: (pipeline, draw(pipeline)) for kind, pipeline in pipelines.items()}


@pytest.fixture
def drawn(request, loaded_once):
    """(kind, a pipeline, the picture that it draws); afterwards it is as it was."""
    pipeline, picture = loaded_once[request.param]
    yield request.param, pipeline, picture
    if "_offload" in pipeline.__dict__ and isinstance(pipeline.__dict__["_offload"]._carrier, Scrambled):
        for model in pipeline.components.values():
            for x in (*model.parameters(), *model.buffers()) if isinstance(model, nn.Layer) else ():
                pipeline.__dict__["_offload"]._carrier.to_device(x)
    pipeline.to("cpu")


def watched(pipeline):
    """Names of the parts in the order in which they come to the device."""
    came, offload = [], pipeline.__dict__["_offload"]
    enter = offload.enter

    def entering(name):
        if name != offload.current:
            came.append(name)
        enter(name)

    offload.enter = entering
    return came


@BOTH
def test_each_part_is_there_while_it_computes_and_only_then(drawn):
    kind, pipeline, picture = drawn
    carrier = Scrambled(pipeline)
    pipeline.enable_model_cpu_offload(carrier=carrier)
    assert not carrier.on_device
    came = watched(pipeline)
    np.testing.assert_array_equal(draw(pipeline), picture)
    assert came == ORDER[kind] and carrier.on_device == ids(pipeline, "vae")
    np.testing.assert_array_equal(draw(pipeline), picture)
    pipeline.maybe_free_model_hooks()
    assert not carrier.on_device


@BOTH
def test_blocks_that_visit_one_by_one_give_the_same_picture(drawn):
    """With offloading beside them, twice."""
    kind, pipeline, picture = drawn
    blocks, transports = len(pipeline.transformer.named_blocks()), [Travelling(), Travelling()]
    for part, transport in zip(("transformer", ORDER[kind][1]), transports, strict=True):
        pipeline.enable_block_swap(blocks - 1 if part == "transformer" else None, part, transport)
        transport.swapper = pipeline.__dict__["_swappers"][part]
    pipeline.enable_model_cpu_offload(carrier=Scrambled(pipeline))
    for _ in range(2):
        np.testing.assert_array_equal(draw(pipeline), picture)
        assert [transport.swapper.resident for transport in transports] == [[], []]  # the VAE came last
    assert transports[0].most == min(2, blocks - 1) and transports[1].most >= 1
    with pytest.raises(ConfigError, match=f"blocks_to_swap: came {blocks + 1}, but this model has {blocks}"):
        pipeline.enable_block_swap(blocks + 1)
    for transport in transports:
        transport.swapper.remove()


@BOTH
def test_sequential_offload_draws_the_same_and_to_ends_it(drawn):
    _, pipeline, picture = drawn
    pipeline.enable_sequential_cpu_offload()
    np.testing.assert_array_equal(draw(pipeline), picture)
    assert len(pipeline.__dict__["_swappers"]) >= 3
    pipeline.to("cpu")
    assert not {"_swappers", "_offload"} & pipeline.__dict__.keys()
    np.testing.assert_array_equal(draw(pipeline), picture)


@pytest.mark.parametrize("drawn", ["flux"], indirect=True)
def test_tiles_and_pictures_that_are_encoded_go_through_the_vae_on_the_device(drawn):
    _, pipeline, _ = drawn
    pixels = paddle.rand([1, 3, 32, 128])
    pipeline.enable_vae_tiling()
    wanted = draw(pipeline, width=128), pipeline.encode_image(pixels).numpy()
    pipeline.enable_model_cpu_offload(carrier=(carrier := Scrambled(pipeline)))
    np.testing.assert_array_equal(pipeline.encode_image(pixels).numpy(), wanted[1])
    assert carrier.on_device == ids(pipeline, "vae")
    np.testing.assert_array_equal(draw(pipeline, width=128), wanted[0])
    pipeline.disable_vae_tiling()
    assert np.abs(draw(pipeline, width=128) - wanted[0]).max() > 0  # whole again


def test_a_quantised_pipeline_is_loaded_in_one_call():
    """With offload from the start; as with a transformer that was loaded before."""
    pipeline = loaded("flux", quantize="fp4", offload=True)
    assert pipeline.__dict__["_offload"].current is None
    folder = FIXTURES / "tiny_flux_fp32" / "transformer"
    transformer = load_quantized_transformer(folder, "float32", base="fp4")
    got, pipeline.transformer = draw(pipeline), transformer
    np.testing.assert_array_equal(got, draw(pipeline))
    newbie = loaded("newbie", quantize="int8", offload=True)
    assert any(isinstance(layer, BASES["int8"]) for layer in newbie.transformer.sublayers())
    assert np.isfinite(draw(newbie)).all()
    for kind in ORDER:
        with pytest.raises(ConfigError, match="unknown format of base weights 'fp3'; use one of fp8"):
            loaded(kind, quantize="fp3")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu_id": 0}, "device: came gpu:0, but Paddle sees 0 GPUs"),
        ({"device": "cuda:1"}, "device: came gpu:1, but Paddle sees 0 GPUs"),
        ({"device": "cuda", "gpu_id": 2}, "device: came gpu:2"),
        ({"device": "cuda:1", "gpu_id": 2}, "came gpu_id 2 and device cuda:1; give one"),
    ],
)
def test_a_device_that_is_not_there(pipeline, given, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.enable_model_cpu_offload(**given)
