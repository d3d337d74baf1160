"""What a training step costs on a CPU, as ratios of steps that alternate in one process (slow).

The shape: 4 + 8 blocks, 8 heads of 64, 256 image and 64 text tokens, LoRA of rank 16, batch 1. The plain
model computes the same with ppdiffusers' modules, nn.Linear and autograd.
"""

import statistics

import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from ppcoat.bench.bench_worker import BenchmarkCase, MeasuredTraining

SHAPE = {"hidden_size": 512, "num_layers": 12, "batch_size": 1, "tokens": 256, "text_tokens": 64, "rank": 16}
STEPS, WARM_UP = 10, 2


class PlainLoRA(nn.Layer):
    def __init__(self, lora):
        super().__init__()
        width_in, width_out = lora.weight.shape
        self.base, self.scale = nn.Linear(width_in, width_out), lora.scale
        self.base.weight, self.base.bias = lora.weight, lora.bias
        self.down, self.up = nn.Linear(width_in, lora.rank, bias_attr=False), nn.Linear(1, 1, bias_attr=False)
        self.down.weight, self.up.weight = lora.lora_A, lora.lora_B

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.scale


class PlainNorm(nn.Layer):
    """Adaptive LayerNorm with ppdiffusers' module; `parts` modulations, the first two of them used here."""

    def __init__(self, modulation):
        from ppdiffusers.models.normalization import AdaLayerNormZero

        super().__init__()
        dim, self.parts = modulation.linear.weight.shape[0], modulation.parts
        self.zero = AdaLayerNormZero(dim)
        self.zero.linear, self.zero.silu = modulation.linear, nn.Identity()  # our model takes SiLU once

    def forward(self, x, vec):
        if self.parts == 6:
            return self.zero(x, emb=vec)
        shift, scale, gate = self.zero.linear(vec).chunk(3, axis=1)
        return self.zero.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


class PlainHeadNorm(nn.Layer):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return x * paddle.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x, cos, sin):
    """Pairs taken apart and put together again, as in the public code; x [B, tokens, heads, head_dim]."""
    real, imaginary = x.reshape([*x.shape[:-1], -1, 2]).unbind(-1)
    other = paddle.stack([-imaginary, real], axis=-1).flatten(3)
    whole = [t.repeat_interleave(2, axis=-1)[None, :, None] for t in (cos, sin)]
    return x * whole[0] + other * whole[1]


def attend(q, k, v):
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q, k, v))
    weights = F.softmax(paddle.matmul(q * q.shape[-1] ** -0.5, k, transpose_y=True), axis=-1)
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3]).flatten(2)


class PlainAttention(nn.Layer):
    def __init__(self, attn):
        super().__init__()
        self.heads = attn.head_shape
        for name, layer in attn.named_children():
            if name.startswith("norm"):
                setattr(self, name, PlainHeadNorm(layer))
            elif name == "to_out":
                self.to_out = PlainLoRA(layer[0])
            else:
                setattr(self, name, PlainLoRA(layer))

    def heads_of(self, x, linears, norms):
        q, k, v = (linear(x).reshape(self.heads) for linear in linears)
        return norms[0](q), norms[1](k), v

    def forward(self, img, txt, cos, sin):
        image = self.heads_of(img, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k))
        if txt is not None:
            text = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            text = self.heads_of(txt, text, (self.norm_added_q, self.norm_added_k))
            image = [paddle.concat(pair, axis=1) for pair in zip(text, image, strict=True)]
        both = attend(rotated(image[0], cos, sin), rotated(image[1], cos, sin), image[2])
        if txt is None:
            return both
        return self.to_out(both[:, txt.shape[1] :]), self.to_add_out(both[:, : txt.shape[1]])


class PlainFeedForward(nn.Layer):
    def __init__(self, ff):
        from ppdiffusers.models.attention import FeedForward

        super().__init__()
        self.ff = FeedForward(ff.net[2].weight.shape[1], activation_fn="gelu-approximate")
        self.ff.net[0].proj, self.ff.net[2] = PlainLoRA(ff.net[0].proj), PlainLoRA(ff.net[2])

    def forward(self, x):
        return self.ff(x)


class PlainDouble(nn.Layer):
    def __init__(self, block):
        super().__init__()
        self.norm1, self.norm1_context = PlainNorm(block.norm1), PlainNorm(block.norm1_context)
        dim = block.ff.net[2].weight.shape[1]
        self.norm2 = nn.LayerNorm(dim, epsilon=1e-6, weight_attr=False, bias_attr=False)
        self.attn = PlainAttention(block.attn)
        self.ff, self.ff_context = PlainFeedForward(block.ff), PlainFeedForward(block.ff_context)

    def forward(self, img, txt, vec, cos, sin):
        y, gate, shift, scale, gate_mlp = self.norm1(img, vec)
        y_txt, gate_txt, shift_txt, scale_txt, gate_mlp_txt = self.norm1_context(txt, vec)
        img_attn, txt_attn = self.attn(y, y_txt, cos, sin)
        img, txt = img + gate[:, None] * img_attn, txt + gate_txt[:, None] * txt_attn
        y = self.norm2(img) * (1 + scale[:, None]) + shift[:, None]
        y_txt = self.norm2(txt) * (1 + scale_txt[:, None]) + shift_txt[:, None]
        img = img + gate_mlp[:, None] * self.ff(y)
        return img, txt + gate_mlp_txt[:, None] * self.ff_context(y_txt)


class PlainSingle(nn.Layer):
    def __init__(self, block):
        super().__init__()
        self.norm, self.attn = PlainNorm(block.norm), PlainAttention(block.attn)
        self.proj_mlp, self.proj_out = PlainLoRA(block.proj_mlp), PlainLoRA(block.proj_out)

    def forward(self, x, vec, cos, sin):
        y, gate = self.norm(x, vec)
        mlp = F.gelu(self.proj_mlp(y), approximate=True)
        both = paddle.concat([self.attn(y, None, cos, sin), mlp], axis=-1)
        return x + gate[:, None] * self.proj_out(both)


def plain_training() -> MeasuredTraining:
    """The standard variant, its blocks replaced by plain ones that share their parameters."""
    training = MeasuredTraining(BenchmarkCase(**SHAPE))
    for name, kind in (("transformer_blocks", PlainDouble), ("single_transformer_blocks", PlainSingle)):
        setattr(training.model, name, nn.LayerList([kind(block) for block in getattr(training.model, name)]))
    return training


@pytest.mark.slow
def test_a_step_costs_no_more_than_promised(capsys):
    runs = {
        "coat": MeasuredTraining(BenchmarkCase(**SHAPE, fp8_states=True, policy="coat")),
        "none": MeasuredTraining(BenchmarkCase(**SHAPE)),
        "plain": plain_training(),
    }
    steps = {name: [] for name in runs}
    for _ in range(WARM_UP + STEPS):
        for name, run in runs.items():
            steps[name].append(run.step())
    losses = {name: [step.loss for step in taken] for name, taken in steps.items()}
    assert losses["none"] == pytest.approx(losses["plain"], rel=1e-4), (
        "the plain model computes something else"
    )
    assert losses["coat"] == pytest.approx(losses["plain"], rel=1e-2)

    median = {k: statistics.median(s.milliseconds for s in v[WARM_UP:]) for k, v in steps.items()}
    with capsys.disabled():
        print("\nms per step:", {name: round(value) for name, value in median.items()})
        print(f"coat / none {median['coat'] / median['none']:.2f} (at most 1.4)")
        print(f"none / plain {median['none'] / median['plain']:.2f} (at most 1)")
    assert median["coat"] <= 1.4 * median["none"]
    assert median["none"] <= median["plain"]
