"""The plan counts what training counts and a process holds, and finds the fastest settings that fit."""

import gc
import inspect
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from ppcoat.bench import bench_worker
from ppcoat.bench.bench_worker import BenchmarkCase, MeasuredTraining, coat_of
from ppcoat.bench.flags import HEAD_DIM
from ppcoat.coat import COATTrainer
from ppcoat.config.schema import NetworkConfig, RunConfig
from ppcoat.data.cache import build_cache, pictures_at_once
from ppcoat.errors import ConfigError
from ppcoat.lora.layer import linear_paths
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import load_transformer
from ppcoat.models.quantized_base import load_quantized_transformer
from ppcoat.nn.attention import EFFICIENT, FLASH, MATH
from ppcoat.nn.base_weight import BASES
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.swap import BACKWARD, FORWARD, swap_blocks
from ppcoat.plan import phases, saved_bytes
from ppcoat.plan import settings as settings_module
from ppcoat.plan.phases import ADAPTERS, ENCODED_AT_ONCE, MemoryModel, Settings
from ppcoat.plan.saved_bytes import small_lora_paths
from ppcoat.plan.settings import (
    NO_FASTER,
    Plan,
    allowed_bases,
    as_given,
    best_that_fits,
    check_fits,
    line_of_plan,
    plan,
    with_earlier_plan,
    with_memory_plan,
    with_settings,
)

MB = 1e6
SMALL = BenchmarkCase(
    hidden_size=128, num_layers=4, batch_size=2, tokens=80, text_tokens=48, rank=4, device="cpu"
)
# Hidden size, layers, batch, image tokens, text tokens.
SMALLER, SIZES = (320, 4, 2, 80, 48), ((256, 3, 2, 256, 64), (384, 5, 1, 200, 100))
LARGE_PICTURE = (256, 3, 1, 2048, 64)
POLICIES = ("none", "coat", "coat+recompute")
ATTENTION = "coat+recompute+attention"
# Bytes by which the second step grows a process; without tune_host, which would keep what is freed.
CHILD = """
import json, sys
from pathlib import Path
from ppcoat.bench.bench_worker import BenchmarkCase, MeasuredTraining
from ppcoat.device import HostMeter
training = MeasuredTraining(BenchmarkCase(**json.loads(sys.argv[1])))
training.step()
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = HostMeter().memory()
training.step()
print(HostMeter().peak_memory() - before)
"""


def dev_config(**sections) -> RunConfig:
    """FLUX.1-dev's shapes on a GPU: neither the model's nor the pictures' folder exists."""
    return RunConfig.model_validate(
        {
            "name": "x",
            "device": "gpu",
            "model": {"name_or_path": "no/such/FLUX.1-dev", **sections.pop("model", {})},
            "datasets": [{"folder_path": "no/such/pictures", "resolution": 768, "bucket_rule": "square"}],
            "coat": {"enabled": True, **sections.pop("coat", {})},
            **sections,
        }
    )


def under(policy: str) -> Settings:
    """One picture under a saving policy."""
    return Settings(policy, 0, False, 0, 1, 1)


class PlannedCase(MemoryModel):
    """A MemoryModel of a BenchmarkCase, which has no folder and no RunConfig."""

    def __init__(self, case: BenchmarkCase, kind: str = "lora") -> None:
        double, single = case.blocks
        heads = case.hidden_size // HEAD_DIM
        sizes = {"attention_head_dim": HEAD_DIM, "num_attention_heads": heads,
                 "axes_dims_rope": (8, 28, 28),
                 "num_layers": double, "num_single_layers": single}  # fmt: skip
        config = dev_config(device="cpu", network={"linear": case.rank, "type": kind})
        super().__init__(with_coat(config, case), on_gpu=False, transformer=sizes)
        self.image_tokens, self.text_tokens = case.tokens, case.text_tokens
        self.tokens = case.tokens + case.text_tokens
        self.settings = Settings(case.policy, 0, False, 0, case.batch_size, 1)


def with_coat(config: RunConfig, case: BenchmarkCase) -> RunConfig:
    return config.model_copy(update={"coat": coat_of(case).config})


def counted(case: BenchmarkCase, checkpoint_blocks: int = 0) -> tuple[int, int]:
    """What a step of training counts: bytes kept, and as on a GPU."""
    training = MeasuredTraining(case)
    if checkpoint_blocks:
        memory = training.coat.config.memory.model_copy(update={"checkpoint_blocks": checkpoint_blocks})
        training.coat = COATTrainer(training.coat.config.model_copy(update={"memory": memory}), True)
        training.coat.convert(training.model)
    training.step()
    return training.bytes["bytes_kept"], training.bytes["bytes_kept_bf16"]


@pytest.mark.parametrize(
    ("size", "policy"), [*((SMALLER, policy) for policy in (*POLICIES, ATTENTION)), (SIZES[1], ATTENTION)]
)
def test_kept_bytes_are_those_that_training_counts(size, policy):
    """Beyond the sizes of the small copies in tokens, text and heads: the counts are lines in all three. The
    other policies of SIZES are counted where their memory is measured."""
    case = case_of(size, policy)
    planned = PlannedCase(case)
    kept, _ = planned.activations(planned.settings)
    assert kept == pytest.approx(counted(case)[0], rel=0.005)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_checkpointed_blocks_are_counted_too(blocks):
    case = replace(SMALL, policy="coat+recompute", fp8_states=True)
    planned = PlannedCase(case)
    kept = planned.saved(under("coat+recompute")).of_blocks(*case.blocks, blocks)
    kept += planned.saved(under("none"), True).of_inputs(case.blocks[0], blocks)
    assert case.batch_size * kept == pytest.approx(counted(case, blocks)[0], rel=0.01)


def test_a_gpu_keeps_no_scores_of_attention():
    """U = tokens x 3072 x 2 bytes. FLUX.1-dev under "coat" as in the table of nn/ops.py, plus rank 16."""
    planned = MemoryModel(dev_config(), on_gpu=True)
    unit = planned.tokens * 3072 * 2
    lora = 16 / 3072
    assert planned.saved(under("coat")).double / unit == pytest.approx(10.1 + 14 * lora, abs=0.1)
    assert planned.saved(under("coat")).single / unit == pytest.approx(9.65, abs=0.1)
    assert planned.saved(under("none")).single / unit < 24
    assert planned.saved(under("none"), True).double / unit == pytest.approx(0.5 + 0.5 * 4 / 128, abs=0.001)


@pytest.fixture
def with_kernel(monkeypatch):
    """with_kernel(kernel, dtype): the plan on a card of whose attention Paddle says this."""

    def make(kernel: str, dtype: str = "auto") -> MemoryModel:
        monkeypatch.setattr(phases, "gpu_place", lambda device: "card")
        monkeypatch.setattr(phases, "kernel_of_paddle", lambda *asked: seen.append(asked) or kernel)
        return MemoryModel(dev_config(model={"dtype": dtype}), on_gpu=True)

    seen = []
    yield make
    assert {asked[:2] for asked in seen} == {("card", 128)}


def test_a_card_that_is_not_at_hand_is_planned_with_what_paddle_takes_elsewhere(with_kernel):
    planned = MemoryModel(dev_config(), on_gpu=True)
    assert planned.kernel == FLASH and planned.facts[2] == "flash attention, assumed: no card is at hand"
    planned = MemoryModel(dev_config(model={"dtype": "float32"}), on_gpu=True)
    assert planned.kernel == EFFICIENT and "memory-efficient attention, assumed" in planned.facts[2]
    assert with_kernel(FLASH).facts[2] == "flash attention, Paddle's choice here"


def test_where_attention_is_written_out_the_plan_has_its_scores(with_kernel):
    """bfloat16: under "none" each block saves the scores behind the softmax instead of the output and a
    float32 per row, and all policies hold scores while a block goes backward."""
    written, flash = with_kernel(MATH), with_kernel(FLASH)
    scores = 2 * 24 * written.tokens**2
    assert f"({scores / 1e9:.2f} GB of scores" in written.facts[2]
    more = [model.saved(under("none")).single for model in (written, flash)]
    assert more[0] - more[1] == pytest.approx(scores, rel=0.1)
    for lines in (*phases.WORKING.values(), phases.FORWARD_WORKING):
        with_scores, without = (model._working(lines, batch=1) for model in (written, flash))
        assert with_scores - without > 0.3 * scores
    remainder = 24 * (2 * 128 + 4) * written.tokens  # computed again
    more = [model.saved(under("coat")).double for model in (written, flash)]
    assert more[1] - more[0] == pytest.approx(remainder)


def test_memory_efficient_attention_saves_no_scores_in_float32(with_kernel):
    efficient, written = with_kernel(EFFICIENT, "float32"), with_kernel(MATH, "float32")
    scores = 4 * 24 * written.tokens**2
    less = [model.saved(under("none")).single for model in (written, efficient)]
    assert less[0] - less[1] == pytest.approx(scores, rel=0.1)
    assert written.activations(under("none"))[1] > efficient.activations(under("none"))[1]


def test_flux_dev_by_its_shapes():
    planned = MemoryModel(dev_config(model={"quantize": True}), on_gpu=True)
    model = planned.model
    assert model.assumed and model.parameters == 11_901_408_320
    assert len(model.linears) == 504 and len(model.blocks) == 57 and model.double == 19
    values = sum(a * b for a, b in model.linears.values())
    scales = sum(4 * math.ceil(a / 128) * math.ceil(b / 128) for a, b in model.linears.values())
    rest = 11_901_408_320 - values
    assert planned.base_by_swapped("fp8")[0] == values + scales + 2 * rest
    assert planned.base_by_swapped(False)[0] == 2 * 11_901_408_320
    # 12 d^2 + 3 d^2 of modulation per single block: two of them stay of 38 that are swapped
    single = 15 * 3072**2 * 2
    saved = planned.base_by_swapped(False)[0] - planned.base_by_swapped(False)[38]
    assert saved == pytest.approx(36 * single, rel=0.001)
    assert sum(map(math.prod, planned.lora)) == 16 * sum(sum(model.linears[p]) for p in model.lora_paths)


def test_other_adapters_by_their_shapes():
    """A DoRA has a number for each output more, and as much again for the lengths of the base; no LoKr is
    copied into the dtype of the model."""
    plans = {kind: MemoryModel(dev_config(network={"type": kind}), on_gpu=True) for kind in ADAPTERS}
    outputs = sum(plans["dora"].model.linears[path][1] for path in plans["dora"].model.lora_paths)
    assert plans["dora"].lora_bytes - plans["lora"].lora_bytes == 4 * outputs
    held = {}
    for kind, planned in plans.items():
        planned.activations = lambda settings: (0, 0)
        held[kind] = planned.phases(under("coat"))[3].parts["LoRA"]
    assert held["lora"] == 1.5 * plans["lora"].lora_bytes
    assert held["dora"] - held["lora"] == 1.5 * 4 * outputs + 4 * outputs
    assert held["lokr"] == plans["lokr"].lora_bytes < plans["lora"].lora_bytes
    whole = MemoryModel(dev_config(network={"type": "lokr", "lokr_full_rank": True}), on_gpu=True)
    assert whole.lora_bytes == 4 * sum(a * b for a, b in whole.lora) and len(whole.lora) == 2 * 418


def test_no_memory_is_taken_for_the_large_model():
    # a block of FLUX.1-dev is 1.4 GB in float32; the small copies that are counted are far below it
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
    plan(dev_config(), MemoryModel)
    assert paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - before < 100 * MB


@pytest.mark.parametrize(
    ("size", "policy", "kind", "base"),
    [
        (SIZES[0], "none", "lora", False),
        (SIZES[1], "coat", "lora", False),
        (SIZES[0], "coat+recompute", "dora", False),
        (SIZES[0], ATTENTION, "lokr", False),
        (SIZES[0], ATTENTION, "lora", "fp8"),
        pytest.param(SIZES[1], "none", "lora", "nf4", marks=pytest.mark.slow),
        pytest.param(SIZES[1], ATTENTION, "lora", "fp8", marks=pytest.mark.slow),
        pytest.param(SIZES[1], "none", "lora", False, marks=pytest.mark.slow),
        pytest.param(SIZES[0], "coat", "lora", False, marks=pytest.mark.slow),
        *(pytest.param(size, "coat+recompute", "lora", False, marks=pytest.mark.slow) for size in SIZES),
        pytest.param(SIZES[1], "coat", "lora", "int8", marks=pytest.mark.slow),
        pytest.param(SIZES[1], ATTENTION, "lora", "fp4", marks=pytest.mark.slow),
    ],
)
def test_allocated_memory_of_a_step_agrees(size, policy, kind, base, monkeypatch):
    """By Paddle's own account of allocated bytes, without the noise of resident memory; and what training
    counts of them. base: the format of its weights."""
    monkeypatch.setattr(bench_worker, "NetworkConfig", partial(NetworkConfig, type=kind))
    monkeypatch.setattr(bench_worker, "FluxTransformer2DModel", partial(model_with_base, base))
    case = case_of(size, policy)
    planned = PlannedCase(case, kind)
    settings = replace(planned.settings, quantize=base)
    training = MeasuredTraining(case)
    training.step()
    kept, _ = planned.activations(settings)
    # under "none" a Linear outside the blocks saves its input, unless it is quantised
    assert kept == pytest.approx(training.bytes["bytes_kept"], rel=0.006 if base else 0.005)
    grown = allocated_by(training.step)
    step, update = planned.phases(settings)[3:5]
    expected = max(sum(p.parts.get(n, 0) for n in ("gradients", "kept", "working")) for p in (step, update))
    assert expected == pytest.approx(grown, rel=0.10)


def allocated_by(act) -> int:
    """Most bytes that Paddle allocates meanwhile, beyond those of before."""
    core = paddle.base.core
    gc.collect()  # what earlier tests left must not go meanwhile
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    act()
    return core.host_memory_stat_peak_value("Allocated", 0) - before


def model_with_base(base: str | bool, **sizes) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**sizes)
    if base:
        quantize_linears(model, base)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A transformer folder in bfloat16, and the plan of a run on it."""
    sizes = {"attention_head_dim": 64, "num_attention_heads": 6, "axes_dims_rope": (8, 28, 28),
             "num_layers": 1, "num_single_layers": 3, "joint_attention_dim": 256}  # fmt: skip
    folder, model = tmp_path_factory.mktemp("transformer"), FluxTransformer2DModel(**sizes)
    (folder / "config.json").write_text(json.dumps(sizes))
    linears = set(linear_paths(model))
    tensors = {
        name: bfloat16_of(p, name.removesuffix(".weight") in linears) for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder, MemoryModel(dev_config(device="cpu"), False, sizes)


def bfloat16_of(parameter: paddle.Tensor, turned: bool) -> np.ndarray:
    values = parameter.numpy()
    return np.ascontiguousarray(values.T if turned else values).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "base", [False, *(pytest.param(b, marks=pytest.mark.slow) if b in ("fp4", "int8") else b for b in BASES)]
)
def test_allocated_memory_while_a_model_is_read_agrees(written, base):
    folder, planned = written
    read = partial(load_quantized_transformer, base=base) if base else load_transformer
    read(folder, "float32")  # tables are made once
    parts = dict((p.name, p.parts) for p in planned.phases(replace(under("none"), quantize=base)))["loading"]
    held = []
    grown = allocated_by(lambda: held.append(read(folder, "float32")))
    print(f"{base}: planned {(parts['base'] + parts['working']) / MB:.1f} MB, measured {grown / MB:.1f} MB")
    assert parts["base"] + parts["working"] == pytest.approx(grown, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_resident_memory_of_a_process_agrees(policy, monkeypatch):
    """Growth of a child's resident memory over a step. Large activations, and a warm child: its libraries'
    own pages do not count. Every tensor is mapped by itself, so that freed memory leaves the process."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "1000000")
    case = replace(case_of(LARGE_PICTURE, policy), seed=1)
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(case))]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    grown = int(child.stdout.splitlines()[-1])
    planned = PlannedCase(case)
    parts = planned.phases(planned.settings)[3].parts
    expected = sum(parts[name] for name in ("gradients", "kept", "working"))
    print(f"{policy}: planned {expected / MB:.0f} MB, measured {grown / MB:.0f} MB")
    assert expected == pytest.approx(grown, rel=0.10)


def case_of(size: tuple[int, int, int, int, int], policy: str) -> BenchmarkCase:
    width, layers, batch, tokens, words = size
    return replace(SMALL, hidden_size=width, num_layers=layers, batch_size=batch, tokens=tokens,
                   text_tokens=words, policy=policy, fp8_states=policy != "none")  # fmt: skip


@pytest.fixture(scope="module")
def card_24() -> Plan:
    return plan(dev_config(), MemoryModel, vram_gb=24)


def test_the_choice_fits_and_what_is_faster_is_hardly_so_and_less_exact(card_24):
    chosen = card_24.settings
    assert card_24.total <= 24e9 and (chosen.quantize, chosen.blocks_to_swap) == ("int8", 0)
    planned, faster = MemoryModel(dev_config(), on_gpu=True), []
    for policy in (*POLICIES, ATTENTION):
        for quantize in (False, "int8", "fp8", "fp4"):
            for checkpointed in (0, 10, 57):
                for swapped in (0, 20, 57):
                    other = Settings(policy, checkpointed, quantize, swapped, 1, 1)
                    if max(phase.total for phase in planned.phases(other)) <= 24e9:
                        seconds = planned.seconds(other)
                        assert seconds >= card_24.seconds / (1 + NO_FASTER)
                        if seconds < card_24.seconds:
                            faster.append((quantize, swapped))
    assert faster and all(quantize in ("fp8", "fp4") or swapped for quantize, swapped in faster)


@pytest.mark.parametrize(
    ("model", "bases"),
    [
        ({}, (False, "int8", "fp8", "fp4")),
        ({"quantize": False}, (False,)),
        ({"quantize": "fp8"}, (False, "int8", "fp8")),
        ({"quantize": "nf4"}, (False, "int8", "fp8", "fp4", "nf4")),
        ({"quantize": "fp8", "quantize_matmul": True}, ("fp8",)),
    ],
)
def test_a_config_names_the_least_exact_base(model, bases):
    assert allowed_bases(dev_config(model=model)) == bases


def test_a_base_that_is_less_exact_than_the_config_is_told(card_24):
    config = dev_config()
    line = line_of_plan(config, with_settings(config, card_24.settings))
    assert line.startswith(str(card_24.settings) + "; to fit, the INT8 base rounds weights more than the")
    assert "\n" not in line and "(base not quantised)" in line
    for said, taken in (("fp4", "int8"), ("int8", "int8"), (False, False)):
        settings = replace(card_24.settings, quantize=taken)
        config = dev_config(model={"quantize": said})
        assert line_of_plan(config, with_settings(config, settings)) == str(settings)


def test_without_swapping_blocks_are_computed_twice_instead():
    """1024 px on 12 GB."""
    config = dev_config(datasets=[{"folder_path": "no/such", "resolution": 1024, "bucket_rule": "square"}])
    memory = MemoryModel(config, on_gpu=True)
    staying = best_that_fits(memory, 12)
    swapping = replace(staying.settings, checkpoint_blocks=0, blocks_to_swap=54)
    assert max(phase.total for phase in memory.phases(swapping)) <= 12e9
    assert staying.seconds / (1 + NO_FASTER) < memory.seconds(swapping) < staying.seconds
    assert staying.settings.blocks_to_swap == 0 == memory.sent_bytes(staying.settings)
    assert staying.total <= 12e9 and staying.settings.checkpoint_blocks > 20
    assert staying.settings.quantize == "fp4" and memory.sent_bytes(swapping) > 3e9


def test_text_encoders_are_streamed_where_they_do_not_fit():
    """On 8 GB two blocks of T5-XXL's 24, its table and CLIP are there; on 12 GB all."""
    config = dev_config(datasets=[{"folder_path": "no/such", "resolution": 1024, "bucket_rule": "square"}])
    memory = MemoryModel(config, on_gpu=True)
    small, larger = (best_that_fits(memory, gb) for gb in (8, 12))
    assert small.settings.stream_encoders and not larger.settings.stream_encoders
    t5 = 2 * (4 * 4096**2 + 3 * 4096 * 10240) + 32128 * 4096
    held = [each.phases[0].parts["encoders"] / 2 for each in (small, larger)]
    assert held[0] == pytest.approx(t5 + 123_060_480, rel=0.001) and held[1] == memory.model.encoders.text
    assert small.settings.quantize == "fp4" and small.settings.blocks_to_swap > 0
    assert as_given(with_settings(config, small.settings), 57) == small.settings


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_as_much_is_sent_as_the_swapper_sends(count):
    """Over a step that begins where one ended."""
    memory = MemoryModel(dev_config(), on_gpu=True)
    blocks = memory.weight_bytes("int8")[1][57 - count :]
    sent = []
    transport = SimpleNamespace(
        to_host=lambda x: x, wait=lambda ticket: None,
        start=lambda hosts: sent.append(sizes[hosts[0].name]) or (list(hosts), None),
    )  # fmt: skip
    layers = [paddle.nn.Linear(2, 2) for _ in range(count)]
    sizes = {}
    for layer, size in zip(layers, blocks, strict=True):
        for parameter in layer.parameters():
            parameter.stop_gradient = True
        sizes[layer.weight.name] = size
    swapper = swap_blocks(layers, transport)
    for _ in range(2):
        sent.clear()
        for index in range(count):
            swapper.enter(index, FORWARD)
        for index in reversed(range(count)):
            swapper.enter(index, BACKWARD)
    settings = Settings("coat", 0, "int8", count, 1, 3)
    assert memory.sent_bytes(settings) == 3 * sum(sent)


@pytest.mark.parametrize(("pixels", "gb", "quantize"), [(768, 24, "fp8"), (1024, 48, False)])
def test_without_checkpointing_or_swapping(pixels, gb, quantize):
    """768 x 768 on 24 GB with an FP8 base, 1024 x 1024 on 48 GB without."""
    config = dev_config(model={"quantize": quantize}, coat={"activation": {"policy": "coat+recompute"}})
    data = config.datasets[0].model_copy(update={"resolution": pixels})
    planned = plan(config.model_copy(update={"datasets": (data,)}), MemoryModel)
    assert planned.settings.checkpoint_blocks == planned.settings.blocks_to_swap == 0
    assert planned.total < gb * 1e9


def test_a_base_is_quantised_only_if_that_is_allowed():
    config = dev_config(model={"quantize": False})
    assert not plan(config, MemoryModel, vram_gb=24).settings.quantize
    with pytest.raises(ConfigError, match="nothing fits into 4 GB: .*; model.quantize: fp4 would allow"):
        plan(config, MemoryModel, vram_gb=4)


def test_without_coat_nothing_is_packed():
    settings = plan(dev_config(coat={"enabled": False}), MemoryModel, vram_gb=48).settings
    assert settings.policy == "none"


def test_a_budget_that_nothing_fits_names_the_smallest_need():
    with pytest.raises(
        ConfigError, match=r"nothing fits into 2 GB: the smallest possible need is \d+\.\d GB"
    ):
        plan(dev_config(), MemoryModel, vram_gb=2)


@pytest.mark.parametrize("vram", [0, -1, math.nan, math.inf])
def test_a_budget_is_a_positive_number(vram):
    with pytest.raises(ConfigError, match="vram"):
        plan(dev_config(), MemoryModel, vram_gb=vram)


def test_more_swapped_blocks_than_there_are():
    with pytest.raises(ConfigError, match="blocks_to_swap: came 58, but this model has 57 blocks"):
        plan(dev_config(model={"blocks_to_swap": 58}), MemoryModel)


def test_a_choice_goes_into_the_config_and_out_again():
    settings = Settings("coat+recompute", 12, "fp8", 30, 2, 3)
    assert as_given(with_settings(dev_config(), settings), 57) == settings
    bare = replace(settings, checkpoint_blocks=0)
    assert as_given(with_settings(dev_config(), bare), 57) == bare


def test_auto_applies_the_plan_and_as_given_does_nothing():
    config = dev_config(memory="auto", vram_gb=24.0)
    applied = with_memory_plan(config, MemoryModel)
    assert as_given(applied, 57) == plan(config, MemoryModel, 24).settings
    assert with_memory_plan(dev_config(), MemoryModel) == dev_config()


@pytest.mark.parametrize("device", ["gpu:1", "cpu"])
def test_auto_plans_with_what_is_free_on_the_device_at_hand(device, monkeypatch):
    asked = []

    def planning(config, memory_model, vram_gb):
        asked.append((config.device, vram_gb))
        return SimpleNamespace(settings=under("coat"))

    monkeypatch.setattr(settings_module, "plan", planning)
    monkeypatch.setattr(settings_module.paddle, "get_device", lambda: device)
    config = dev_config(memory="auto", device="auto")
    applied = with_memory_plan(config, MemoryModel, free=22 * 10**9)
    assert asked == [(device, 22.0)] and applied == with_settings(config, under("coat"))
    assert with_earlier_plan(config, applied) == applied
    with pytest.raises(ConfigError, match="give vram_gb"):
        with_memory_plan(config, MemoryModel)


def test_the_encoders_are_called_as_the_cache_calls_them():
    assert inspect.signature(build_cache).parameters["batch_size"].default == ENCODED_AT_ONCE


@pytest.mark.parametrize(("side", "pixels"), [(256, 8 * 256**2), (512, 1024**2), (1024, 1024**2),
                                             (1536, 1536**2)])  # fmt: skip
def test_so_many_pictures_are_planned_as_the_cache_encodes_at_once(side, pixels):
    """bfloat16 on a GPU: 4.1 tensors of 128 channels, and what cuDNN takes."""
    config = dev_config(datasets=[{"folder_path": "no/such", "resolution": side, "bucket_rule": "square"}])
    preparing = dict(MemoryModel(config, on_gpu=True).preparing(as_given(config, 57)))
    assert preparing["pictures"]["working"] == pytest.approx(4.1 * 128 * 2 * pixels + 512e6, rel=1e-6)
    assert pixels == pictures_at_once(side**2) * side**2


def test_lora_paths_of_the_small_model():
    blocks = ("transformer_blocks.0", "transformer_blocks.7", "single_transformer_blocks.3")
    paths = ("transformer_blocks.0.ff.net.2", "transformer_blocks.7.ff.net.2",
             "single_transformer_blocks.3.proj_out", "x_embedder")  # fmt: skip
    wanted = ("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out", "x_embedder")
    assert small_lora_paths(paths, blocks) == wanted


@pytest.mark.parametrize("swapped", [0, 30])
def test_preserving_the_models_own_output_takes_time_and_no_memory(swapped):
    """Forward and backward again and a forward more: between 2 and 2.6 times."""
    train = {"blank_prompt_preservation": True}
    plain, preserving = (MemoryModel(dev_config(**more), True) for more in ({}, {"train": train}))
    settings = Settings("coat", 0, "fp4", swapped, 1, 1)
    assert 2 < preserving.seconds(settings) / plain.seconds(settings) < 2.6
    totals = [[phase.total for phase in each.phases(settings)] for each in (plain, preserving)]
    assert totals[0] == totals[1]


def test_what_a_large_rank_saves_is_told_by_smaller_ones(monkeypatch):
    def saved(rank: int) -> float:
        saved_bytes._lines.cache_clear()
        memory = MemoryModel(dev_config(device="cpu", network={"linear": rank}), on_gpu=False)
        return plan(memory.config, MemoryModel).total

    told = saved(160)
    monkeypatch.setattr(saved_bytes, "RANK", 32)
    assert saved(160) == pytest.approx(told, rel=1e-6) and saved(10**12) > 1e15


@pytest.mark.parametrize(("key", "value"), [("train", {"batch_size": 10**5}), ("network", {"linear": 10**6})])
def test_what_no_device_holds_is_told_before_it_is_taken(key, value):
    check_fits(dev_config(device="cpu"), MemoryModel)  # not planned at all: it would not fit either
    with pytest.raises(ConfigError, match=r"would take \d+ GB .*and the device has \d+: lower them"):
        check_fits(dev_config(device="cpu", **{key: value}), MemoryModel)
