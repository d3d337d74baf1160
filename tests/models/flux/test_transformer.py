import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.flux import ATTENTION_AND_MLP, MODULATION
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import load_transformer

TOLERANCE = 2e-5


def inputs(refs):
    names = ("tr_h", "tr_enc", "tr_pool", "tr_t", "tr_img_ids", "tr_txt_ids", "tr_g")
    return [paddle.to_tensor(refs[name]) for name in names]


def loss_and_gradients(model, refs):
    hidden, *rest = inputs(refs)
    hidden.stop_gradient = False
    model.clear_gradients()
    sample = model(hidden, *rest).sample
    loss = sample.square().mean()
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return sample.numpy(), float(loss), hidden.grad.numpy(), gradients


@pytest.fixture(scope="module")
def model(fp32_folder):
    return load_transformer(fp32_folder / "transformer", "float32")


@pytest.fixture(scope="module")
def computed(model, torch_refs):
    model.train()
    return loss_and_gradients(model, torch_refs)


def test_output_loss_and_input_gradient_are_those_of_diffusers(computed, torch_refs):
    sample, loss, grad_hidden, _ = computed
    np.testing.assert_allclose(sample, torch_refs["tr_out"], rtol=0, atol=TOLERANCE)
    assert abs(loss - torch_refs["tr_loss"]) < TOLERANCE
    np.testing.assert_allclose(grad_hidden, torch_refs["tr_grad_h"], rtol=0, atol=TOLERANCE * 1e-2)


def test_every_parameter_gradient_is_that_of_diffusers(computed, torch_refs):
    gradients = computed[3]
    wanted = {name[len("grad/") :]: g for name, g in torch_refs.items() if name.startswith("grad/")}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        layout = gradient.T if gradient.ndim == 2 else gradient  # torch keeps [out, in]
        np.testing.assert_allclose(layout, wanted[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_checkpointing_gives_the_same_gradients(model, computed, torch_refs):
    model.enable_gradient_checkpointing()
    sample, loss, grad_hidden, gradients = loss_and_gradients(model, torch_refs)
    model.disable_gradient_checkpointing()
    np.testing.assert_array_equal(sample, computed[0])
    np.testing.assert_array_equal(grad_hidden, computed[2])
    for name, gradient in gradients.items():
        # a vector that all blocks read has its gradients summed in another order
        np.testing.assert_allclose(gradient, computed[3][name], rtol=0, atol=1e-8, err_msg=name)


def test_checkpointing_runs_each_block_twice(model, torch_refs):
    calls = []
    hook = model.single_transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    loss_and_gradients(model, torch_refs)
    model.disable_gradient_checkpointing()
    hook.remove()
    assert len(calls) == 2


def test_flux_dev_has_its_tensors_and_parameters():
    with paddle.LazyGuard():  # shapes without memory: the real model would take 48 GB
        model = FluxTransformer2DModel(guidance_embeds=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    assert len(shapes) == 1160
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 11_901_408_320
    assert shapes["transformer_blocks.18.norm1_context.linear.weight"] == (3072, 18432)
    assert shapes["transformer_blocks.0.ff_context.net.2.weight"] == (12288, 3072)
    assert shapes["single_transformer_blocks.37.proj_out.weight"] == (15360, 3072)
    assert shapes["time_text_embed.guidance_embedder.linear_1.weight"] == (256, 3072)


def tiny_inputs(tokens=4):
    paddle.seed(0)
    ids = paddle.to_tensor([[0.0, i // 2, i % 2] for i in range(tokens)])
    return [
        paddle.randn([1, tokens, 4]), paddle.randn([1, 3, 12]), paddle.randn([1, 6]), paddle.to_tensor([0.5]),
        ids, paddle.zeros([3, 3]),
    ]  # fmt: skip


class DoubledByAdapter(paddle.nn.Linear):
    """Adds scale_multiplier times its own output: as plain an adapter as can be."""

    scale_multiplier = 0.5

    def forward(self, x):
        return super().forward(x) * (1 + self.scale_multiplier)


def test_scale_multiplies_adapters_for_one_call_also_in_checkpointed_backward(build_flux):
    model = build_flux()
    adapter = DoubledByAdapter(16, 16)
    model.transformer_blocks[0].attn.to_v = adapter  # not q or k, whose size the norm takes away
    args = tiny_inputs()

    def run(scale_multiplier, kwargs):
        adapter.scale_multiplier = scale_multiplier
        model.clear_gradients()
        sample = model(*args, joint_attention_kwargs=kwargs).sample
        sample.square().mean().backward()
        assert adapter.scale_multiplier == scale_multiplier
        return np.concatenate([sample.numpy().ravel(), adapter.weight.grad.numpy().ravel()])

    wanted = run(1.5, None)
    assert np.abs(run(0.5, None) - wanted).max() > 1e-5
    np.testing.assert_array_equal(run(0.5, {"scale": 3.0}), wanted)
    model.enable_gradient_checkpointing()
    np.testing.assert_array_equal(run(0.5, {"scale": 3.0}), wanted)


def test_controlnet_samples_are_added_after_their_blocks(build_flux):
    model = build_flux().eval()
    args = tiny_inputs()
    sample = paddle.randn([1, 4, 16])
    plain = model(*args).sample
    # One sample for two blocks is added after both: the same as adding it to what each block returns.
    hooks = [
        block.register_forward_post_hook(lambda _, __, out: (out[0] + sample, out[1]))
        for block in model.transformer_blocks
    ]
    wanted = model(*args).sample.numpy()
    for hook in hooks:
        hook.remove()
    given = model(*args, controlnet_block_samples=[sample]).sample.numpy()
    np.testing.assert_allclose(given, wanted, atol=1e-6)
    assert np.abs(wanted - plain.numpy()).max() > 1e-3
    single = model(*args, controlnet_single_block_samples=[sample, sample]).sample.numpy()
    assert np.abs(single - plain.numpy()).max() > 1e-3


def test_batched_ids_and_tuple_output(build_flux):
    model = build_flux().eval()
    args = tiny_inputs()
    sample = model(*args).sample.numpy()
    batched = [*args[:4], args[4].unsqueeze(0), args[5].unsqueeze(0)]
    (again,) = model(*batched, return_dict=False)
    np.testing.assert_array_equal(again.numpy(), sample)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a, build: m(*a, joint_attention_kwargs={"scael": 1.0}), "scael"),
        (lambda m, a, build: m(*a, guidance=paddle.ones([1])), "guidance_embeds=False"),
        (lambda m, a, build: build(axes=(2, 2, 2)), "sum to.*8"),
        (lambda m, a, build: build(axes=(1, 3, 4)), "even"),
    ],
)
def test_mistakes_are_named(build_flux, call, message):
    with pytest.raises(ConfigError, match=message):
        call(build_flux(), tiny_inputs(), build_flux)


def test_the_names_of_the_linears_are_those_of_the_blocks(model):
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        (found, *_) = getattr(model, blocks)
        linears = [name for name, layer in found.named_sublayers() if isinstance(layer, paddle.nn.Linear)]
        named = [part for table in (ATTENTION_AND_MLP, MODULATION) for part in table[blocks].values()]
        assert sorted(linears) == sorted(name for parts in named for name in parts)
