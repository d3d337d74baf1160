"""Count what a step asks of the host, as on a GPU that need not be there.

    python host_work.py CASE...         # "coat+recompute dropout"; TRITON_INTERPRET unset; prints JSON

A case is a policy and any of: dropout, fp8 (an FP8 base), products (FP8 products with it), checkpoints, dora,
lokr. A FLUX of one double and two single blocks in bfloat16 takes two steps with a LoRA (or that) on every
Linear of its blocks; the second is counted. Ops go to their Triton launchers, up to the launch; operators
that Paddle has no bfloat16 kernel for on a CPU compute in float32, and attention is one operator, as flash
attention is. Only counts are meant: what launchers return is not computed.
"""

import json
import sys
from collections import Counter
from contextlib import contextmanager

import paddle
from triton.runtime.jit import JITFunction

from ppcoat.coat import COATConfig, COATTrainer, factor_copies, prepare, trained_parameters
from ppcoat.config.schema import CoatActivationConfig, NetworkConfig
from ppcoat.fp8 import backend
from ppcoat.models.flux.transformer import DoubleBlock, FluxTransformer2DModel, SingleBlock
from ppcoat.nn import attention
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears

WIDTH, IMAGE, TEXT = 128, 16, 8
HALVES = (paddle.bfloat16, paddle.float16)
OPERATORS = "add radd sub rsub mul rmul truediv rtruediv floordiv pow mod gt ge lt le eq ne"
METHODS = (*(f"__{name}__" for name in OPERATORS.split()), "clone", "contiguous", "copy_", "_getitem_dygraph")
SYNCS = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__array__", "__index__")
found = Counter()
inside = Counter()  # depth of calls that are being counted


def tensors_of(values):
    for value in values:
        if isinstance(value, paddle.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


def mapped(value, change):
    if isinstance(value, paddle.Tensor):
        return change(value)
    return type(value)(mapped(each, change) for each in value) if isinstance(value, list | tuple) else value


def in_float32(function, args, kwargs):
    """What a CPU has no kernel for in bfloat16."""
    args = [mapped(each, lambda t: t.astype("float32") if t.dtype in HALVES else t) for each in args]
    return mapped(
        function(*args, **kwargs), lambda t: t.astype("bfloat16") if t.dtype == paddle.float32 else t
    )


@contextmanager
def one(*names):
    """What runs within is counted as one of each name."""
    if not inside["call"]:
        found.update(names)
    inside["call"] += 1
    try:
        yield
    finally:
        inside["call"] -= 1


def counted(function, name):
    """The same function, counted where nothing around it is."""

    def run(*args, **kwargs):
        with one("calls", f"call {name}"):
            halves = [t for t in tensors_of(args) if t.dtype in HALVES] if inside["call"] == 1 else []
            if not halves or name == "cast":
                return function(*args, **kwargs)
            try:
                # gradients have fewer kernels
                if not (paddle.is_grad_enabled() and any(not t.stop_gradient for t in halves)):
                    return function(*args, **kwargs)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                if name.endswith("_"):
                    paddle.assign(in_float32(function, args, kwargs), output=args[0])
                    return args[0]
            return in_float32(function, args, kwargs)

    return run


def count_operators():
    """Paddle's operators, however Python calls them; reads by the host; copies to the device."""
    for name, function in list(vars(paddle._C_ops).items()):
        if callable(function) and not name.startswith(("_", "get_", "set_")):
            setattr(paddle._C_ops, name, counted(function, name))
    for name in METHODS:
        setattr(paddle.Tensor, name, counted(getattr(paddle.Tensor, name), name))
    for owner, names, what in ((paddle.Tensor, SYNCS, "syncs"), (paddle, ("to_tensor",), "copies")):
        for name in names:
            setattr(owner, name, marked(getattr(owner, name), what))


def marked(function, what):
    def run(*args, **kwargs):
        with one(what):
            return function(*args, **kwargs)

    return run


def pretend_a_gpu():
    """Ops run their launchers, which stop short of the launch."""

    def launch(kernel, *args, **kwargs):
        found.update(("launches", f"launch {kernel.fn.__name__}"))

    def filled(like, shape, dtype):
        with one():
            return paddle.full(shape, 1 if dtype in ("uint8", "int32") else 0.01, dtype)

    def run_launcher(op, *args, **kwargs):
        if backend.forced() == backend.REFERENCE:
            return op.reference(*args, **kwargs)
        found.update(("ops", f"op {op.name}"))
        return op.version("triton")(*args, **kwargs)

    JITFunction.run = launch
    backend.Op.__call__ = run_launcher
    for op in backend.OPS.values():
        op.version("triton")
    for name, module in list(sys.modules.items()):
        if name.startswith("ppcoat.fp8.") and hasattr(module, "capability"):
            module.capability = lambda: 90
        if name.startswith("ppcoat.fp8.") and hasattr(module, "empty"):
            module.empty = filled
    attention.attention_kernel = lambda q, bias=None: attention.FLASH if q.dtype in HALVES else attention.MATH
    paddle.nn.functional.scaled_dot_product_attention = counted(
        lambda q, k, v, attn_mask=None: q + k + v, "scaled_dot_product_attention"
    )


class Step:
    """A step of training a LoRA, without what a trainer adds."""

    def __init__(self, policy, extras):
        paddle.seed(0)
        self.model = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=128,
            num_attention_heads=WIDTH // 128, joint_attention_dim=32, pooled_projection_dim=16,
        )  # fmt: skip
        self.model.to(dtype="bfloat16")
        if "fp8" in extras or "products" in extras:
            quantize_linears(self.model)
        if "products" in extras:
            multiply_in_fp8(self.model)
        activation = CoatActivationConfig(policy=policy, linear_granularity="per_group")
        self.coat = COATTrainer(COATConfig(activation=activation), "checkpoints" in extras)
        kind = next((kind for kind in ("dora", "lokr") if kind in extras), "lora")
        network = NetworkConfig(type=kind, linear=16, dropout=0.1 if "dropout" in extras else 0.0)
        modules = prepare(self.model, self.coat, network)
        self.optimizer = self.coat.create_optimizer(list(trained_parameters(modules).values()))
        self.factors = factor_copies(self.model, [self.optimizer])
        self.batch = {
            "hidden_states": paddle.ones([1, IMAGE, 16], "bfloat16"),
            "encoder_hidden_states": paddle.ones([1, TEXT, 32], "bfloat16"),
            "pooled_projections": paddle.ones([1, 16], "bfloat16"),
            "timestep": paddle.full([1], 0.5),
            "img_ids": paddle.zeros([IMAGE, 3]),
            "txt_ids": paddle.zeros([TEXT, 3]),
        }

    def take(self):
        with self.factors.in_use():
            with self.coat.saved_tensors():
                loss = self.model(**self.batch).sample.astype("float32").square().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()


def count_blocks():
    """Mark what is called inside of the blocks' forward."""
    for kind in (DoubleBlock, SingleBlock):

        def forward(block, *args, _forward=kind.forward):
            before = found["calls"]
            try:
                return _forward(block, *args)
            finally:
                found["calls in blocks, forward"] += found["calls"] - before

        kind.forward = forward


def main(cases):
    pretend_a_gpu()
    count_operators()
    count_blocks()
    results = {}
    for case in cases:
        policy, *extras = case.split()
        step = Step(policy, extras)
        step.take()
        found.clear()
        step.take()
        results[case] = dict(found)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
