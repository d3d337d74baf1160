"""bfloat16 and float16 on a CPU, with the dtypes and roundings of a GPU.

    with HalfPrecision() as half:
        ...                             # models with half weights compute as they would on a GPU
    half.emulated, half.promoted        # what was done, by operator

Paddle's CPU wheel lacks half precision in a third of its operators and in more of their gradients. Within the
context every operator is tried as it is; where the kernel is missing it runs in float32 and its result is
rounded once, which is what a GPU does. Autograd goes through, and saved-tensor hooks see the half tensor that
the operator would have saved on a GPU, not its float32 copy.

What a GPU refuses is refused here, with operator and place: tensors of several floating dtypes where Paddle
does not promote them, and operators that have no half precision there either. So is an in-place operator
whose other operand has another dtype, which would silently change the dtype of its target. Operators that
add up in half precision on a CPU run in float32, too.

RoundingNoise does to float32 what rounding to bfloat16 does.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
from paddle import _C_ops
from paddle.base import core
from paddle.base.framework import EagerParamBase

HALVES = (paddle.bfloat16, paddle.float16)
FLOATS = (*HALVES, paddle.float32, paddle.float64)
# Operators that move, cast or make values, and so take tensors of any dtypes side by side.
ANY_DTYPES = {"cast", "cast_", "copy_", "assign_out_", "full_like", "share_data_", "view_dtype"}
TAKES_NUMBERS = {"clip", "pow", "scale"}  # beside one tensor: Paddle reads them out of tensors, too
# Not registered for these on a GPU: PD_REGISTER_KERNEL in paddle/phi/kernels of Paddle 3.
NOT_ON_A_GPU = {
    "channel_shuffle": HALVES,
    "repeat_interleave": (paddle.float16,),
    "as_complex": HALVES,
    "as_real": HALVES,
}
MAKES_VALUES = {"arange", "full", "linspace"}
# On a CPU these add up in the dtype of their input, on a GPU in float32.
ADDS_UP_IN_HALF = {"sum", "mean", "softmax", "layer_norm", "matmul", "conv2d", "group_norm", "p_norm"}
# Gradients of these that have no kernel of their own are made of operators that exist in half precision.
MOVES_VALUES = {"cast", "reshape", "transpose", "concat", "split", "split_with_num", "slice", "stack",
                "squeeze", "unsqueeze", "assign", "expand", "flatten", "unbind", "pad3d", "pad"}  # fmt: skip
MISSING = ("is not registered", "kernel with key", "Unimplemented", "NotFound", "not support",
           "receives invalid")  # fmt: skip
ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "pow",
              "rpow", "matmul", "lt", "le", "gt", "ge", "eq", "ne")  # fmt: skip
NOT_A_PLACE = ("half_precision", "pretended_gpu", "mock", "contextlib")
KERNELS = core._get_all_register_op_kernels("phi")


class MixedDtypes(TypeError):
    """Tensors of several floating dtypes met in an operator that a GPU refuses, or that changes a dtype in
    place."""


class MissingOnGpu(NotImplementedError):
    """An operator that a GPU does not have in half precision."""


class HalfPrecision:
    """Context manager, see above. When the context ends Paddle is as it was before.

    Calls with half tensors: emulated {operator}, computed in float32; native {operator}, as they are;
    promoted {place}, where Paddle promoted a half and a float32 tensor, with a float32 result.
    """

    def __init__(self) -> None:
        self.emulated, self.native, self.promoted = Counter(), Counter(), Counter()
        self._call: _Call | None = None

    def __enter__(self) -> "HalfPrecision":
        self._undo = ExitStack()
        try:
            patch_operators(self._undo, self._operator)
            hooks = paddle.autograd.saved_tensors_hooks
            self._undo.enter_context(mock.patch.object(
                paddle.autograd, "saved_tensors_hooks",
                lambda pack, unpack: hooks(lambda x: self._pack(pack, x), lambda kept: kept.unpack(unpack)),
            ))  # fmt: skip
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _operator(self, name: str, function, args: tuple, kwargs: dict):
        if self._call is not None:
            return function(*args, **kwargs)
        tensors = tensors_in(args[:1]) if name in TAKES_NUMBERS else tensors_in(args, kwargs)
        dtypes = {t.dtype for t in tensors if t.dtype in FLOATS}
        if dtypes.isdisjoint(HALVES):
            return function(*args, **kwargs)
        if missing := dtypes.intersection(NOT_ON_A_GPU.get(name, ())):
            raise MissingOnGpu(f"{name} at {place()}: a GPU has no {_names(missing)} of it")
        changes = name.endswith("_")
        if len(dtypes) > 1 and name not in ANY_DTYPES:
            return self._mixed(name, function, args, kwargs, dtypes, changes)
        if not self._is_there(name, tensors, changes):
            return self._in_float32(name, function, args, kwargs, changes)
        try:
            result = function(*args, **kwargs)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if not any(sign in str(error) for sign in MISSING):
                raise
            return self._in_float32(name, function, args, kwargs, changes)
        self.native[name] += 1
        return result

    def _mixed(self, name, function, args, kwargs, dtypes, changes):
        found = _names(dtypes)
        if changes:
            raise MixedDtypes(f"{name} at {place()}: {found}; in place, the dtype of the result would change")
        try:
            result = function(*args, **kwargs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise MixedDtypes(f"{name} at {place()}: {found}; Paddle does not promote them") from error
        self.promoted[place()] += 1
        return result

    def _is_there(self, name: str, tensors: list[paddle.Tensor], changes: bool) -> bool:
        """Whether Paddle's CPU has the operator, and where it will be wanted its gradient."""
        if name in ADDS_UP_IN_HALF:
            return False
        wanted = {t.dtype for t in tensors if t.dtype in HALVES and not t.stop_gradient}
        if changes or not wanted or not paddle.is_grad_enabled():
            return True
        kernels = KERNELS.get(f"{name}_grad")
        if kernels is None:
            return name in MOVES_VALUES
        (dtype,) = wanted
        return any("CPU" in each and str(dtype).rpartition(".")[-1] in each for each in kernels)

    def _in_float32(self, name, function, args, kwargs, changes):
        self.emulated[name] += 1
        self._call = call = _Call()
        try:
            target = args[0] if changes else None
            result = function(*call.wide(args), **call.wide(kwargs))
            if changes:
                paddle.assign(result.astype(target.dtype), output=target)
                result = target
            else:
                result = call.narrow(result)
        finally:
            self._call = None
        call.close()
        return result

    def _pack(self, pack, x: paddle.Tensor) -> "_Saved":
        if self._call is None or x.dtype != paddle.float32:
            return _Saved(pack(x))
        return self._call.saved(pack, x)


class _Call:
    """One operator that runs in float32: which float32 tensors stand for which half ones."""

    def __init__(self) -> None:
        self.half, self._pairs, self._waiting = None, {}, []

    def wide(self, value):
        """Half tensors inside containers -> float32 ones."""
        return mapped(value, self._wide)

    def narrow(self, value):
        """float32 results inside containers -> half ones, rounded once."""
        return mapped(value, self._narrow)

    def _wide(self, x: paddle.Tensor) -> paddle.Tensor:
        if x.dtype not in HALVES:
            return x
        self.half = x.dtype
        wide = x.astype("float32")
        self._pairs[wide.data_ptr()] = x, wide  # both live as long as the call, so the address is theirs
        return wide

    def _narrow(self, x: paddle.Tensor) -> paddle.Tensor:
        if x.dtype != paddle.float32:
            return x
        narrow = x.astype(self.half)
        self._pairs[x.data_ptr()] = narrow, x
        return narrow

    def saved(self, pack, x: paddle.Tensor) -> "_Saved":
        """A tensor that autograd saves within the call: what stands for it is known when the call is over."""
        kept = _Saved(None)
        self._waiting.append((kept, pack, x))
        return kept

    def close(self) -> None:
        """Give each saved tensor to its hook, as the half tensor for which it stands if there is one."""
        for kept, pack, x in self._waiting:
            pair = self._pairs.get(x.data_ptr())
            kept.widened = pair is not None
            kept.inner = pack(x if pair is None else pair[0])
        self._waiting.clear()


class _Saved:
    """What autograd holds in a saved tensor's place."""

    def __init__(self, inner: object, widened: bool = False) -> None:
        self.inner, self.widened = inner, widened

    def unpack(self, unpack) -> paddle.Tensor:
        x = unpack(self.inner)
        return x.astype("float32") if self.widened else x


class RoundingNoise:
    """Context manager: what operators compute in the forward passes of float32 models, and frozen weights,
    get noise of the size of rounding to bfloat16: evenly distributed within half a step of its 8 bits, 2^-9
    to 2^-8 of a value. How far a result moves under it is what bfloat16 explains. seed: of the noise.

    exact: (owner, name) of functions that are float32 in a bfloat16 run, too; whole: of those that round
    their result once. Nothing outside of a Layer's call, and nothing in backward, gets noise.
    """

    def __init__(self, seed: int, exact: tuple = (), whole: tuple = ()) -> None:
        self._rng, self._weights, self._depth, self._off = np.random.default_rng(seed), {}, 0, 0
        self._exact, self._whole = exact, whole

    def __enter__(self) -> "RoundingNoise":
        with ExitStack() as stack:
            patch_operators(stack, self._operator)
            wrapped = [(paddle.nn.Layer, "__call__", self._layer)]
            wrapped += [(owner, name, self._exactly) for owner, name in self._exact]
            wrapped += [(owner, name, self._rounded_once) for owner, name in self._whole]
            for owner, name, run in wrapped:
                function = partial_of(run, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, function))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        self._weights.clear()

    def _layer(self, function, *args, **kwargs):
        self._depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= 1

    def _exactly(self, function, *args, **kwargs):
        self._off += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._off -= 1

    def _rounded_once(self, function, *args, **kwargs):
        result = self._exactly(function, *args, **kwargs)
        return mapped(result, self._moved) if self._is_on else result

    @property
    def _is_on(self) -> bool:
        return self._depth > 0 and not self._off

    def _operator(self, name: str, function, args: tuple, kwargs: dict):
        exact = MOVES_VALUES | ANY_DTYPES | MAKES_VALUES
        if not self._is_on or name.endswith("_") or name in exact:
            return function(*args, **kwargs)
        weighed = mapped(args, self._weight), mapped(kwargs, self._weight)
        return mapped(self._exactly(function, *weighed[0], **weighed[1]), self._moved)

    def _weight(self, x: paddle.Tensor) -> paddle.Tensor:
        """A frozen weight, rounded once for all who read it."""
        if not (isinstance(x, EagerParamBase) and x.stop_gradient):
            return x
        if id(x) not in self._weights:
            self._weights[id(x)] = x, self._moved(x)
        return self._weights[id(x)][1]

    def _moved(self, x: paddle.Tensor) -> paddle.Tensor:
        if x.dtype != paddle.float32 or not x.size:
            return x
        values, largest = x.detach().numpy(), float(np.finfo("float32").max)
        half_steps = np.ldexp(2.0**-9, np.frexp(values)[1])  # a value is m * 2^e, m from 1/2 to 1
        noise = half_steps * self._rng.uniform(-1, 1, values.shape)
        noise = np.where(np.abs(values + noise) < largest, noise, 0)  # masks stay finite
        return self._exactly(paddle.add, x, paddle.to_tensor(noise.astype("float32")))


def partial_of(run, function):
    """run with `function` as its first argument: a plain function, so that it is a method in a class."""
    return lambda *args, **kwargs: run(function, *args, **kwargs)


def patch_operators(stack: ExitStack, run) -> None:
    """Until `stack` closes, run(name, function, args, kwargs) is called for each operator of Paddle in
    dynamic mode."""
    for name in dir(_C_ops):
        function = getattr(_C_ops, name)
        if callable(function) and not name.startswith(("_", "get_")):
            _replace(stack, _C_ops, name, name, function, run)
    for name in (*(f"__{each}__" for each in ARITHMETIC), "copy_"):
        _replace(stack, paddle.Tensor, name, name.strip("_") if name != "copy_" else name,
                 getattr(paddle.Tensor, name), run)  # fmt: skip
    for module in (paddle.linalg, paddle.tensor.linalg, paddle):
        if type(getattr(module, "matmul", None)).__name__ == "builtin_function_or_method":
            _replace(stack, module, "matmul", "matmul", module.matmul, run)


def _replace(stack: ExitStack, owner, attribute: str, name: str, function, run) -> None:
    def operator(*args, **kwargs):
        if not paddle.in_dynamic_mode():
            return function(*args, **kwargs)
        return run(name, function, args, kwargs)

    stack.enter_context(mock.patch.object(owner, attribute, operator))


def tensors_in(*values) -> list[paddle.Tensor]:
    """Every tensor inside tuples, lists and dicts."""
    found = []
    for value in values:
        if isinstance(value, paddle.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


def mapped(value, function):
    """The same containers with function(tensor) in each tensor's place."""
    if isinstance(value, paddle.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(each, function) for each in value)
    if isinstance(value, dict):
        return {name: mapped(each, function) for name, each in value.items()}
    return value


def _names(dtypes) -> str:
    return " and ".join(sorted(str(dtype).rpartition(".")[-1] for dtype in dtypes))


def place() -> str:
    """File, function and line of ppcoat (or of a test) that called the operator."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename)
        if not (file.stem in NOT_A_PLACE or "site-packages" in file.parts or code.co_filename[0] == "<"):
            return f"{file.parent.name}/{file.name} {code.co_name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"
