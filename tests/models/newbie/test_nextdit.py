from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.errors import ConfigError
from ppcoat.lora import inject_lora
from ppcoat.lora.layer import target_paths
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.models.newbie.nextdit import NextDiT_CLIP, caption_lengths, token_positions
from ppcoat.nn import attention
from ppcoat.nn.convert import replace_linear_with_fp8

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5
# The target modules of the original trainer's default and of its two other injection strategies.
TARGETS = [
    "attention.qkv",
    "attention.out",
    "feed_forward.w2",
    "time_text_embed.1",
    "clip_text_pooled_proj.1",
]
FEW_TARGETS = ["attention.qkv", "attention.out", "time_text_embed.1"]
MANY_TARGETS = [*TARGETS, "feed_forward.w1", "feed_forward.w3", "adaLN_modulation.1", "cap_embedder.1"]


@pytest.fixture(scope="module")
def model():
    return load_nextdit(FOLDER / "transformer", "float32")


def inputs(refs, rows=slice(0, 2)):
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    return [paddle.to_tensor(refs[name][rows]) for name in names]


def close(tensor, reference, tolerance=TOLERANCE):
    np.testing.assert_allclose(tensor.numpy(), reference, rtol=0, atol=tolerance)


def gradients(model, refs):
    x, t, cap_feats, cap_mask, clip = inputs(refs)
    for tensor in (x, cap_feats, clip):
        tensor.stop_gradient = False
    model.clear_gradients()
    loss = model(x, t, cap_feats, cap_mask, clip).square().mean()
    loss.backward()
    return loss, x.grad, cap_feats.grad, clip.grad


def test_batch_with_mixed_caption_lengths(model, refs):
    assert refs["gemma_mask"][0].sum() != refs["gemma_mask"][1].sum()
    close(model(*inputs(refs)), refs["dit_b2_out"])


def test_one_sample_without_padding_and_without_pooled_text(model, refs):
    x, t = (paddle.to_tensor(refs[name][:1]) for name in ("dit_x", "dit_t"))
    valid = int(refs["gemma_one_mask"].sum())
    cap_feats = paddle.to_tensor(refs["gemma_one_all_hidden"][-2:-1, :valid])
    mask = paddle.ones([1, valid], dtype="int64")
    close(model(x, t, cap_feats, mask, paddle.to_tensor(refs["jina_pooled"][1:2])), refs["dit_b1_out"])
    close(model(x, t, cap_feats, mask), refs["dit_noclip_out"])


def test_mixed_sizes_and_the_same_samples_alone(model, refs):
    x, t, cap_feats, mask, clip = inputs(refs)
    sizes = [x[0], paddle.to_tensor(refs["dit_x_second_size"])]
    together = model(sizes, t, cap_feats, mask, clip)
    for i, (out, latents) in enumerate(zip(together, sizes, strict=True)):
        close(out, refs[f"dit_list_out_{i}"])
        row = slice(i, i + 1)
        alone = model(latents.unsqueeze(0), t[row], cap_feats[row], mask[row], clip[row])
        close(alone[0], out.numpy(), 5e-6)


def test_padding_holds_nothing(model, refs):
    x, t, cap_feats, mask, clip = inputs(refs)
    noise = paddle.full([2, 8, cap_feats.shape[2]], 1e3)
    padded = paddle.concat([cap_feats * mask.astype("float32").unsqueeze(-1), noise], axis=1)
    longer = paddle.concat([mask, paddle.zeros([2, 8], dtype="int64")], axis=1)
    close(model(x, t, padded, longer, clip), refs["dit_b2_out"])


def test_every_step_on_the_way(model, refs):
    seen = {}

    def keep_output(name):
        return lambda layer, args, out: seen.__setitem__(name, out)

    def keep_input(name):
        return lambda layer, args: seen.__setitem__(name, args[0])

    hooks = [model.x_embedder.register_forward_pre_hook(keep_input("patches"))]
    hooks.append(model.layers[0].register_forward_pre_hook(keep_input("joint_input")))
    for name, layer in {
        "t_emb": model.t_embedder,
        "adaln_input": model.time_text_embed,
        "cap_embed": model.cap_embedder,
        "context_refined": model.context_refiner[1],
        "noise_refined": model.noise_refiner[1],
        "layer0_out": model.layers[0],
        "layer1_out": model.layers[1],
        "final_tokens": model.final_layer,
    }.items():
        hooks.append(layer.register_forward_post_hook(keep_output(name)))
    model(*inputs(refs))
    for hook in hooks:
        hook.remove()
    for i, length in enumerate(refs["gemma_mask"][:2].sum(axis=1)):
        rows = dict.fromkeys(("joint_input", "layer0_out", "layer1_out", "final_tokens"), length + 24)
        rows |= {"cap_embed": length, "context_refined": length}  # the rest is padding: don't-care
        for name, tensor in seen.items():
            ours, theirs = (x[i][: rows.get(name)] for x in (tensor.numpy(), refs[f"dit_b2_{name}"]))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=name)
    assert len(seen) == 10


def test_a_fused_kernel_sees_each_sample_without_a_mask(model, refs, monkeypatch):
    """As on a card, where attention is not written out: the reference's output, and the gradients of the form
    with a bias of the keys."""
    seen, attend = [], paddle.nn.functional.scaled_dot_product_attention

    def fused(q, k, v, attn_mask=None):
        assert attn_mask is None and q.shape == k.shape == v.shape
        seen.append(q.shape[:2])
        return attend(q, k, v)

    _, *wanted = gradients(model, refs)
    monkeypatch.setattr(paddle.nn.functional, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(attention, "attention_kernel", lambda q, bias=None: attention.FLASH)
    close(model(*inputs(refs)), refs["dit_b2_out"])
    lengths, picture = refs["gemma_mask"][:2].sum(axis=1), 24
    per_block = len(seen) - 2 * len(model.context_refiner) - len(model.noise_refiner)
    assert per_block == 2 * len(model.layers)  # pictures are of one size: they go together
    assert seen[: len(lengths)] == [[1, n] for n in lengths]
    assert seen[-len(lengths) :] == [[1, n + picture] for n in lengths]
    _, *found = gradients(model, refs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 1e-5
        close(ours, theirs.numpy(), 1e-7)


def test_positions_start_the_image_right_after_its_own_caption(refs):
    lengths = refs["gemma_mask"][:2].sum(axis=1).tolist()
    captions, images, both = token_positions(lengths, [(6, 4), (6, 4)])
    np.testing.assert_array_equal(both, refs["dit_b2_position_ids"])
    np.testing.assert_array_equal(images[1, 5], [lengths[1], 1, 1])
    np.testing.assert_array_equal(captions[0, lengths[0] - 1], [lengths[0] - 1, 0, 0])
    assert not captions[0, lengths[0] :].any()


def test_gradients_are_those_of_the_original(model, refs):
    model.train()
    loss, *of_inputs = gradients(model, refs)
    model.eval()
    assert abs(float(loss) - refs["grad_loss"]) < TOLERANCE
    for gradient, name in zip(of_inputs, ("x", "cap_feats", "clip"), strict=True):
        close(gradient, refs[f"grad_{name}"], 1e-7)
    parameters = dict(model.named_parameters())
    wanted = {name[11:]: value for name, value in refs.items() if name.startswith("grad_param/")}
    assert len(wanted) == 17
    for name, value in wanted.items():
        gradient = parameters[name].grad.numpy()
        layout = gradient.T if gradient.ndim == 2 else gradient
        np.testing.assert_allclose(layout, value, rtol=0, atol=1e-6, err_msg=name)
    assert parameters["norm_final.weight"].grad is None


def test_checkpointing_gives_the_same_gradients_and_runs_layers_twice(model, refs):
    model.train()
    plain = [tensor.numpy() for tensor in gradients(model, refs)]
    calls = []
    hooks = [
        blocks[0].register_forward_pre_hook(lambda *_, kind=kind: calls.append(kind))
        for kind, blocks in (("layers", model.layers), ("refiner", model.noise_refiner))
    ]
    model.enable_gradient_checkpointing()
    again = [tensor.numpy() for tensor in gradients(model, refs)]
    model.disable_gradient_checkpointing()
    model.eval()
    for hook in hooks:
        hook.remove()
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)  # summed in another order
    assert sorted(calls) == ["layers", "layers", "refiner"]


def big_model():
    with paddle.LazyGuard():  # shapes without memory: the real model would take 14 GB
        return NextDiT_CLIP()


def test_newbie_3b_has_its_tensors_and_parameters():
    shapes = {name: tuple(parameter.shape) for name, parameter in big_model().state_dict().items()}
    assert len(shapes) == 535
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 3_486_636_096
    assert shapes["layers.35.attention.qkv.weight"] == (2304, 3840)
    assert shapes["layers.0.adaLN_modulation.1.weight"] == (1024, 9216)
    assert shapes["noise_refiner.1.feed_forward.w2.weight"] == (9216, 2304)
    assert shapes["cap_embedder.1.weight"] == (2560, 2304)
    assert shapes["time_text_embed.1.weight"] == (2048, 1024)
    assert shapes["final_layer.linear.weight"] == (2304, 64)
    assert "context_refiner.0.adaLN_modulation.1.weight" not in shapes


@pytest.mark.parametrize(("targets", "count"), [(TARGETS, 122), (FEW_TARGETS, 81), (MANY_TARGETS, 242)])
def test_lora_targets_of_the_original_trainer_hit_as_many_linears(targets, count):
    assert len(target_paths(big_model(), targets)) == count


def test_lora_of_the_original_gives_its_output_and_gradients(refs):
    model = load_nextdit(FOLDER / "transformer", "float32")
    layers = inject_lora(model, rank=4, alpha=8, targets=TARGETS)
    assert len(layers) == refs["lora_n_modules"]
    close(model(*inputs(refs)), refs["dit_b2_out"])  # it starts as nothing
    for key, value in load_file(FOLDER / "lora" / "adapter_model.safetensors").items():
        path, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        getattr(layers[path], factor).set_value(value.T)
    model.train()
    out = model(*inputs(refs))
    close(out, refs["lora_b2_out"])
    assert np.abs(refs["lora_b2_out"] - refs["dit_b2_out"]).max() > 1e-2
    out.square().mean().backward()
    wanted = {name.removeprefix("lora_grad/"): value for name, value in refs.items() if "lora_grad/" in name}
    assert wanted
    for key, value in wanted.items():
        path, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        gradient = getattr(layers[path], factor).grad.numpy().T
        np.testing.assert_allclose(gradient, value, rtol=0, atol=1e-6, err_msg=key)
    replace_linear_with_fp8(model)
    close(model(*inputs(refs)), refs["lora_b2_out"])


def small(**sizes):
    options = {
        "dim": 16,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 1,
        "multiple_of": 8,
    }
    options |= {"cap_feat_dim": 4, "clip_text_dim": 4, "axes_dims": [2, 2, 4], "axes_lens": [8, 3, 4]}
    return NextDiT_CLIP(**{**options, **sizes})


def run_small(latents=(16, 4, 4), tokens=3, mask=None):
    mask = [1] * tokens if mask is None else mask
    x, cap_feats = paddle.zeros([1, *latents]), paddle.zeros([1, len(mask), 4])
    return small()(x, paddle.zeros([1]), cap_feats, paddle.to_tensor([mask]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_small((16, 5, 4)), "multiples of 2"),
        (lambda: run_small((16, 8, 4)), "position 3 .rows. is beyond"),
        (lambda: run_small((16, 4, 10)), "position 4 .columns. is beyond"),
        (lambda: run_small(tokens=8), "position 8 .caption tokens. is beyond"),
        (lambda: run_small(mask=[0, 1, 1]), "pad captions on the right"),
        (lambda: run_small(mask=[0, 0]), "without tokens"),
        (lambda: small(n_heads=3), "n_heads 3"),
        (lambda: small(n_kv_heads=4), "n_kv_heads 4"),
        (lambda: small(axes_dims=[2, 2, 2]), "sum to.*8"),
        (lambda: small(axes_dims=[1, 3, 4]), "even"),
        (lambda: small(qk_norm=False), "qk_norm"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_the_last_positions_of_the_tables_can_be_used():
    assert run_small((16, 6, 8), tokens=7).shape == [1, 16, 6, 8]


def test_caption_lengths_of_boolean_and_integer_masks():
    mask = paddle.to_tensor([[1, 1, 0], [1, 1, 1]])
    assert caption_lengths(mask) == caption_lengths(mask.astype("bool")) == [2, 3]
