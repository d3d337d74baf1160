"""Forms of held tensors: how exact, how many bytes, and that NaN stays visible."""

import numpy as np
import paddle

from ppcoat.fp8.formats import E4M3
from ppcoat.nn.held import finely_pack, pack_tensor


def tensor(seed: int, shape: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def test_finely_packed_values_are_ten_times_as_exact_as_fp8_in_a_byte_and_a_half():
    x = tensor(13, [64, 256]) * paddle.exp(tensor(14, [64, 1]))
    held = finely_pack(x, 128)
    assert held.nbytes == held.nbytes_bf16 == 64 * 256 * 3 // 2 + 64 * 2 * 4
    assert held.nbytes_unpacked == 64 * 256 * 4
    wanted, fp8 = x.numpy(), pack_tensor(x, E4M3, 128).unpack().numpy()
    error = np.sqrt(np.mean((held.unpack().numpy() - wanted) ** 2))
    assert error < 0.12 * np.sqrt(np.mean((fp8 - wanted) ** 2))
    assert error < 0.003 * np.sqrt(np.mean(wanted**2))


def test_finely_packed_zeros_are_zero_and_nan_stays_visible():
    values = np.zeros((2, 8), "float32")
    assert not finely_pack(paddle.to_tensor(values), 8).unpack().numpy().any()
    values[1, 3] = np.nan
    got = finely_pack(paddle.to_tensor(values), 8).unpack().numpy()
    assert not got[0].any() and np.isnan(got[1]).all()
