"""Heads: their mathematics, and that one by one they get the gradients of all together."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ppcoat.distill.discriminator import (
    Discriminator,
    GroupNorm,
    Head,
    discriminator_hinge,
    generator_hinge,
)
from ppcoat.lora import lora_disabled
from ppcoat.nn.saved_tensors import count_saved_tensors

TOKENS = 4


@pytest.fixture
def noisy():
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal([3, TOKENS, 16]), "float32")
    x.stop_gradient = False
    return x


@pytest.fixture
def run(student, batch):
    """run(x) -> velocity of the teacher at x."""

    def run(x):
        rows, columns = np.divmod(np.arange(TOKENS), 2)
        positions = np.stack([0 * rows, rows, columns], 1).astype("float32")
        with lora_disabled(student):
            return student(
                x,
                batch["prompt_embeds"],
                batch["pooled"],
                paddle.full([3], 0.5),
                paddle.to_tensor(positions),
                paddle.zeros([5, 3]),
                guidance=paddle.full([3], 3.0),
                return_dict=False,
            )[0]

    return run


def features_of(student, run, x):
    """Image tokens after every block, with their graph, collected by the blocks' plain forward."""
    found, hooks = [], []
    for path, block in student.named_blocks().items():
        single = path.startswith("single")
        hooks.append(
            block.register_forward_post_hook(
                lambda layer, given, out, single=single: (
                    found.append(out[:, 5:] if single else out[0]) and None
                )
            )
        )
    run(x)
    for hook in hooks:
        hook.remove()
    return found


def gradients(layer):
    return {name: p.grad.numpy().copy() for name, p in layer.named_parameters()}


def assert_equal_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-6 * max(1e-3, np.abs(value).max()), name


@pytest.mark.parametrize("is_real", [True, False])
def test_heads_one_by_one_get_the_gradients_of_all_heads_at_once(student, run, noisy, is_real):
    heads = Discriminator(student, seed=5)
    assert len(heads.heads) == 5
    with paddle.no_grad():
        features = features_of(student, run, noisy)
    losses = [discriminator_hinge(head(f), is_real) for head, f in zip(heads.heads, features, strict=True)]
    together = sum(losses) / len(losses)
    together.backward()
    wanted = gradients(heads)
    heads.clear_gradients()
    one_by_one = heads.train_heads(student, lambda: run(noisy), is_real)
    assert float(one_by_one) == pytest.approx(float(together), rel=1e-6)
    assert_equal_gradients(gradients(heads), wanted)
    assert all(p.grad is None for name, p in student.named_parameters()) and noisy.grad is None
    heads.train_heads(student, lambda: run(noisy), is_real, weight=0.5)
    assert_equal_gradients(gradients(heads), {name: 1.5 * value for name, value in wanted.items()})


def test_the_generators_gradient_is_that_of_all_heads_at_once_and_heads_get_none(student, run, noisy):
    heads = Discriminator(student, seed=5)
    features = features_of(student, run, noisy)
    together = sum(generator_hinge(h(f)) for h, f in zip(heads.heads, features, strict=True)) / 5
    (2 * together).backward()
    wanted = noisy.grad.numpy().copy()
    noisy.clear_gradient(False)
    heads.clear_gradients()
    noisy.grad = None
    loss = heads.generator_loss(student, lambda: run(noisy))
    (2 * loss).backward()
    assert float(loss) == pytest.approx(float(together), rel=1e-6)
    np.testing.assert_allclose(noisy.grad.numpy(), wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    assert all(p.grad is None or not np.abs(p.grad.numpy()).any() for p in heads.parameters())
    assert all(not p.stop_gradient for p in heads.parameters())


def test_training_heads_keeps_nothing_of_the_transformers_pass(student, run, noisy):
    heads = Discriminator(student)
    head_alone = count_saved_tensors()
    with head_alone:
        for head in heads.heads:
            head(paddle.ones([3, TOKENS, 16]))
    with count_saved_tensors() as saved:
        heads.train_heads(student, lambda: run(noisy), True)
    assert saved.bytes_kept < 1.5 * head_alone.bytes_kept


def test_published_heads_stand_on_every_other_block_29_of_57(student, build_flux):
    assert len(Discriminator(student, blocks="published").heads) == 3
    assert len(Discriminator(build_flux(double=19, single=38), blocks="published").heads) == 29
    assert len(Discriminator(build_flux(double=19, single=38)).heads) == 57


def test_group_norm_is_that_of_a_convolution_over_tokens():
    norm, reference = GroupNorm(64), paddle.nn.GroupNorm(32, 64, epsilon=1e-5)
    rng = np.random.default_rng(0)
    for layer in (norm, reference):
        layer.weight.set_value(np.linspace(0.5, 1.5, 64).astype("float32"))
        layer.bias.set_value(np.linspace(-1, 1, 64).astype("float32"))
    x = paddle.to_tensor(rng.standard_normal([2, 9, 64]) * 3 + 1, "float32")
    wanted = reference(x.transpose([0, 2, 1]).reshape([2, 64, 3, 3])).reshape([2, 64, 9]).transpose([0, 2, 1])
    np.testing.assert_allclose(norm(x).numpy(), wanted.numpy(), atol=1e-5)


def test_a_head_of_fluxs_width_has_the_parameters_of_the_public_one():
    def parameters(dim):
        return sum(p.size for p in Head(dim, 0).parameters())

    assert parameters(64) == 2 * (64 * 64 + 64 + 2 * 64) + 64 + 1
    assert 57 * (2 * (3072 * 3072 + 3072 + 2 * 3072) + 3072 + 1) == 1_077_064_761


def test_a_head_is_two_layers_with_a_residual_around_the_second():
    head = Head(32, 0)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([1, 3, 32]), "float32")
    first = F.leaky_relu(head.norm1(F.linear(x, head.conv1.weight, head.conv1.bias)), 0.01)
    second = F.leaky_relu(head.norm2(F.linear(first, head.conv2.weight, head.conv2.bias)), 0.01)
    wanted = F.linear(first + second, head.conv_out.weight, head.conv_out.bias)
    np.testing.assert_allclose(head(x).numpy(), wanted.numpy(), atol=1e-6)
