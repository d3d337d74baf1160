"""Triton kernels in tests: on a GPU as they are, else in Triton's interpreter on Paddle's CPU tensors."""

import warnings
from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend


class Adapter:
    """A Paddle CPU tensor with the methods that Triton's interpreter asks torch tensors for. It is its own
    storage, and lies on the CPU already: nothing is ever copied."""

    def __init__(self, tensor: paddle.Tensor) -> None:
        self.tensor = tensor
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def data_ptr(self):
        return self.tensor.data_ptr()

    def is_contiguous(self):
        return self.tensor.is_contiguous()

    def new_empty(self, shape, dtype=None, device=None):
        return Adapter(paddle.empty([shape] if isinstance(shape, int) else shape, dtype or self.dtype))

    @property
    def data(self):  # as `device`, for a descriptor's view
        return self

    device = "cpu"

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.data_ptr() == self.data_ptr()

    def set_(self, storage, offset, size, stride):
        self.tensor = storage.tensor

    def storage_offset(self):
        return 0

    def size(self):
        return self.tensor.shape

    def stride(self):
        return self.tensor.strides


def adapted(value):
    """Tensors inside dicts, tuples and dataclasses -> adapters."""
    if isinstance(value, paddle.Tensor):
        return Adapter(value)
    if isinstance(value, dict):
        return {name: adapted(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(adapted(each) for each in value)
    if is_dataclass(value) and any(isinstance(getattr(value, f.name), paddle.Tensor) for f in fields(value)):
        return replace(value, **{f.name: adapted(getattr(value, f.name)) for f in fields(value)})
    return value


def plain(value):
    """Inverse of `adapted` for what a launcher returns."""
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    return value.tensor if isinstance(value, Adapter) else value


@cache
def remember_patches() -> None:
    """Triton's interpreter puts its own functions into triton.language, for good, and looks whether they are
    there at every call of a jitted function: a third of the time. Once for a file of kernels will do."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))

    interpreter._patch_lang = once


def interpreted(launcher):
    """The launcher as a function of Paddle tensors. Kernels meet NaN and infinity as on a card: silently."""
    remember_patches()

    def run(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return plain(
                launcher(*map(adapted, args), **{name: adapted(arg) for name, arg in kwargs.items()})
            )

    return run


@pytest.fixture(scope="session")
def on_triton():
    """on_triton(launcher) -> the launcher as a function of Paddle tensors."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return (lambda launcher: launcher) if paddle.get_device().startswith("gpu") else interpreted


@pytest.fixture(params=["reference", "triton"])
def run(request):
    """run(name) -> the op of that name as a function of Paddle tensors: its reference, then its kernel."""
    if request.param == "reference":
        return lambda name: backend.OPS[name].reference
    on_triton = request.getfixturevalue("on_triton")
    return lambda name: on_triton(backend.OPS[name].version("triton"))


@pytest.fixture(scope="session")
def in_float64():
    """in_float64(function, x, dy) -> its value and the gradient by x, by Paddle's autograd in float64."""

    def computed(function, x, dy):
        x = paddle.to_tensor(np.asarray(x, dtype=np.float64), stop_gradient=False)
        y = function(x)
        y.backward(paddle.to_tensor(np.asarray(dy, dtype=np.float64)))
        return y.numpy(), x.grad.numpy()

    return computed
