"""Compile every kernel that the launchers of a case start, for a GPU that need not be there.

    python compile_kernels.py CAPABILITY        # 80, 89, 90; TRITON_INTERPRET unset

Prints JSON, for each launch: name of the kernel, types of the offsets that it adds to pointers, products of
two numbers of 32 bits, whether FP8 is converted by the device, and its accesses to memory. A launcher is
called as ever, with tensors on the CPU; Triton is told of a GPU of that capability and stops short of the
launch.
"""

import json
import re
import sys

import paddle
import triton
from conftest import adapted
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ppcoat.fp8 import (
    adamw_triton,
    log_codes_triton,
    matmul_triton,
    norm_triton,
    pointwise_triton,
    quantize_triton,
)
from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, encode_moments
from ppcoat.fp8.formats import E4M3, E5M2, BlockMatrix, Epilogue, Groups


class PretendedDriver:
    """What Triton asks a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def quantize_cases():
    for fmt in (E4M3, E5M2):
        for group in (128, None):
            x = paddle.ones([32, 3072]).astype("bfloat16")
            codes, scale = (adapted(paddle.empty([32, n], t)) for n, t in ((3072, "uint8"), (24, "float32")))
            yield quantize_triton.quantize, (adapted(x), fmt, group)
            yield quantize_triton.dequantize, (codes, scale, fmt, group, "bfloat16")
            packed = adapted(paddle.empty([32, 1536], "uint8"))
            yield quantize_triton.quantize_with_residual, (adapted(x), fmt, group)
            yield quantize_triton.dequantize_with_residual, (codes, scale, packed, fmt, group, "bfloat16")
    codes, scale = adapted((paddle.ones([3072, 3072]).astype("uint8"), paddle.ones([24, 24])))
    yield quantize_triton.dequantize_blocks, (codes, scale, E4M3, 128, "bfloat16")


def log_cases():
    x, byte, size = paddle.ones([48, 128]), paddle.ones([48, 128]).astype("uint8"), paddle.ones([48, 1])
    for signed in ("", "signed_"):
        encode, decode = (getattr(log_codes_triton, f"{signed}log_{end}code") for end in ("en", "de"))
        yield encode, adapted((x, E4M3, paddle.ones([1, 128])))
        yield decode, adapted((byte, size, size.astype("uint8"), E4M3))


def adamw_cases():
    for fmt, expand, beta1, dtype, rows in (
        (E4M3, True, 0.9, "bfloat16", True),
        (E5M2, True, 0.0, None, False),
        (E4M3, False, 0.9, None, False),
        (None, False, 0.9, "stochastic", False),
    ):
        codecs = tuple(MomentCodec(fmt, expand, positive) for positive in (False, True))
        states = encode_moments(paddle.zeros([48, 128]) if beta1 else None, paddle.zeros([48, 128]), codecs)
        states["beta_powers"] = {"beta1": paddle.ones([1]), "beta2": paddle.ones([1])}
        states["count"] = {name: paddle.zeros([1], "int64") for name in ("steps", "skipped")}
        hyper = AdamWHyper(paddle.ones([48, 1]) if rows else 0.1, 0.1, beta1, 0.99, 1e-8)
        param = paddle.ones([48, 128])
        stored = param.astype("bfloat16") if dtype == "bfloat16" else None
        param = param.astype("bfloat16") if dtype == "stochastic" else param
        args = (param, paddle.ones([48, 128]), states, codecs, hyper, paddle.to_tensor([True]), stored)
        yield adamw_triton.adamw_step, adapted(args)


def norm_cases():
    x, row = paddle.ones([1, 4, 3072]).astype("bfloat16"), paddle.ones([1, 1, 3072]).astype("bfloat16")
    codes, scale = x.astype("uint8"), paddle.ones([1, 4, 24])
    for fmt in (E4M3, E5M2):
        groups = Groups(scale, fmt, 128, "bfloat16")
        yield norm_triton.modulated_norm, adapted((codes, row, row, groups))
        yield norm_triton.modulated_norm_grad, adapted((codes, row, x, groups))
        yield norm_triton.rms_norm, adapted((codes, row[0, 0], row, 1e-6, groups))
        yield norm_triton.rms_norm_grad, adapted((codes, row[0, 0], row, x, 1e-6, groups))
    yield norm_triton.modulated_norm, adapted((x, row, row))
    yield norm_triton.rms_norm, adapted((x, row[0, 0], None, 1e-5))
    yield norm_triton.rms_norm_grad, adapted((x, row[0, 0], None, x, 1e-5))
    heads, rstd, weight = x.reshape([1, 4, 24, 128]), paddle.ones([1, 4, 24, 1]), row[0, 0, :128].contiguous()
    angles = paddle.ones([4, 64]), paddle.ones([4, 64])
    yield norm_triton.rms_norm_rotated, adapted((heads, weight, angles))
    yield norm_triton.rms_norm_rotated_grad, adapted((heads, heads, rstd, weight, angles))


def pointwise_cases():
    x, row = paddle.ones([1, 4, 3072]).astype("bfloat16"), paddle.ones([1, 1, 3072]).astype("bfloat16")
    groups = Groups(paddle.ones([1, 4, 24]), E4M3, 128, "bfloat16")
    for name in ("gelu", "silu"):
        yield getattr(pointwise_triton, name), adapted((x.astype("uint8"), groups))
        yield getattr(pointwise_triton, f"{name}_grad"), adapted((x.astype("uint8"), x, groups))
    yield pointwise_triton.gated_residual, adapted((x, row, x))
    yield pointwise_triton.dropout, adapted((x, 0.1, 2**61 + 1))


def matmul_cases():
    codes, scale = paddle.ones([256, 3072]).astype("uint8"), paddle.ones([256, 24])
    weight = BlockMatrix(paddle.ones([3072, 3072]).astype("uint8"), paddle.ones([24, 24]))
    for transpose in (False, True):
        down, up, bias = (
            paddle.ones(shape).astype("bfloat16")
            for shape in ([256, 16], [3072, 16] if transpose else [16, 3072], [3072])
        )
        args = codes, scale, weight, transpose, Epilogue(bias, down, up), "bfloat16"
        yield matmul_triton.scaled_matmul, adapted(args)


def compiled(capability: int) -> list[dict]:
    """What is printed, for all cases."""
    found = []
    run = JITFunction.run

    def stop_short(self, *args, **kwargs):
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        text = kernel.asm["ttir"]
        found.append(
            {
                "name": self.fn.__name__,
                "offsets": re.findall(r"tt\.addptr .*, ([^,]*i\d+)>?(?: loc.*)?$", text, re.MULTILINE),
                "narrow_products": re.findall(r"arith\.muli .* : i32", text),
                "native_fp8": "tt.fp_to_fp" in text,
                "tensor_cores": sorted(set(re.findall(r"(?:wgmma\.|mma\.)[a-z0-9_.]+", kernel.asm["ptx"]))),
                "shared_bytes": kernel.metadata.shared,
                "accesses": re.findall(
                    r"(?:ld|st)\.global\.[a-z0-9.]+|cp\.async\.c[ag][a-z0-9.]+ \[[^,]*, \[[^,]*, 0x10",
                    kernel.asm["ptx"],
                ),
            }
        )

    JITFunction.run = stop_short
    triton.runtime.driver.set_active(PretendedDriver(capability))
    for cases in (quantize_cases, log_cases, adamw_cases, norm_cases, pointwise_cases, matmul_cases):
        for launcher, args in cases():
            launcher(*args)
    return found


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]))))
