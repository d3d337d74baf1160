"""Format facts against ml_dtypes, which knows the two formats independently."""

import ml_dtypes
import numpy as np
import pytest

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3, E5M2, INT8, fp8_support, get_format


@pytest.mark.parametrize(("fmt", "dtype"), [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)])
def test_facts_agree_with_ml_dtypes(fmt, dtype):
    info = ml_dtypes.finfo(dtype)
    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.min_subnormal == float(info.smallest_subnormal)
    assert fmt.mantissa_bits == info.nmant


def test_int8_is_two_complement_and_no_format_of_activations():
    numbers = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(INT8.numbers(numbers.view(np.uint8)), numbers)
    with pytest.raises(ConfigError, match="'int8'"):
        get_format("int8")


def test_unknown_format_is_named():
    assert get_format("e5m2") is E5M2
    with pytest.raises(ConfigError, match="'fp8'.*e4m3, e5m2"):
        get_format("fp8")
    with pytest.raises(ConfigError, match="None"):
        get_format(None)


def test_cpu_stores_fp8_and_does_not_multiply_it():
    support = fp8_support()
    assert support.storage and support.reason
    assert not support.matmul or "gpu" in support.reason


def test_every_code_decodes_as_ml_dtypes_does():
    import paddle

    codes = np.arange(256, dtype=np.uint8)
    for fmt, dtype in ((E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)):
        want = codes.view(dtype).astype(np.float32)
        got = paddle.to_tensor(codes).view(fmt.dtype).astype("float32").numpy()
        np.testing.assert_array_equal(got[np.isfinite(want)], want[np.isfinite(want)])
