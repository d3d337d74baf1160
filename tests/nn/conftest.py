"""A small random FLUX with LoRAs that do something, its inputs, and gradients by plain autograd."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from ppcoat.lora import DoRALinear, LoKrLinear, LoKrSettings, adapter_layers, inject_lokr, inject_lora
from ppcoat.nn.convert import set_sublayer
from ppcoat.nn.linear import LoRALinear
from ppcoat.nn.policy import SavingPolicy
from ppcoat.nn.saved_tensors import fp8_saved_tensors


class PlainLoRA(nn.Layer):
    """The formula of the LoRA paper, for autograd to differentiate. Shares the parameters of a LoRALinear."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B, self.scale = layer.lora_A, layer.lora_B, layer.scale

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * (x @ self.lora_A @ self.lora_B)


class PlainDoRA(PlainLoRA):
    """The same, with PEFT's lengths."""

    def __init__(self, layer):
        super().__init__(layer)
        self.lora_magnitude_vector = layer.lora_magnitude_vector

    def forward(self, x):
        changed = self.weight + self.scale * (self.lora_A @ self.lora_B)
        lengths = changed.detach().square().sum(0).sqrt()
        return F.linear(x, changed) * (self.lora_magnitude_vector / lengths) + self.bias


class PlainLoKr(nn.Layer):
    """The formula of LyCORIS."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.scale = layer.weight, layer.bias, layer.scale
        for name in layer.factors:
            setattr(self, name, getattr(layer, name))

    def forward(self, x):
        w2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return F.linear(x, self.weight + self.scale * paddle.kron(self.lokr_w1, w2).t(), self.bias)


PLAIN = {LoRALinear: PlainLoRA, DoRALinear: PlainDoRA, LoKrLinear: PlainLoKr}


def with_loras(model: nn.Layer, seed: int = 1, lokr: LoKrSettings | None = None, **settings) -> nn.Layer:
    """LoRAs (or other adapters) that do something, and head norms whose weights are not one."""
    rng = np.random.default_rng(seed)
    settings = {"rank": 4, "alpha": 8.0, **settings}
    layers = inject_lora(model, **settings) if lokr is None else inject_lokr(model, lokr)
    for layer in layers.values():
        for name in layer.factors[1:]:
            factor = getattr(layer, name)
            random = (0.05 * rng.standard_normal(factor.shape)).astype("float32")
            factor.set_value(factor.numpy() * (1 + random) if "magnitude" in name else random)
    for name, parameter in model.named_parameters():
        if name.split(".")[-2].startswith("norm_"):
            parameter.set_value(rng.uniform(0.5, 1.5, parameter.shape).astype("float32"))
    model.train()
    return model


def arguments(model, tokens=36, text=12, pictures=2) -> dict:
    """Arguments of a transformer for a square picture, from a fixed seed."""
    rng, sizes = np.random.default_rng(5), model.config

    def normal(*shape):
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))

    rows, columns = np.divmod(np.arange(tokens), int(tokens**0.5))
    return {
        "hidden_states": normal(pictures, tokens, sizes.in_channels),
        "encoder_hidden_states": normal(pictures, text, sizes.joint_attention_dim),
        "pooled_projections": normal(pictures, sizes.pooled_projection_dim),
        "timestep": paddle.linspace(0.3, 0.8, pictures),
        "guidance": paddle.full([pictures], 3.5),
        "img_ids": paddle.to_tensor(np.stack([0 * rows, rows, columns], -1).astype("float32")),
        "txt_ids": paddle.zeros([text, 3]),
        "return_dict": False,
    }


def context(policy: str | SavingPolicy | None, **settings):
    """fp8_saved_tensors whose hooks pack nothing: what is saved is what ops and Linears ask for."""
    return nullcontext() if policy is None else fp8_saved_tensors(policy, min_size=2**60, **settings)


def gradients(model, batch, policy=None, checkpoints=0, **settings) -> tuple[float, dict[str, np.ndarray]]:
    """-> loss, {name: gradient} of everything that is trained, by a forward pass under `policy`, the first
    `checkpoints` blocks checkpointed. The seed fixes the dropout."""
    model.clear_gradients()
    paddle.seed(7)
    with checkpointing(model, checkpoints), context(policy, **settings):
        loss = paddle.square(model(**batch)[0] - 1).mean()
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if not p.stop_gradient}
    return float(loss), {name: grad.numpy() for name, grad in trained.items()}


def plain_gradients(model, batch) -> tuple[float, dict[str, np.ndarray]]:
    """The same by Paddle's autograd alone: LoRAs are written out for the while."""
    layers = adapter_layers(model)
    try:
        for path, layer in layers.items():
            set_sublayer(model, path, PLAIN[type(layer)](layer))
        return gradients(model, batch)
    finally:
        for path, layer in layers.items():
            set_sublayer(model, path, layer)


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    # a gradient of zeros must be zeros
    return float(np.sqrt(np.mean((got - wanted) ** 2) / max(np.mean(wanted**2), 1e-30)))


def errors(got: dict, wanted: dict) -> tuple[dict[str, float], float]:
    """Relative RMS error of each gradient, and of all in one row."""
    assert got.keys() == wanted.keys()
    each = {name: relative_rms(got[name], wanted[name]) for name in wanted}
    return each, relative_rms(*(np.concatenate([g[name].ravel() for name in wanted]) for g in (got, wanted)))


@contextmanager
def checkpointing(model, blocks):
    """The first `blocks` blocks are checkpointed within it; 0: the model stays as it is."""
    if blocks:
        model.checkpoint_blocks = blocks
        model.enable_gradient_checkpointing()
    yield
    if blocks:
        model.disable_gradient_checkpointing()


def counted(model, batch, policy="none", checkpoints=0, **settings):
    """The counters after one forward pass."""
    with checkpointing(model, checkpoints), context(policy, **settings) as saved:
        model(**batch)
    return saved


@pytest.fixture(scope="session")
def flux(build_flux) -> SimpleNamespace:
    """The functions of this file."""

    def build(double=2, single=2, heads=2, head_dim=32, **settings) -> nn.Layer:
        """A random transformer with LoRAs; settings are those of inject_lora."""
        sizes = {"channels": 16, "text": 24, "pooled": 12, "guidance": True}
        return with_loras(build_flux(double, single, heads, head_dim, **sizes), **settings)

    functions = (build, with_loras, arguments, context, checkpointing, gradients, plain_gradients, errors,
                 counted, relative_rms)  # fmt: skip
    return SimpleNamespace(**{function.__name__: function for function in functions})
