"""What works on this machine, and what is lost where something is missing: versions, device, fast paths.

    python -m ppcoat doctor

Every faster version of an FP8 op is compared with its reference and timed beside it. The exit status is 0 if
the main job can run: training a LoRA with FP8 states and activations. Fast paths and distributed training
may be missing for that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ppcoat.config.flags import TINY_FLUX
from ppcoat.device import GpuMeter, HostMeter, on_gpu
from ppcoat.errors import ConfigError
from ppcoat.fp8 import backend, matmul, norm
from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, encode_moments
from ppcoat.fp8.formats import E4M3, NORM_EPSILON, Groups, fp8_support
from ppcoat.fp8.four_bit import quantize_absmax, quantize_fp4, quantize_nf4
from ppcoat.fp8.matmul import quantize_blocks
from ppcoat.fp8.quantize import dequantize, quantize
from ppcoat.nn.attention import EFFICIENT, FLASH, MATH, kernel_of_paddle

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "ppdiffusers", "paddlenlp", "safetensors", "numpy", "triton")
OPTIONAL = ("paddlepaddle-gpu", "triton")
TIMED = 5  # runs of which the median counts
ROWS_GPU, ROWS_CPU, WIDTH, HEAD_DIM = 4608, 64, 3072, 128  # tokens of 1024 px; FLUX's width
TITLES = {"triton": "Triton kernels", "paddle": "Paddle's FP8 ops"}
CAPABILITY_WITHOUT_CARD = (9, 0)
HEAD_SIZES = {"FLUX": HEAD_DIM, "NewBie": 96}
KERNELS = {FLASH: "flash attention", EFFICIENT: "memory-efficient attention", MATH: "written out in matmuls"}
FLASH_WANTS = "Flash attention takes an NVIDIA card from sm_80 on, bfloat16, and a GPU wheel of Paddle"
LAYER_MODULES = ("norm_triton", "pointwise_triton", "matmul_triton")


@dataclass(frozen=True)
class Finding:
    """One line of the table. mark: ok, miss (slower or smaller without it) or fail (the main job cannot run);
    advice: what is lost and how to get it, for the last two."""

    mark: str
    name: str
    what: str
    advice: str = ""


def run_command(arguments: argparse.Namespace) -> None:
    findings = examine()
    print(doctor_table(findings))
    failed = [finding for finding in findings if finding.mark == "fail"]
    if failed:
        raise ConfigError(f"the main job cannot run: {failed[0].name}: {failed[0].advice}")
    print("\nthe main job can run: training a LoRA with FP8 optimizer states and activations")


def examine() -> list[Finding]:
    """All findings, in the order in which they are printed."""
    return [*examine_machine(), *fast_paths()]


def examine_machine() -> list[Finding]:
    """Those that are not of one op."""
    return [
        *versions(), device(), *built_with(), memory(),
        fp8_cast(), fp8_matmul(), attention_row(), tiny_flux(), kernel_build(),
    ]  # fmt: skip


def doctor_table(findings: list[Finding]) -> str:
    """One line for each finding, then each advice once, behind the names of all that it is for."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{f.mark:4s}  {f.name:{width}s}  {f.what}" for f in findings]
    advice: dict[str, list[str]] = {}
    for finding in findings:
        if finding.mark != "ok":
            advice.setdefault(finding.advice, []).append(finding.name)
    if advice:
        lines += ["", "what is missing:"]
        lines += [f"  {', '.join(names)}: {text}" for text, names in advice.items()]
    return "\n".join(lines)


def versions() -> list[Finding]:
    """Python and the packages. A needed one that is missing is told by `tiny_flux`, which imports them."""
    found = [
        Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    ]
    for package in PACKAGES:
        try:
            found.append(Finding("ok", package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            if package not in OPTIONAL:
                continue  # paddlepaddle and paddlepaddle-gpu stand for each other
            if package == "triton":
                advice = (
                    f"FP8 ops are several Paddle calls instead of one kernel each; {backend.INSTALL_TRITON}"
                )
                found.append(Finding("miss", package, "not installed", advice))
    return found


def device() -> Finding:
    """The device that Paddle computes on."""
    if on_gpu():
        return Finding("ok", "device", f"{paddle.get_device()}, {GpuMeter().name()}")
    advice = "training takes hours where a card takes minutes, and only tiny models fit: use an NVIDIA card"
    if not paddle.is_compiled_with_cuda():
        advice += " and install paddlepaddle-gpu from Paddle's own page"
    return Finding("miss", "device", f"cpu, {HostMeter().name()}", advice)


def built_with() -> list[Finding]:
    """What Paddle was built with."""
    cuda = paddle.version.cuda() if paddle.is_compiled_with_cuda() else None
    parts = (
        ("CUDA", cuda, "no GPU can be used: install paddlepaddle-gpu from Paddle's own page"),
        ("CINN", paddle.is_compiled_with_cinn(), "drawing with compiled graphs: use a wheel built with CINN"),
        (
            "NCCL",
            paddle.base.core.is_compiled_with_nccl(),
            "several GPUs: install paddlepaddle-gpu for Linux",
        ),
        ("distributed", paddle.distributed.is_available(), "several processes: use a wheel built with it"),
    )
    return [
        Finding("ok", f"built with {name}", value if isinstance(value, str) else "yes") if value
        else Finding("miss", f"built with {name}", "no", f"lost: {advice}" if name != "CUDA" else advice)
        for name, value, advice in parts
    ]  # fmt: skip


def memory() -> Finding:
    """What is free where the model would go."""
    meter = GpuMeter() if on_gpu() else HostMeter()
    free, total = meter.free_memory(), meter.total_memory()
    if free is None or total is None:
        return Finding("miss", "memory", "unknown", "`plan` cannot tell what fits: give it vram_gb")
    return Finding("ok", "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def fp8_cast() -> Finding:
    """Every E4M3 number must survive quantise and dequantise, the reference's, on this device."""
    numbers = np.arange(0, 127, dtype=np.uint8)
    values = (numbers % 8 / 8 + (numbers >= 8)) * np.exp2(np.maximum(numbers // 8, 1) - 7.0)
    x = paddle.to_tensor(values.astype(np.float32)).unsqueeze(0)
    with backend.use(backend.REFERENCE):
        again = dequantize(*quantize(x, E4M3, values.size), E4M3, values.size)
    if bool((again == x).all()):
        return Finding("ok", "FP8 cast", "all 127 positive E4M3 numbers come back as they were")
    return Finding(
        "fail", "FP8 cast", "wrong", "Paddle's cast to float8_e4m3fn is broken: install paddle 3.3"
    )


def fp8_matmul() -> Finding:
    """Whether the device multiplies FP8."""
    support = fp8_support()
    if support.matmul:
        return Finding("ok", "FP8 matmul", support.reason)
    advice = "FP8 saves memory but no time in matmuls: that takes a card of sm_89 or later (RTX 40, L4, H100)"
    return Finding("miss", "FP8 matmul", support.reason, advice)


def attention_row() -> Finding:
    """The kernel that attention takes for each model, and what it costs where that is not flash attention."""
    q = paddle.zeros([1, 1, 1, 1], dtype="bfloat16" if on_gpu() else "float32")
    kernels = {name: kernel_of_paddle(q.place, size, q.dtype) for name, size in HEAD_SIZES.items()}
    what = ", ".join(f"{KERNELS[kernel]} for {name}" for name, kernel in kernels.items())
    if len({*kernels.values()}) == 1:
        what = f"{KERNELS[kernels['FLUX']]} for {' and '.join(kernels)}"
    if {*kernels.values()} == {FLASH}:
        return Finding("ok", "attention", f"{what}, as Paddle chooses")
    if MATH not in kernels.values():
        lost = "time, not measured; memory is that of flash attention"
    else:
        scores = 24 * ROWS_GPU**2 * q.element_size() / 1e9  # both models have 24 heads
        lost = (
            f"at {ROWS_GPU} tokens {scores:.2f} GB (calculated) for each block whose scores are kept, three "
            "times that while a block goes backward under a COAT policy, and time, not measured"
        )
    return Finding("miss", "attention", what, f"lost: {lost}. {FLASH_WANTS}")


def tiny_flux() -> Finding:
    """The built-in model: there, and read by ppdiffusers' pipeline class, which must be there, too."""
    try:
        from ppcoat.models.flux.pipeline import FluxPipeline
    except (ImportError, AttributeError) as error:  # missing, or of a version that does not fit the others
        advice = "no model can be read: install the versions that requirements.txt names (README.md, Install)"
        return Finding("fail", "ppdiffusers", f"cannot be imported: {error}", advice)
    folder = Path(TINY_FLUX)
    if not (folder / "model_index.json").is_file():
        advice = "quickstart has no model: install ppcoat from its repository (pip install --no-deps -e .)"
        return Finding("fail", "tiny FLUX", f"{folder.name} is missing", advice)
    config = FluxPipeline.load_config(str(folder))
    return Finding("ok", "tiny FLUX", f"{config['_class_name']} in {folder.parent.name}/{folder.name}")


def kernel_build() -> Finding:
    """Whether Triton can build kernels here, found by building a small one, with or without a card."""
    capability = paddle.device.cuda.get_device_capability() if on_gpu() else CAPABILITY_WITHOUT_CARD
    name = "sm_{}{}".format(*capability)
    if trouble := backend.build_trouble(10 * capability[0] + capability[1]):
        advice = "no Triton kernel will run, the slower references do: install what is named there"
        return Finding("miss", "kernel build", trouble, advice)
    what = "its launcher by the C compiler" + ("" if on_gpu() else "; no card is here to load it")
    return Finding("ok", "kernel build", f"a small kernel was built for {name}, {what}")


def fast_paths() -> list[Finding]:
    """Each op in each faster version: its self-check, and its time beside the reference's; one line for a
    version in which no op can run here."""
    found = []
    for version in backend.ORDER[:-1]:
        if reason := backend.unavailable(version):
            what = f"none of {len(backend.MODULES[version])} used: {reason}"
            advice = f"the plain references run instead, which is slower; {backend.remedy(version)}"
            found.append(Finding("miss", TITLES[version], what, advice))
            continue
        for name, op in backend.OPS.items():
            verdict = op.verdict(version)
            title = f"{name} in {version}"
            if verdict.usable:
                ms, reference_ms = (_median_ms(op, each) for each in (version, backend.REFERENCE))
                what = f"error {verdict.error:.2g} of 1 allowed, {ms:.3f} ms, reference {reference_ms:.3f} ms"
                found.append(Finding("ok", title, f"{what}: {reference_ms / ms:.1f}x"))
            elif not verdict.absent:
                advice = f"the plain reference runs instead, which is slower; {backend.remedy(version)}"
                found.append(Finding("miss", title, f"not used: {verdict.reason}", advice))
    return found


def _median_ms(op: backend.Op, version: str) -> float:
    """Median time of one call at FLUX's width, the first call left out."""
    arguments = _arguments(op.name)
    meter, times = GpuMeter() if on_gpu() else HostMeter(), []
    with backend.use(version):
        op(*arguments)
        for _ in range(TIMED):
            meter.start()
            op(*arguments)
            times.append(meter.stop())
    return float(np.median(times))


def _arguments(name: str) -> tuple:
    """Arguments of an op, of the size that it has in a training of FLUX."""
    x = paddle.randn([ROWS_GPU if on_gpu() else ROWS_CPU, WIDTH])
    rows = x.abs().reshape([-1, 128])
    with backend.use(backend.REFERENCE):
        if name == "dequantize_blocks":
            return *quantize_blocks(x), E4M3, 128, "bfloat16"
        if name == "dequantize_fp4":
            return *quantize_fp4(x), list(x.shape), "bfloat16"
        if name == "dequantize_nf4":
            codes, absmax = quantize_nf4(x)
            return codes, quantize_absmax(absmax), list(x.shape), "bfloat16"
        if name.startswith(("quantize", "dequantize")):
            coder = backend.OPS[name.removeprefix("de")]
            given = x.astype("bfloat16"), E4M3, 128
            return given if coder.name == name else (*coder(*given), E4M3, 128, "bfloat16")
        if name == "adamw_step":
            codecs = MomentCodec(E4M3, True, positive=False), MomentCodec(E4M3, True, positive=True)
            states = encode_moments(rows * 0.0, rows * 0.0, codecs)
            states["beta_powers"] = {each: paddle.ones([1], "float64") for each in ("beta1", "beta2")}
            states["count"] = {"steps": paddle.zeros([1], "int64"), "skipped": paddle.zeros([1], "int64")}
            hyper = AdamWHyper(1e-4, 0.01, 0.9, 0.999, 1e-8)
            return rows.clone(), rows, states, codecs, hyper, paddle.to_tensor([True])
        if backend.MODULES["triton"][name] in LAYER_MODULES:
            return _layer_arguments(name, x)
        if name.endswith("encode"):
            return rows, E4M3
        encode: Callable = backend.OPS[name.replace("decode", "encode")]
        return *encode(rows, E4M3), E4M3


def _layer_arguments(name: str, x: paddle.Tensor) -> tuple:
    """The same for the ops of a FLUX block; x [tokens, WIDTH]."""
    dtype = "bfloat16" if on_gpu() else "float32"
    x, row = x.astype(dtype).unsqueeze(0), paddle.randn([1, 1, WIDTH]).astype(dtype)
    codes, scale = quantize(x, E4M3, 128)
    groups, tokens = Groups(scale, E4M3, 128, dtype), x.shape[1]
    if name == "scaled_matmul":
        weight = matmul.BlockMatrix(*quantize_blocks(paddle.randn([WIDTH, WIDTH])))
        return codes[0], scale[0], weight, False, matmul.Epilogue(), dtype
    if name.startswith("rms_norm_rotated"):
        heads, weight = x.reshape([1, tokens, -1, HEAD_DIM]), paddle.ones([HEAD_DIM], dtype)
        angles = paddle.randn([tokens, HEAD_DIM // 2])
        rotation = angles.cos(), angles.sin()
        if name == "rms_norm_rotated":
            return heads, weight, rotation
        return heads, *norm.rms_norm_rotated(heads, weight, rotation), weight, rotation
    return {
        "modulated_norm": (codes, row, row, groups),
        "modulated_norm_grad": (codes, row, x, groups),
        "rms_norm": (codes, row[0, 0], row, NORM_EPSILON, groups),
        "rms_norm_grad": (codes, row[0, 0], row, x, NORM_EPSILON, groups),
        "gelu": (codes, groups),
        "silu": (codes, groups),
        "gelu_grad": (codes, x, groups),
        "silu_grad": (codes, x, groups),
        "gated_residual": (x, row, x),
        "dropout": (x, 0.1, 1),
    }[name]
