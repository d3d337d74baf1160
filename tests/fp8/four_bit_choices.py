"""What was tried for FP4: errors of 4-bit formats on the fixture's four kinds of weights, as a table.

    python tests/fp8/four_bit_choices.py        # from the repository's root; two minutes

NumPy in float64, apart from the last line, which is the format as it is. Levels are fitted to blocks of
normal numbers (Lloyd's rule: levels are means of what they stand for, scales are those of least error). Bits
count scales; low-rank factors, in bfloat16, are counted for a weight of FLUX's width, 3072 x 3072.
"""

from pathlib import Path

import numpy as np
import paddle

from ppcoat.fp8 import four_bit

REFS = np.load(Path(__file__).parents[1] / "fixtures" / "nf4" / "refs.npz")
KINDS = ("gaussian", "heavy_tailed", "outlier_channels", "rows_uneven")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6


def floating(mantissa):
    """x > 0 -> numbers with so many mantissa bits, from an octave below x to half of one above."""
    step = 2.0**-mantissa

    def scales(x):
        for up in np.arange(-1.0, 0.5, step):
            exponent = np.floor(np.log2(x) + up)
            yield np.exp2(exponent) * (1 + np.round((np.exp2(np.log2(x) + up - exponent) - 1) / step) * step)

    return scales


def per_octave(count):
    """The same for numbers of which `count` make an octave."""

    def scales(x):
        for up in range(-count, count // 2 + 1):
            yield np.exp2((np.round(np.log2(x) * count) + up) / count)

    return scales


def fixed(x):
    yield x


def quantised(x, levels, scales, signs):
    """Blocks x [n, B] -> their values under the best of the scales, and the scales."""
    size = np.maximum(np.abs(x).max(1, keepdims=True), 1e-30)
    least, best, best_scale = np.full(len(x), np.inf), np.zeros_like(x), np.ones([len(x), 1])
    middles = (levels[1:] + levels[:-1]) / 2
    for scale in (sign * scale for scale in scales(size) for sign in signs):
        values = levels[np.searchsorted(middles, x / scale)] * scale
        error = ((values - x) ** 2).sum(1)
        better = error < least
        least[better], best[better], best_scale[better] = error[better], values[better], scale[better]
    return best, best_scale


def fitted(block, scales, signs):
    """16 levels, the largest magnitude 1."""
    levels = np.sign(np.linspace(-1, 0.9, 16)) * np.abs(np.linspace(-1, 0.9, 16)) ** 1.25
    if len(signs) == 1:
        levels = np.sign(np.linspace(-1, 1, 16)) * np.abs(np.linspace(-1, 1, 16)) ** 1.25
    for turn in range(8):
        x = np.random.default_rng(turn).standard_normal([4000, block])
        _, scale = quantised(x, levels, scales, signs)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x / scale)
        weight = np.broadcast_to(scale**2, x.shape)
        levels = np.sort(
            np.bincount(codes.ravel(), (weight * x / scale).ravel(), 16)
            / np.bincount(codes.ravel(), weight.ravel(), 16)
        )
        levels = levels / np.abs(levels).max()
    return levels


def error(values, w):
    return 100 * np.sqrt(((values - w) ** 2).sum() / (w**2).sum())


def main():
    weights = {kind: REFS[f"{kind}/w_bf16"].astype(np.uint16).astype(np.uint32) << 16 for kind in KINDS}
    weights = {kind: bits.view(np.float32).astype(np.float64) for kind, bits in weights.items()}
    both, one = (1, -1), (1,)
    nf4, nv = REFS["code"].astype(np.float64), np.concatenate([-E2M1[:0:-1], E2M1])
    choices = {
        "NF4, block 64": (4.5, 64, nf4, fixed, one),
        "NF4's levels, best scale, E4M3, block 16": (4.5, 16, nf4, floating(3), one),
        "NVFP4's levels, best scale, E4M3, block 16": (4.5, 16, nv, floating(3), one),
        "fitted levels, E4M3, block 16": (4.5, 16, None, floating(3), one),
        "fitted, signed E4M3, block 32": (4.25, 32, None, floating(3), both),
        "fitted, signed E4M3 under a scale of the weight, block 16": (4.5, 16, None, floating(3), both),
        "fitted, signed E5M2, block 16": (4.5, 16, None, floating(2), both),
        "fitted, signed, 5 an octave, block 16": (4.5, 16, None, per_octave(5), both),
        "fitted, signed, 6 an octave, block 16": (4.5, 16, None, per_octave(6), both),
    }
    print("| format | bits | " + " | ".join(KINDS) + " |\n|---|---|" + "---|" * len(KINDS))
    baseline = [error(REFS[f"{kind}/dequantised"], w) for kind, w in weights.items()]

    def line(name, bits, errors):
        cells = (f"{e:.2f} ({e / base:.2f})" for e, base in zip(errors, baseline, strict=True))
        print(f"| {name} | {bits:.2f} | {' | '.join(cells)} |", flush=True)

    for name, (bits, block, levels, scales, signs) in choices.items():
        levels = fitted(block, scales, signs) if levels is None else levels
        found = {
            kind: quantised(w.reshape(-1, block), levels, scales, signs)[0] for kind, w in weights.items()
        }
        line(name, bits, [error(found[kind].reshape(w.shape), w) for kind, w in weights.items()])
    rank, errors = 4, []
    levels = fitted(32, floating(3), both)
    for w in weights.values():
        u, s, v = np.linalg.svd(w, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ v[:rank]
        rest = quantised((w - low).reshape(-1, 32), levels, floating(3), both)[0].reshape(w.shape)
        errors.append(error(low + rest, w))
    line(f"rank {rank} first, then the line of block 32", 4.25 + 16 * rank * 2 / 3072, errors)
    errors = []
    for w in weights.values():
        codes, scale = four_bit.quantize_fp4(paddle.to_tensor(w.astype("float32")))
        errors.append(error(four_bit.dequantize_fp4(codes, scale, list(w.shape)).numpy(), w))
    line("**fp4: levels on a cubic, signed, 6 an octave, 8 scales tried, block 16**", 4.5, errors)


if __name__ == "__main__":
    main()
