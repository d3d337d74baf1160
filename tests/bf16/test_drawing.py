"""Drawing in half precision: what rounding explains, FP8 bases, the scripts, and what is traced for CINN."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from pretended_gpu import PretendedGpu, bfloat16_noise

from ppcoat.infer import lightning
from ppcoat.infer.generate import Drawing, generate
from ppcoat.infer.lightning import LightningDrawing, draw_lightning
from ppcoat.lora import inject_lora, save_lora
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_transformer
from ppcoat.models.newbie.files import load_quantized_nextdit
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.models.quantized_base import load_quantized_transformer

pytestmark = pytest.mark.usefixtures("encoders_read_once")

ROOT = Path(__file__).parents[2]
FLUX, NEWBIE = ROOT / "ppcoat" / "assets" / "tiny_flux", ROOT / "tests" / "fixtures" / "tiny_newbie"
CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 5, "max_sequence_length": 16}
BLOCKS = ("norm_kernel", "rms_norm_rotated_kernel", "gated_residual_kernel", "activation_kernel")
# float16 has three bits more than bfloat16, so it is explained by an eighth.
SHARES = {"bfloat16": 1, "float16": 1 / 8}


def flux(dtype, **parts):
    return FluxPipeline.from_pretrained(FLUX, dtype, **parts)


def fp8_flux(dtype):
    return flux(dtype, transformer=load_quantized_transformer(FLUX / "transformer", dtype))


def newbie(dtype, **parts):
    return NewbiePipeline.from_pretrained(NEWBIE, dtype, **parts)


def fp8_newbie(dtype):
    return newbie(dtype, transformer=load_quantized_nextdit(NEWBIE / "transformer", dtype))


@pytest.fixture(scope="module")
def text():
    """What both pipelines are given for a prompt, as the float32 encoders have it."""
    embeds, pooled, _ = flux(None, without=("transformer",)).encode_prompt(
        "a red dress", max_sequence_length=16
    )
    conditions = newbie(None, without=("transformer",)).encode_prompt(["a red dress", ""])
    return {
        "flux": {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
        "newbie": {"conditions": conditions},
    }


def latents_of(load, given, dtype, context):
    """float32 latents that the transformer draws from these encodings, as numpy."""
    with context:
        pipeline = load(dtype)
        pipeline.set_progress_bar_config(disable=True)
        wanted = pipeline.transformer.dtype if dtype is None else dtype
        given = {name: in_dtype(value, wanted) for name, value in given.items()}
        drawn = pipeline(**given, **CALL, output_type="latent").images
        return drawn.astype("float32").numpy()


def in_dtype(value, dtype):
    if isinstance(value, dict):
        return {name: in_dtype(each, dtype) for name, each in value.items()}
    return value.astype(dtype) if value.is_floating_point() else value


def change(found, wanted):
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize(
    ("load", "dtypes"),
    [
        (flux, ("bfloat16", "float16")),
        (fp8_flux, ("bfloat16",)),
        (newbie, ("bfloat16", "float16")),
        pytest.param(fp8_newbie, ("bfloat16",), marks=pytest.mark.slow),
        pytest.param(fp8_flux, ("float16",), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_latents_differ_from_float32s_as_rounding_explains(load, dtypes, text, assert_as_on_a_gpu):
    given = text[load.__name__.rpartition("_")[-1]]
    wanted = latents_of(load, given, None, nullcontext())
    explained = change(latents_of(load, given, None, bfloat16_noise(1)), wanted)
    for dtype, share in ((each, SHARES[each]) for each in dtypes):
        with PretendedGpu() as gpu:
            found = latents_of(load, given, dtype, nullcontext())
        assert_as_on_a_gpu(gpu, *BLOCKS)
        print(f"{load.__name__} {dtype}: {change(found, wanted):.4f}, noise {explained * share:.4f}")
        assert 0.1 < change(found, wanted) / (explained * share) < 2


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The file of a LoRA that changes the picture."""
    model, rng = load_transformer(FLUX / "transformer", "float32"), np.random.default_rng(0)
    for layer in inject_lora(model, 2, 4.0).values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32") * 0.05)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(file, model)
    return str(file)


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.slow
def test_the_scripts_draw_the_float32_picture_nearly(lora, tmp_path, assert_as_on_a_gpu):
    """With a LoRA: both passes of classifier-free guidance, and the four steps of Lightning."""
    settings = {"model": str(FLUX), "prompt": ["a red dress"], "path_to_lora": lora, "seed": 5, "height": 64,
                "width": 64, "max_sequence_length": 16, "device": "cpu"}  # fmt: skip
    guided = Drawing(
        **settings, steps=1, true_cfg_scale=2.0, negative_prompt="blue", output_dir=str(tmp_path)
    )
    quick = LightningDrawing(**settings, output_dir=str(tmp_path))
    for draw in (lambda: pixels(generate(guided)[0]), lambda: pixels(draw_lightning(quick))):
        wanted = draw()
        with PretendedGpu() as gpu:
            found = draw()
        assert_as_on_a_gpu(gpu, *BLOCKS)
        assert 0 < np.abs(found - wanted).mean() < 0.02 * 255


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_asked_for_dtype_is_that_of_every_part(dtype):
    with PretendedGpu():
        pipeline, anime = flux(dtype), newbie(dtype)
    wanted = getattr(paddle, dtype or "bfloat16")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert dtypes_of(getattr(pipeline, part)) == {wanted}
    assert dtypes_of(anime.transformer) == dtypes_of(anime.clip_model) == {wanted}
    assert dtypes_of(anime.text_encoder) == {paddle.bfloat16}  # Gemma leaves float16's range
    assert dtypes_of(anime.vae) == {paddle.float32}


def dtypes_of(layer):
    return {parameter.dtype for parameter in layer.parameters()}


def test_the_graphs_of_cinn_are_traced_in_bfloat16(monkeypatch, assert_as_on_a_gpu):
    """A CPU cannot run them; eager blocks draw in their place."""
    programs = []

    def trace(graph, *tensors):
        program, _ = graph._call.get_concrete_program(*tensors)
        programs.append(program)
        return eager[graph.name](*tensors)

    with PretendedGpu() as gpu:
        pipeline = flux(None)
        model = pipeline.transformer
        eager = {
            name: getattr(model, name) for name in ("jit_transformer_blocks", "jit_single_transformer_blocks")
        }
        lightning.compile_transformer(model)
        monkeypatch.setattr(lightning.StaticGraph, "__call__", trace)
        pipeline.set_progress_bar_config(disable=True)
        pipeline("a red dress", **{**CALL, "num_inference_steps": 1}, output_type="latent")
    assert_as_on_a_gpu(gpu)
    assert [[str(x.dtype) for x in each.outputs] for each in programs] == [
        ["paddle.bfloat16"] * 2, ["paddle.bfloat16"]
    ]  # fmt: skip
    for program in programs:
        assert [op.name() for op in program.main_program.global_block().ops if mixes(op)] == []


def mixes(op):
    """Whether a traced operator reads bfloat16 and float32 tensors; the factor of `scale` is a number."""
    tensors = [x for x in op.operands_source() if x.initialized() and x.is_dense_tensor_type()]
    dtypes = {str(x.dtype) for x in (tensors[:1] if op.name() == "pd_op.scale" else tensors)}
    return len(dtypes & {"paddle.bfloat16", "paddle.float32"}) > 1
