"""Saved-tensor contexts: what is packed, what is counted, how far gradients move."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import ppcoat.nn.saved_tensors as saved_tensors
from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3
from ppcoat.nn.saved_forms import PlainSaved, save_fp8
from ppcoat.nn.saved_tensors import count_saved_tensors, fp8_saved_tensors, saved_as_they_are, saver


def tensor(seed: int, shape: list[int], trainable: bool = True) -> paddle.Tensor:
    x = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))
    x.stop_gradient = not trainable
    return x


@pytest.fixture
def packed_calls(monkeypatch) -> list:
    """Grows by one each time that a tensor is packed."""
    calls = []
    monkeypatch.setattr(saved_tensors, "save_fp8", lambda *args: calls.append(1) or save_fp8(*args))
    return calls


def mlp() -> nn.Layer:
    paddle.seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 256), nn.Silu())


def gradients(model: nn.Layer, x: paddle.Tensor, context) -> tuple[float, list[np.ndarray]]:
    x.clear_gradient()
    model.clear_gradients()
    with context:
        loss = paddle.square(model(x)).sum()
    loss.backward()
    return float(loss), [x.grad.numpy(), *(param.grad.numpy() for param in model.parameters())]


def test_forward_is_exact_and_gradients_are_close():
    model, x = mlp(), tensor(1, [64, 256])
    loss, exact = gradients(model, x, count_saved_tensors())
    packed_loss, packed = gradients(model, x, fp8_saved_tensors())
    assert packed_loss == loss
    for want, got in zip(exact, packed, strict=True):
        error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        assert 0 < error < 0.05


def test_bytes_of_a_known_graph():
    """gelu keeps its input, tanh its output: 2 tensors of 64 x 256; packed: one byte each plus 4 / 128."""
    x = tensor(2, [64, 256])
    with count_saved_tensors() as plain:
        F.gelu(x).tanh()
    assert plain.bytes_kept == plain.bytes_unpacked == 2 * 64 * 256 * 4
    with fp8_saved_tensors() as packed:
        F.gelu(x).tanh()
    assert packed.bytes_unpacked == plain.bytes_kept
    assert packed.bytes_kept == 2 * (64 * 256 + 64 * 2 * 4)


def test_a_tensor_that_several_operators_keep_is_packed_and_counted_once():
    x = tensor(3, [64, 256])
    for context, each in (
        (count_saved_tensors(), 64 * 256 * 4),
        (fp8_saved_tensors(), 64 * 256 + 64 * 2 * 4),
    ):
        with context as saved:
            views = x.reshape([4, 16, 256])
            loss = F.gelu(x).sum() + F.gelu(x).sum() + F.gelu(views).sum()
        assert saved.bytes_kept == each
        loss.backward()
        x.clear_gradient()


def test_views_of_one_packed_copy_give_back_their_own_shape():
    x = tensor(4, [64, 256])
    with fp8_saved_tensors():
        loss = F.gelu(x).sum() + paddle.square(x.reshape([256, 64])).sum()
    loss.backward()
    packed = x.grad.numpy()
    x.clear_gradient()
    (F.gelu(x).sum() + paddle.square(x.reshape([256, 64])).sum()).backward()
    assert np.abs(packed - x.grad.numpy()).max() < 2 * np.abs(x.numpy()).max() * 2**-4


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 1, 0, 2], [0, 1, 3, 2]])
def test_transposed_views_come_back_in_their_own_memory_order(order, packed_calls):
    x = tensor(5, [4, 16, 8, 32])

    def gradient(context) -> np.ndarray:
        x.clear_gradient()
        with context:
            loss = F.gelu(x).sum() + (paddle.square(x.transpose(order)) * weights).sum()
        loss.backward()
        return x.grad.numpy()

    weights = tensor(50, [x.shape[axis] for axis in order], trainable=False)
    exact = gradient(count_saved_tensors())
    packed = gradient(fp8_saved_tensors())
    assert np.sqrt(np.mean((packed - exact) ** 2) / np.mean(exact**2)) < 0.05
    assert len(packed_calls) == 2  # x with its view, and the square that `multiply` keeps


def test_slices_with_gaps_stay_exact():
    x = tensor(51, [64, 256])
    with fp8_saved_tensors():
        loss = paddle.square(x[:, 10:200]).sum()
    loss.backward()
    np.testing.assert_allclose(x.grad.numpy()[:, 10:200], 2 * x.numpy()[:, 10:200], rtol=1e-6)


def test_memory_that_is_reused_is_packed_anew(packed_calls):
    """Temporaries die and their memory may come back with other values: a packed copy must hold its own."""
    x = tensor(6, [64, 128])
    with fp8_saved_tensors() as saved, paddle.no_grad():
        for scale in range(1, 30):
            temporary = x * float(scale)
            decoded = saved.save_input(temporary, E4M3, 128).unpack()
            assert float((decoded - temporary).abs().max()) <= float(temporary.abs().max()) / 16
            del temporary, decoded
    assert len(packed_calls) == 29


def test_in_place_change_is_packed_anew(packed_calls):
    y = tensor(7, [64, 128]) * 1.0
    with fp8_saved_tensors():
        F.gelu(y)
        y.scale_(2.0)
        F.gelu(y)
    assert len(packed_calls) == 2


def test_parameters_constants_and_small_tensors_stay_exact(packed_calls):
    weight = paddle.create_parameter([256, 256], "float32")
    table, x, small = tensor(8, [64, 256], trainable=False), tensor(9, [64, 256]), tensor(10, [8])
    with fp8_saved_tensors():
        y = x.matmul(weight) * table
        small.tanh()
    # matmul keeps x (packed) and the weight (the model's); multiply keeps the table and x W (packed); tanh 8
    # numbers
    assert len(packed_calls) <= 2
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), (table @ weight.t()).numpy(), rtol=1e-5, atol=1e-5)


def test_backward_inside_the_context_works_and_nothing_leaks_out():
    x = tensor(11, [64, 256])
    with fp8_saved_tensors() as saved:
        F.gelu(x).sum().backward()
    kept = saved.bytes_kept
    F.gelu(x).sum().backward()
    assert saved.bytes_kept == kept
    with saved:
        assert saved.bytes_kept == 0


def test_context_leaves_cleanly_after_an_error():
    with pytest.raises(RuntimeError, match="boom"), fp8_saved_tensors():
        raise RuntimeError("boom")
    with fp8_saved_tensors() as saved:
        F.gelu(tensor(12, [64, 256])).sum()
    assert saved.bytes_kept == 64 * 256 + 64 * 2 * 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fp8_saved_tensors("coats"), "coats"),
        (lambda: fp8_saved_tensors(group_size=0), "group_size"),
        (lambda: fp8_saved_tensors(nonlinear_granularity="per_row"), "per_row"),
        (lambda: fp8_saved_tensors(fmt="int8"), "int8"),
        (lambda: fp8_saved_tensors(min_size=-1), "min_size"),
    ],
)
def test_wrong_settings_are_named(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_contexts_do_not_nest():
    with fp8_saved_tensors(), pytest.raises(ConfigError, match="nest"), count_saved_tensors():
        pass
    with count_saved_tensors():
        pass


def test_bytes_in_bfloat16_of_what_a_float32_run_keeps():
    """gelu keeps x [64, 256]; multiply keeps x and a constant table, which is float32 on any device."""
    x, table = tensor(15, [64, 256]), tensor(16, [64, 256], trainable=False)
    with count_saved_tensors() as saved:
        F.gelu(x)
    assert saved.bytes_kept == 2 * saved.bytes_kept_bf16 == 64 * 256 * 4
    with count_saved_tensors() as saved:
        x * table
    assert saved.bytes_kept == 2 * 64 * 256 * 4 and saved.bytes_kept_bf16 == 64 * 256 * (2 + 4)
    with fp8_saved_tensors() as saved:
        F.gelu(x)
    assert saved.bytes_kept == saved.bytes_kept_bf16


def test_within_saved_as_they_are_nothing_is_packed_but_all_is_counted(packed_calls):
    x = tensor(17, [64, 256])
    with fp8_saved_tensors() as saved:
        with saved_as_they_are():
            loss = F.gelu(x).sum()
        assert not packed_calls and saved.bytes_kept == 64 * 256 * 4
        F.gelu(x * 2)
    assert len(packed_calls) == 1
    loss.backward()
    exact = x.grad.numpy()
    x.clear_gradient()
    F.gelu(x).sum().backward()
    np.testing.assert_array_equal(exact, x.grad.numpy())


def test_the_active_saver_counts_what_it_is_given():
    held = [PlainSaved(tensor(18, [4, 8])), PlainSaved(tensor(19, [4, 1]), statistic=True)]
    for each in held:
        saver().count(each)  # of no context
    with count_saved_tensors() as saved:
        assert saver() is saved
        for each in held:
            assert saver().count(each) is each
    assert (saved.bytes_kept, saved.bytes_kept_bf16) == (32 * 4 + 4 * 4, 32 * 2 + 4 * 4)
    assert saver() is not saved


def test_a_saver_saves_each_tensor_once_in_each_form_and_parameters_uncounted(packed_calls):
    x, weight = tensor(20, [64, 256]), paddle.create_parameter([64, 256], "float32")
    with fp8_saved_tensors() as saved:
        first = saver().save(x)
        shared = saver().save_input(x, E4M3, 128)
        assert saver().save(x) is shared.saved is first
        assert saver().save_input(x, None, None) is shared  # whoever has no format takes the policy's
        view = saver().save_input(x.reshape([4, 16, 256]), E4M3, 128)
        assert view.unpack().shape == [4, 16, 256] and view.saved.codes.data_ptr() == first.codes.data_ptr()
        assert saver().save_input(x, E4M3, None).saved is not first
        assert len(packed_calls) == 2 and saved.bytes_kept == 2 * 64 * 256 + 64 * 2 * 4 + 4
        plain = saver().save_plain(x)
        assert saver().save_plain(x) is plain and saver().save_plain(weight).unpack().shape == weight.shape
        assert saved.bytes_kept == 6 * 64 * 256 + 64 * 2 * 4 + 4


@pytest.mark.parametrize("settings", [{}, {"fp8_checkpoints": True}])
@pytest.mark.parametrize("policy", ["none", "coat"])
def test_checkpoints_are_in_fp8_where_that_is_wanted(policy, settings):
    with fp8_saved_tensors(policy, **settings) as saved:
        saver().save_checkpoint(tensor(21, [1, 64, 256]))
    assert saved.bytes_kept == (64 * 256 + 64 * 2 * 4 if settings else 64 * 256 * 4)


def test_an_offered_result_is_not_saved_and_forgotten_with_its_tensor_or_the_context():
    """Neither by hooks, also of a view of it, nor by who asks for it."""
    x = tensor(22, [64, 256])
    with fp8_saved_tensors() as saved:
        y = (x * 2.0).detach()
        y.stop_gradient = False
        saved.offer(y, lambda: paddle.full_like(x, 3.0))
        loss = F.gelu(y).sum() + paddle.square(y.reshape([256, 64])).sum()
        assert saver().save_input(y, E4M3, 128).saved is saved.offered(y)
        assert saved.bytes_kept == 0
        loss.backward()
        other = y * 1.0
        saved.offer(other, lambda: x)
        address = other.data_ptr()
        del other
        again = y * 1.0
        assert again.data_ptr() == address and saved.offered(again) is None
        saved.offer(again, lambda: x)
        again.scale_(2.0)
        assert saved.offered(again) is None
        saved.offer(x, lambda: x)
    slope = 6.0 + (gelu_at(3.0 + 1e-3) - gelu_at(3.0 - 1e-3)) / 2e-3
    np.testing.assert_allclose(y.grad.numpy(), np.full([64, 256], slope), rtol=1e-3)
    with saved:
        assert saved.offered(x) is None


def gelu_at(value: float) -> float:
    return float(F.gelu(paddle.to_tensor(value, "float64")))


@pytest.mark.parametrize("context", [count_saved_tensors, fp8_saved_tensors], ids=["counted", "packed"])
def test_nothing_is_held_after_backward(context):
    """softmax keeps its own result: a graph that held that with its history would hold itself for ever."""
    x = tensor(0, [64, 1024])

    def step():
        with context():
            loss = F.softmax(x.exp() * 0.1).square().sum() + F.softmax(x[:1, :8]).square().sum()
        loss.backward()
        x.clear_gradient()

    def allocated():
        return paddle.base.core.host_memory_stat_current_value("Allocated", 0)

    step()
    before = allocated()
    for _ in range(5):
        step()
    assert allocated() - before < 64
