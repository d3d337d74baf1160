"""Forms of saved tensors: how exact, how many bytes, and that NaN stays visible."""

import weakref

import numpy as np
import paddle

from ppcoat.fp8.formats import E4M3
from ppcoat.nn.saved_forms import (
    PlainSaved,
    Recomputed,
    SharedSaved,
    codes_or_floats,
    save_fp8,
    save_residual,
)


def tensor(seed: int, shape: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def test_values_with_a_residual_are_ten_times_as_exact_as_fp8_in_a_byte_and_a_half():
    x = tensor(13, [64, 256]) * paddle.exp(tensor(14, [64, 1]))
    saved = save_residual(x, 128)
    assert saved.nbytes == saved.nbytes_bf16 == 64 * 256 * 3 // 2 + 64 * 2 * 4
    assert saved.nbytes_unpacked == 64 * 256 * 4
    wanted, fp8 = x.numpy(), save_fp8(x, E4M3, 128).unpack().numpy()
    error = np.sqrt(np.mean((saved.unpack().numpy() - wanted) ** 2))
    assert error < 0.12 * np.sqrt(np.mean((fp8 - wanted) ** 2))
    assert error < 0.003 * np.sqrt(np.mean(wanted**2))


def test_zeros_with_a_residual_are_zero_and_nan_stays_visible():
    values = np.zeros((2, 8), "float32")
    assert not save_residual(paddle.to_tensor(values), 8).unpack().numpy().any()
    values[1, 3] = np.nan
    got = save_residual(paddle.to_tensor(values), 8).unpack().numpy()
    assert not got[0].any() and np.isnan(got[1]).all()


def test_bytes_of_the_other_forms():
    x = tensor(15, [64, 256])
    plain, statistic = PlainSaved(x), PlainSaved(x, statistic=True)
    assert plain.nbytes == plain.nbytes_unpacked == statistic.nbytes == 64 * 256 * 4
    assert (plain.nbytes_bf16, statistic.nbytes_bf16) == (64 * 256 * 2, 64 * 256 * 4)
    assert plain.unpack() is x
    again = Recomputed(lambda: x)
    assert again.unpack() is x and again.nbytes == again.nbytes_bf16 == again.nbytes_unpacked == 0


def test_an_op_reads_codes_where_there_are_any_and_floats_where_not():
    x = tensor(16, [4, 256])
    packed = save_fp8(x, E4M3, 128)
    codes, groups = codes_or_floats(packed)
    assert codes is packed.codes and groups.scale is packed.scale
    assert (groups.fmt, groups.group_size, groups.dtype) == (E4M3, 128, x.dtype)
    for form in (PlainSaved(x), save_residual(x, 128), Recomputed(lambda: x)):
        floats, groups = codes_or_floats(form)
        assert groups is None and floats.dtype == x.dtype
        np.testing.assert_allclose(floats.numpy(), x.numpy(), rtol=0.01)


def test_what_readers_share_is_unpacked_once_for_all_of_them():
    calls = []
    shared = SharedSaved(Recomputed(lambda: calls.append(1) or tensor(17, [2, 2])), readers=3)
    values = [shared.unpack() for _ in range(3)]
    assert len(calls) == 1 and values[0] is values[1] is values[2]
    address = weakref.ref(values[0])
    del values
    assert address() is None  # the last reader took it away
    shared.unpack()
    assert len(calls) == 2
