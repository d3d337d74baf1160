"""A run that starts from a file: its delta-W are what the program that wrote it means, whatever the run's own
rank and alpha are, or what was lost is told; what a run does not train is named."""

import json
import shutil
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ppcoat.coat import COATTrainer, prepare
from ppcoat.config.load import load_config
from ppcoat.config.newbie import load_newbie_config
from ppcoat.errors import ConfigError
from ppcoat.lora import adapter_layers, read_lora_file
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_transformer
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.train import run
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.flux import FluxSpec
from ppcoat.train.newbie import NewbieSpec
from ppcoat.train.run import train_lora
from ppcoat.train.start import adapter_start

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS, NEWBIE = FIXTURES / "adapters", FIXTURES / "tiny_newbie"
# The Linears of the truth `split`: FLUX's usual ones and one modulation.
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"),
    *("net.0.proj", "proj_mlp", "proj_out", "norm.linear"),
]
SPELLINGS = [
    *("split_alpha_keys", "split_bare", "split_default_infix", "split_diffusers", "split_diffusers_header"),
    *("split_kohya", "split_onetrainer", "split_peft"),
]
KEY = "network.pretrained_lora_path"


def file_of(name):
    return ADAPTERS / name if (ADAPTERS / name).exists() else ADAPTERS / f"{name}.safetensors"


def started(config, spec=None):
    """({path: delta-W [out, in] that the first values of a run's LoRAs make, float64}, what is told)."""
    spec = spec or FluxSpec()
    start = adapter_start(config, spec.unfilled)
    by = config.network.linear_alpha / config.network.linear
    found = {
        path: by * (each["lora_A"].astype("float64") @ each["lora_B"]).T
        for path, each in start.factors.items()
    }
    return found, start.told


def truth(group):
    with np.load(ADAPTERS / "truth.npz") as arrays:
        return {key.removeprefix(f"{group}/"): arrays[key] for key in arrays if key.startswith(f"{group}/")}


def of_file(path, paths=None):
    modules = read_lora_file(path, paths).modules
    return {path: each.scale * each.b.astype("float64") @ each.a for path, each in modules.items()}


@pytest.fixture
def config_of(make_config):
    """config_of(file, "network.linear=4", ...): a run on TARGETS that starts from it."""
    return lambda file, *more: make_config(f"{KEY}={file}", f"network.targets={json.dumps(TARGETS)}", *more)


@pytest.mark.parametrize(("name", "rank"), zip(SPELLINGS, cycle((4, 6)), strict=False))
def test_every_spelling_starts_at_the_delta_of_its_program(config_of, name, rank):
    """With a scale of the run's own, 3 / rank, and in a larger rank, too."""
    found, told = started(config_of(file_of(name), f"network.linear={rank}", "network.linear_alpha=3"))
    want = truth("split")
    assert {f"{path}.weight" for path in found} == want.keys()
    for path, delta in found.items():
        np.testing.assert_allclose(delta[::2], want[f"{path}.weight"], atol=1e-6, err_msg=path)
    assert "LoRA on 14 layers; each delta-W as it is there" in told and "more layers of this run" in told


def test_a_smaller_rank_is_the_best_one_and_says_what_it_lost(config_of):
    found, told = started(config_of(file_of("split_kohya"), "network.linear=3", "network.linear_alpha=5"))
    whole = of_file(file_of("split_kohya"))
    missed = total = 0.0
    for path, delta in found.items():
        u, s, v = np.linalg.svd(whole[path], full_matrices=False)
        np.testing.assert_allclose(delta, (u[:, :3] * s[:3]) @ v[:3], atol=1e-5 * s[0], err_msg=path)
        missed, total = missed + np.sum(s[3:] ** 2), total + np.sum(s**2)
    assert (
        f"rank 4 cut to 3 on 14 layers: relative delta-W error {np.sqrt(missed / total):.2g} overall" in told
    )


def test_the_first_values_are_in_layers_mean_and_optimizer_and_draw_as_the_file_does(config_of):
    """A preview before the first step is the picture that `load_lora_weights` draws with; the running mean
    and the optimizer begin with these values."""
    sample = {"prompts": "[a]", "sample_every": 1, "skip_first_sample": "false", "width": 64, "height": 64}
    sample = [f"sample.{key}={value}" for key, value in (sample | {"sample_steps": 2}).items()]
    train = ["network.linear=6", "train.ema.use_ema=true", "train.steps=1", "train.lr=1e-12"]
    config = config_of(file_of("split_peft"), *train, *sample)
    train_lora(config)
    first = sorted((config.run_dir / "samples").glob("*.png"))[0]
    pipeline = FluxPipeline.from_pretrained(config.model.name_or_path, "float32")
    pipeline.load_lora_weights(file_of("split_peft"))
    preview = config.sample.previews[0]
    options = {"num_inference_steps": 2, "guidance_scale": preview.guidance_scale, "seed": preview.seed}
    want = pipeline("a", height=64, width=64, max_sequence_length=16, **options).images[0]
    off = np.abs(np.asarray(Image.open(first), "int32") - np.asarray(want, "int32"))
    assert off.max() <= 1  # of 255
    pipeline.unload_lora_weights()
    without = pipeline("a", height=64, width=64, max_sequence_length=16, **options).images[0]
    assert np.abs(np.asarray(without, "int32") - np.asarray(want, "int32")).max() > 20
    checkpoint, written = load_latest(config.run_dir), of_file(config.run_dir / "run.safetensors")
    for name, mean in checkpoint.tensors["ema"].items():
        np.testing.assert_allclose(mean.numpy(), checkpoint.tensors["lora"][name].numpy(), atol=1e-7)
    for path, delta in of_file(file_of("split_peft")).items():
        np.testing.assert_allclose(written[path], delta, atol=1e-6, err_msg=path)
        new_a, new_b = (checkpoint.tensors["lora"][f"{path}.lora_{side}"].numpy() for side in "AB")
        new_a, new_b = new_a[:, 4:], new_b[4:]
        assert np.abs(new_a).min() > 0 and np.abs(new_b).max() < 1e-9  # can be trained
    assert config.uses_fp8_optimizer  # whose parameters are views of one buffer
    with safe_open(config.run_dir / "run.safetensors", framework="np") as content:
        assert content.metadata()["pretrained_lora"] == "split_peft"


def test_a_run_that_goes_on_does_not_read_the_file_again_and_remembers_it(config_of, tmp_path, capfd):
    """And one of another rank, which is refused, starts anew from what this one has trained."""
    source, folder = tmp_path / "hat.safetensors", tmp_path / "run"
    shutil.copy(file_of("split_diffusers"), source)
    train_lora(config_of(source, "train.steps=1", "network.linear=4"))
    assert f"starting from {source}: LoRA on 14 layers" in capfd.readouterr().out
    source.unlink()
    for steps, other in ((2, "other.safetensors"), (3, "null")):
        train_lora(config_of(source, "network.linear=4", f"train.steps={steps}", f"{KEY}={other}"))
        shown = capfd.readouterr().out
        said = "is read at the start of a run only: this one goes on where it was" in shown
        assert said == (other != "null")
        assert "resuming from" in shown and KEY not in shown.partition("resuming from")[2]
        assert f"pretrained_lora_path: {source}" in (folder / "config.yaml").read_text()
        with safe_open(folder / "run.safetensors", framework="np") as content:
            assert content.metadata()["pretrained_lora"] == "hat.safetensors"
    with pytest.raises(ConfigError) as refused:
        train_lora(config_of(source, "network.linear=6"))
    assert "network.linear was 4 in the checkpoint and is 6 now; set it back, or start a new" in str(
        refused.value
    )
    assert KEY in str(refused.value)
    found, told = started(config_of(folder / "run.safetensors", "network.linear=6", "name=larger"))
    for path, delta in of_file(folder / "run.safetensors").items():
        np.testing.assert_allclose(found[path], delta, atol=1e-7)
    assert "step 3: LoRA on 37 layers; each delta-W as it is there" in told and "zero" not in told


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dense_kohya", "it has CLIP: LoRA on 18 layers, T5: LoRA on 21, LoRA on 3"),
        ("oft", "it has OFT on"),
        ("lokr_unbalanced", "it has LoKr on 2 layers, and lora is what this run trains: make a LoRA of it"),
        ("loha", "make a LoRA of it with `python -m ppcoat lora resize IN OUT --rank N`"),
        ("lora_bias", "it has bias on"),
        ("clip_diffusers", "does not train: no run trains biases or text encoders; start from another file"),
        ("nowhere", "no LoRA file at"),
        ("../tiny_newbie/lora", "it is a LoRA of Z-Image, Lumina or NewBie"),
        ("../tiny_flux_fp32/transformer", "is a whole model, not a LoRA"),
    ],
)  # fmt: skip
def test_what_a_run_does_not_train_is_named_in_one_line_before_anything_is_loaded(
    make_config, capsys, monkeypatch, name, said
):
    monkeypatch.setattr(FluxSpec, "load_encoders", None)
    path = file_of(name)
    with pytest.raises(ConfigError) as refused:
        train_lora(make_config(f"{KEY}={path}"))
    message = str(refused.value)
    assert message.startswith(f"{KEY} {path}: ") and said in message and "\n" not in message
    assert message.count(str(path)) == 1 or "no LoRA file" in message or "whole model" in message


def test_the_rest_is_left_out_where_that_is_asked_for(make_config, tmp_path):
    tensors = load_file(file_of("dense_comfy"))
    odd = tmp_path / "odd.safetensors"
    save_file(tensors | {"strange.lora_A.weight": np.ones([2, 2], "float32")}, odd)
    config = make_config(f"{KEY}={odd}", "network.linear=4")
    with pytest.raises(
        ConfigError, match="1 keys of it name nothing that this model has, network.pretrained_lora_p"
    ):
        adapter_start(config, FluxSpec().unfilled)
    found, told = started(
        make_config(f"{KEY}={odd}", "network.linear=4", "network.pretrained_lora_partly=true")
    )
    assert (
        "left out: " in told
        and "CLIP: LoRA on 18" in told
        and told.splitlines()[0].endswith("1 unknown keys")
    )
    want = truth("dense")
    for path, delta in found.items():
        np.testing.assert_allclose(delta[::2], want[f"{path}.weight"], atol=1e-6, err_msg=path)
    assert "transformer_blocks.0.norm1.linear" not in found and len(found) == 17
    config = make_config(f"{KEY}={file_of('clip_diffusers')}", "network.pretrained_lora_partly=true")
    with pytest.raises(ConfigError, match="it has CLIP: LoRA on .* which this run does not train"):
        adapter_start(config, FluxSpec().unfilled)  # nothing would be left


def test_layers_of_zeros_start_anew(make_config, tmp_path):
    """A file of a run that did not train some layers: both factors of such a layer must not become zero."""
    tensors = load_file(file_of("split_diffusers"))
    key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    save_file(tensors | {key: np.zeros_like(tensors[key])}, tmp_path / "a.safetensors")
    config = make_config(f"{KEY}={tmp_path / 'a.safetensors'}", "network.pretrained_lora_partly=true")
    start = adapter_start(config, FluxSpec().unfilled)
    assert "transformer_blocks.0.attn.to_q" not in start.factors and len(start.factors) == 12
    assert "27 more layers of this run start at zero" in start.told


def test_the_dry_run_checks_the_file_and_takes_its_steps_from_there(make_config, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(run, "adapter_start", lambda *given: made.append(adapter_start(*given)) or made[-1])
    config = make_config(f"{KEY}={file_of('split_kohya')}", "network.pretrained_lora_partly=true")
    next(run.dry_run(config))
    assert "starting from" in capsys.readouterr().out and not config.run_dir.exists()
    assert made[0].factors == {}  # the layers have them
    with pytest.raises(ConfigError, match="it has DoRA"):
        next(run.dry_run(make_config(f"{KEY}={file_of('dora')}")))


def test_ai_toolkits_key_is_the_same(tmp_path):
    job = f"""
job: extension
config:
  name: hats
  process:
    - type: sd_trainer
      training_folder: {tmp_path}
      network: {{type: lora, linear: 16, linear_alpha: 16, pretrained_lora_path: hat.safetensors}}
      datasets: [{{folder_path: {tmp_path}}}]
      train: {{train_unet: true, noise_scheduler: flowmatch}}
      model: {{name_or_path: {FIXTURES / "tiny_flux_fp32"}, is_flux: true}}
"""
    file = tmp_path / "job.yaml"
    file.write_text(job)
    assert load_config(file).network.pretrained_lora_path == "hat.safetensors"


@pytest.mark.parametrize(("name", "rank"), [("dora", 4), ("dora", 6), ("dora_out", 4), ("split_kohya", 4)])
def test_a_dora_starts_from_doras_and_from_loras(config_of, name, rank):
    """Its weights, at strength 1, are those of the file: with the file's lengths, or a LoRA's own."""
    spec, file = FluxSpec(), file_of(name)
    more = ["network.type=dora", f"network.linear={rank}", "network.linear_alpha=3"]
    config = config_of(file, *more)
    start = adapter_start(config, spec.unfilled)
    model = load_transformer(FIXTURES / "tiny_flux_fp32" / "transformer", "float32")
    modules, paths = prepare(model, COATTrainer(), config.network), list(start.factors)
    start.put(modules)
    kinds = {each.paths[0]: each.kind for each in read_lora_file(file).changes}
    assert sorted(paths) == sorted(kinds) and "each delta-W as it is there" in start.told
    for path, kind in kinds.items():
        weight = modules[path].weight.numpy().T.astype("float64")
        got, want = (each.delta(weight, 1.0) for each in (modules[path].kind(), kind))
        np.testing.assert_allclose(got, want, atol=2e-6, err_msg=path)


def test_kinds_that_a_dora_cannot_start_from_are_named(config_of):
    for name, more, said in (
        (
            "dora",
            [],
            "it has DoRA by the rule of PEFT on 4 layers, and lora is what this run trains: set netw",
        ),
        ("dora_in", ["network.type=dora"], "DoRA of rows by PEFT's rule is what this run trains: merge it"),
        ("lokr_unbalanced", ["network.type=dora"], "make a LoRA of it"),
        ("dora", ["network.type=lokr"], "start from a LoKr"),
    ):
        with pytest.raises(ConfigError, match=said):
            adapter_start(config_of(file_of(name), *more), FluxSpec().unfilled)


def test_a_dora_starts_from_the_fused_modules_of_kohyas_format(make_config, tmp_path):
    """Rows of q, k and v in one are those of its parts, also of a part without update."""
    rng, file = np.random.default_rng(0), tmp_path / "fused.safetensors"
    tensors, width = {}, 64
    for name, out in (
        ("double_blocks_0_img_attn_qkv", 3 * width),
        ("final_layer_adaLN_modulation_1", 2 * width),
    ):
        b = rng.standard_normal([out, 2])
        if "qkv" in name:  # the first column is q's, the second k's, v has none
            b[width:, 0] = b[:width, 1] = b[2 * width :, 1] = 0
        arrays = {
            "lora_down.weight": rng.standard_normal([2, width]),
            "lora_up.weight": b,
            "alpha": np.array(2),
        }
        arrays["dora_scale"] = rng.uniform(0.5, 1.5, [out, 1])
        tensors |= {f"lora_unet_{name}.{role}": np.asarray(each, "float32") for role, each in arrays.items()}
    save_file(tensors, file)
    targets = ["transformer_blocks.0.attn.to_q", "attn.to_k", "attn.to_v", "norm_out.linear"]
    settings = ["network.type=dora", "network.linear=2", f"network.targets={json.dumps(targets)}"]
    config = make_config(f"{KEY}={file}", *settings)
    start = adapter_start(config, FluxSpec().unfilled)
    model = load_transformer(FIXTURES / "tiny_flux_fp32" / "transformer", "float32")
    modules = prepare(model, COATTrainer(), config.network)
    assert "DoRA by the rule of LyCORIS on 4 layers" in start.told
    start.put(modules)
    for change in read_lora_file(file).changes:
        weights = [modules[path].weight.numpy().T.astype("float64") for path in change.paths]
        for path, weight, want in zip(change.paths, weights, change.deltas(weights, 1.0), strict=True):
            got = modules[path].kind().delta(weight, 1.0)
            np.testing.assert_allclose(got, want, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", ["control_bfl", "control_diffusers"])
def test_a_control_loras_embedder_is_left_out_by_name(make_config, name):
    """It takes 128 inputs, those of a picture too, and a run trains on 64."""
    more = ['network.targets=["x_embedder", "attn.to_q"]', "network.linear=4"]
    partly = make_config(f"{KEY}={file_of(name)}", *more, "network.pretrained_lora_partly=true")
    start = adapter_start(partly, FluxSpec().unfilled)
    assert start.factors and "x_embedder" not in start.factors
    tensors = {key: each for key, each in load_file(file_of("control_diffusers")).items()
               if "x_embedder.lora_A" in key or "x_embedder.lora_B.weight" in key}  # fmt: skip
    alone = partly.run_dir.parent / "alone.safetensors"
    save_file(tensors, alone)
    with pytest.raises(ConfigError, match="a control or Fill LoRA sees a picture there, too; start from"):
        adapter_start(make_config(f"{KEY}={alone}", *more), FluxSpec().unfilled)


@pytest.mark.parametrize("kind", ["dora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_own_file_in_a_new_run(make_config, kind):
    config = make_config("train.steps=1", f"network.type={kind}", "network.linear=3")
    train_lora(config)
    file = config.run_dir / "run.safetensors"
    again = make_config(f"{KEY}={file}", f"network.type={kind}", "network.linear=3", "name=again")
    start, trained = adapter_start(again, FluxSpec().unfilled), load_latest(config.run_dir).tensors["lora"]
    found = {
        f"{path}.{name}": values for path, each in start.factors.items() for name, values in each.items()
    }
    assert found.keys() == trained.keys()
    model = load_transformer(FIXTURES / "tiny_flux_fp32" / "transformer", "float32")
    modules = prepare(model, COATTrainer(), again.network)
    start.put(modules)
    want = {each.paths[0]: each.kind for each in read_lora_file(file).changes}
    for path, layer in modules.items():
        weight = layer.weight.numpy().T.astype("float64")
        got = layer.kind().delta(weight, 1.0) if kind == "dora" else layer.delta().numpy().T
        np.testing.assert_allclose(got, want[path].delta(weight, 1.0), atol=2e-6, err_msg=path)


@pytest.fixture
def newbie(tmp_path, write_newbie_run):
    def make(path, kind="lora", rank=4, factor=-1):
        own = {"output_dir": str(tmp_path), "adapter_type": kind, "lora_rank": rank, "lora_alpha": 3}
        own |= {"lokr_factor": factor} if kind == "lokr" else {}
        targets = ["attention.qkv", "attention.out", "feed_forward.w2", "time_text_embed.1",
                   "clip_text_pooled_proj.1"]  # fmt: skip
        network = {"pretrained_lora_path": str(path), "targets": targets}
        return load_newbie_config(write_newbie_run(tmp_path, tmp_path, Model=own, network=network))

    return make


def test_newbies_loras_start_a_run(newbie):
    config = newbie(NEWBIE / "lora")
    paths = set(dict(NewbieSpec().unfilled(config).named_sublayers()))
    found, told = started(config, NewbieSpec())
    want = of_file(NEWBIE / "lora", paths)
    assert found.keys() == want.keys() and "LoRA on 20 layers; each delta-W as it is there" in told
    for path, delta in found.items():
        np.testing.assert_allclose(delta, want[path], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rank", "factor"), [("lokr_full", 100000, 8), ("lokr_lowrank", 4, 4), ("lokr_full", 3, 8)]
)
def test_newbies_lokrs_start_a_run(newbie, name, rank, factor):
    """The same settings: the matrices themselves. A smaller rank: told with what it lost. Then drawn with."""
    config = newbie(NEWBIE / name, "lokr", rank, factor)
    start = adapter_start(config, NewbieSpec().unfilled)
    model = load_nextdit(NEWBIE / "transformer", "float32")
    modules = prepare(model, COATTrainer(), config.network)
    paths = {path for path, _ in model.named_sublayers()}
    want = {each.paths[0]: each.kind for each in read_lora_file(NEWBIE / name, paths).changes}
    factors = {path: dict(values) for path, values in start.factors.items()}
    start.put(modules)
    off = total = 0.0
    for path, kind in want.items():
        got = modules[path].delta().numpy().T.astype("float64")
        whole = kind.delta(np.zeros(kind.shape), 1.0)
        off, total = off + np.linalg.norm(got - whole) ** 2, total + np.linalg.norm(whole) ** 2
    relative = np.sqrt(off / total)
    assert factors.keys() == want.keys() == set(adapter_layers(model))
    if rank == 3:
        assert relative > 0.01 and f"relative delta-W error {relative:.2g} overall" in start.told
    else:
        assert relative < 1e-6
    if name == "lokr_lowrank":
        path = next(iter(factors))
        with pytest.raises(
            ConfigError, match="divides its .* otherwise than network.lokr_factor 2: set that to"
        ):
            adapter_start(newbie(NEWBIE / name, "lokr", rank, 2), NewbieSpec().unfilled)
    with pytest.raises(ConfigError, match="it has LoKr on 20 layers, and lora is what this run trains"):
        adapter_start(newbie(NEWBIE / name), NewbieSpec().unfilled)
    with pytest.raises(ConfigError, match="and lokr is what this run trains: set network.type: lora"):
        adapter_start(newbie(NEWBIE / "lora", "lokr"), NewbieSpec().unfilled)
