"""Numbers of which nothing can be made: NaN in every part of a run, settings beyond use, pictures that show
nothing, updates that diverge. Each ends in one line that names it, with its exit status, or in a warning and
a result; and what was saved before is as it was."""

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
import safetensors.numpy as files
import yaml
from counts import judge
from PIL import Image
from safetensors import safe_open
from safetensors.paddle import load, save

from ppcoat.cli.main import main
from ppcoat.data import garments
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.train.trainer import Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAN, INF = float("nan"), float("inf")
USUAL = 20.0  # CPU seconds; a calm run takes two
# What a run is set to, by the name that each of the three has for it.
SETTINGS = {
    "FLUX": {"lr": "train.lr", "steps": "train.steps", "alpha": "network.linear_alpha",
             "rank": "network.linear", "batch": "train.batch_size", "guidance": "sample.guidance_scale",
             "ema": "train.ema.ema_decay", "start": "network.pretrained_lora_path"},
    "Lightning": {"lr": "learning_rate", "steps": "max_train_steps", "alpha": "lora_alpha",
                  "rank": "lora_rank", "batch": "train_batch_size", "guidance": "guidance_scale"},
}  # fmt: skip
SETTINGS["NewBie"] = SETTINGS["FLUX"] | {"steps": "train.num_epochs"}
# part of each model: its folder, and a tensor in it
PARTS = {
    "FLUX": {"T5": ("text_encoder_2", "final_layer_norm"), "CLIP": ("text_encoder", "final_layer_norm"),
             "VAE": ("vae", "encoder.conv_in.weight"), "transformer": ("transformer", "proj_out.bias"),
             "transformer, behind a LoRA": ("transformer", "transformer_blocks.0.attn.to_q.weight")},
    "NewBie": {"T5": ("text_encoder", "norm.weight"), "CLIP": ("clip_model", "norm"),
               "VAE": ("vae", "encoder.conv_in.weight"), "transformer": ("transformer", "x_embedder"),
               "transformer, behind a LoRA": ("transformer", "layers.0.attention.qkv")},
}  # fmt: skip
PARTS["Lightning"] = PARTS["FLUX"]
FAMILIES = [*SETTINGS]


@dataclass
class Ended:
    status: int
    told: list[str]  # lines that are errors and warnings
    seconds: float
    said: str


@dataclass
class Scene:
    """A folder with pictures, and commands that train in it on the tiny models."""

    folder: Path
    capsys: pytest.CaptureFixture
    family: str = "FLUX"
    cache: bool = False  # keep encodings on disk

    def model(self, part: str | None = None, value: float = NAN) -> Path:
        """The family's model; with a part, a copy in which a number of that part is `value`."""
        source = FIXTURES / ("tiny_newbie" if self.family == "NewBie" else "tiny_flux_fp32")
        if part is None:
            return source
        folder, tensor = PARTS[self.family][part]
        copy = self.folder / f"{self.family} {part}"
        if not copy.exists():
            shutil.copytree(source, copy)
            change_number(next((copy / folder).glob("*.safetensors")), tensor, value)
        return copy

    def data(self, pictures: list[Image.Image] | None = None, caption: str = "a dress") -> Path:
        folder = self.folder / f"data{len(list(self.folder.glob('data*')))}"
        inner = folder / "1_dress"
        inner.mkdir(parents=True)
        if pictures is None:
            garments.write_folder(inner, 4, seed=1, motif="gold star", prefix="")
        for number, picture in enumerate(pictures or []):
            picture.save(inner / f"{number}.png")
            (inner / f"{number}.txt").write_text(caption)
        return folder

    def argv(self, name: str, data: Path, model: Path | None = None, more: tuple = (), **settings) -> list:
        """The command of a run of four steps with a checkpoint every two."""
        given = {SETTINGS[self.family][key]: value for key, value in settings.items()}
        given |= dict(each.split("=") for each in more)
        if self.family == "Lightning":
            return self._flags(name, data, model or self.model(), given)
        write, start, ending = self._yaml, ["train"], ".yaml"
        if self.family == "NewBie":
            write, start, ending = self._toml, ["train-newbie", "--config_file"], ".toml"
        file = self.folder / f"{name}{ending}"
        file.write_text(write(name, data, model or self.model()))
        sets = (part for key, value in given.items() for part in ("--set", f"{key}={shown(value)}"))
        return [*start, str(file), *sets]

    def _flags(self, name: str, data: Path, model: Path, given: dict) -> list:
        flags = {
            "pretrained_teacher_model": model, "data_path": data, "output_dir": self.folder,
            "tracker_project_name": name, "resolution": 64, "lora_rank": 2, "learning_rate": 1e-2,
            "train_batch_size": 2, "max_train_steps": 4, "max_sequence_length": 16, "device": "cpu",
            "num_euler_timesteps": 20, "validation_steps": 0, "checkpointing_steps": 2,
        } | given  # fmt: skip
        return [
            "train-flux-lightning",
            *(str(x) for key, value in flags.items() for x in (f"--{key}", value)),
        ]

    def _toml(self, name: str, data: Path, model: Path) -> str:
        keys = {
            "base_model_path": model, "train_data_dir": data, "output_dir": self.folder, "output_name": name,
        }  # fmt: skip
        lines = ['device = "cpu"', "[Model]", *(f'{key} = "{value}"' for key, value in keys.items())]
        lines += ["resolution = 64", "train_batch_size = 2", "num_epochs = 2", "learning_rate = 1e-2"]
        lines += ['lr_scheduler = "constant"', "lora_rank = 2", "lora_alpha = 4", "lora_dropout = 0.0"]
        return "\n".join([*lines, "[logging]", "visualdl = false"])

    def _yaml(self, name: str, data: Path, model: Path) -> str:
        return yaml.safe_dump({
            "name": name, "output_dir": str(self.folder), "device": "cpu",
            "model": {"name_or_path": str(model)}, "network": {"linear": 2, "linear_alpha": 4},
            "datasets": [{"folder_path": str(data), "resolution": 64, "cache_to_disk": self.cache}],
            "train": {"max_sequence_length": 16, "steps": 4, "batch_size": 2, "lr": 1e-2},
            "coat": {"enabled": True, "optimizer": {"block_size": 16}}, "save": {"save_every": 2},
            "sample": {"sample_every": 0}, "logging": {"visualdl": False},
        })  # fmt: skip

    def call(self, argv: list) -> Ended:
        self.capsys.readouterr()
        began = time.process_time()
        try:
            status = main([str(each) for each in argv])
        except (Exception, SystemExit) as error:
            status, line = -1, f"error: a traceback: {type(error).__name__}: {error}"
        else:
            line = ""
        out, err = self.capsys.readouterr()
        lines = [each.strip() for each in f"{out}\n{err}\n{line}".replace("\r", "\n").splitlines()]
        told = [each for each in lines if each.startswith(("error:", "warning:"))]
        return Ended(status, told, time.process_time() - began, "\n".join(lines))


def shown(value: object) -> str:
    return ".nan" if value != value else str(value)


def change_number(file: Path, tensor: str, value: float) -> None:
    """A safetensors file of NumPy's dtypes, in which the first tensor of that name has `value` everywhere."""
    with safe_open(file, "np") as header:
        metadata = header.metadata()
    tensors = files.load_file(file)
    name = next(each for each in tensors if tensor in each)
    tensors[name] = np.full_like(tensors[name], value)
    files.save_file(tensors, file, metadata)


def change_checkpoint(folder: Path, group: str, name: str, change) -> None:
    """A tensor of a checkpoint's group is `change` of it, and the manifest has the digest of that."""
    file, manifest = folder / f"{group}.safetensors", json.loads((folder / "manifest.json").read_text())
    tensors = load(file.read_bytes())
    found = next(each for each in sorted(tensors) if name in each)
    tensors[found] = change(tensors[found])
    file.write_bytes(save(tensors))
    content = file.read_bytes()
    manifest["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def results(folder: Path) -> dict[str, bytes]:
    """What a run of this name has left: checkpoints and adapters."""
    found = [path for each in folder.parent.glob(f"{folder.name}*") if each.is_dir()
             for path in each.rglob("*.safetensors")]  # fmt: skip
    return {str(path): path.read_bytes() for path in found if "cache" not in path.parts}


def all_finite(found: dict[str, bytes]) -> bool:
    return all(paddle.isfinite(tensor).all() for content in found.values()
               for tensor in load(content).values() if tensor.is_floating_point())  # fmt: skip


def refused(ended: Ended, status: int, words: str) -> bool:
    """One error, as promised, in the usual time."""
    errors = [line for line in ended.told if line.startswith("error:")]
    return (ended.status == status and len(errors) == 1 and re.search(words, errors[0]) is not None
            and ended.seconds < USUAL)  # fmt: skip


def told_of(ended: Ended) -> str:
    return f"status {ended.status}, {ended.seconds:.1f} s: {' / '.join(ended.told)[-600:]}"


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, [64, 64, 3]).astype("uint8"))


@pytest.fixture
def scene(tmp_path, capsys, encoders_read_once):
    return Scene(tmp_path, capsys)


@pytest.fixture(params=FAMILIES)
def any_scene(request, scene):
    scene.family = request.param
    return scene


def test_a_damaged_weight_is_named_at_the_first_step_at_the_latest(scene):
    data = scene.data()
    for part in ("T5", "transformer, behind a LoRA"):
        damaged_part(scene, part, data)


def damaged_part(scene: Scene, part: str, data: Path) -> None:
    folder, tensor = PARTS[scene.family][part]
    model = scene.model(part)
    ended = scene.call(scene.argv("run", data, model))
    where = f"{tensor}.* of (the {folder} of )?{model}.* holds NaN or infinity"
    right = refused(ended, 2, where) and not results(scene.folder / "run")
    judge(f"NaN in {part}", scene.family, right, told_of(ended))


@pytest.mark.slow
def test_damage_in_every_part(any_scene):
    data = any_scene.data()
    for part in PARTS[any_scene.family]:
        damaged_part(any_scene, part, data)


SENSELESS = [
    *(("lr", value) for value in (0, 1e10, -1e-3, NAN)),
    *(("alpha", value) for value in (0, NAN)),
    *(("ema", value) for value in (2.0, -0.1)),
    *((name, 0) for name in ("steps", "batch", "rank")),
    ("guidance", NAN),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_without_sense_are_refused_before_anything_is_loaded(scene, family):
    scene.family, data = family, scene.data([noise(0)])
    for name, value in SENSELESS:
        if name in SETTINGS[family]:
            ended = scene.call(scene.argv("run", data, **{name: value}))
            right = refused(ended, 2, f"came '?{value}'?, wanted") and not (scene.folder / "run").exists()
            judge(f"{name} {value}", family, right and ended.seconds < 2, told_of(ended))


@pytest.mark.slow
def test_what_is_legal_and_odd_is_one_warning_and_goes_on(any_scene):
    black = Image.new("RGB", (64, 64))
    many = [noise(number) for number in range(3)]
    cases = {
        "one picture": ([noise(0)], {}, "warning: one picture only"),
        "black pictures": ([black, *many], {}, "warning: 1 of 4 pictures are of one colour all over, e.g. "),
        "batch above the data": (many, {"batch": 8}, "warning: 8 pictures at once, 3 in an epoch"),
        "rank above the width": (many, {"rank": 100}, "warning: rank 100 is more than the width of"),
    }  # fmt: skip
    for number, (name, (pictures, settings, words)) in enumerate(cases.items()):
        run = f"run{number}"
        ended = any_scene.call(any_scene.argv(run, any_scene.data(pictures), **settings))
        once = len([line for line in ended.told if re.search(words, line)]) == 1
        found = results(any_scene.folder / run)
        right = ended.status == 0 and once and found and all_finite(found) and ended.seconds < USUAL
        judge(name, any_scene.family, right, told_of(ended))


@pytest.mark.slow
def test_empty_captions_are_an_error_unless_they_are_meant(scene):
    data = scene.data([noise(0), noise(1)], caption=" ")
    ended = scene.call(scene.argv("run", data))
    judge(
        "empty captions",
        "FLUX",
        refused(ended, 2, "the caption 0.txt is empty .*default_caption"),
        told_of(ended),
    )


def calm(scene: Scene, *more: str) -> list:
    """The command of a run that is done, in the folder "run"."""
    argv = scene.argv("run", scene.data(), more=more)
    ended = scene.call(argv)
    assert ended.status == 0, told_of(ended)
    return argv


def goes_on(scene: Scene, argv: list) -> list:
    """The same command, for more steps."""
    if scene.family == "Lightning":
        argv = [*argv, "--resume_from_checkpoint", "latest"]
        argv[argv.index("--max_train_steps") + 1] = "6"
        return argv
    return [*argv, "--set", "train.num_epochs=3" if scene.family == "NewBie" else "train.steps=6"]


def with_first(value: float, x: paddle.Tensor) -> paddle.Tensor:
    flat = x.flatten()
    flat[0] = value
    return flat.reshape(x.shape)


STATES = {  # of a checkpoint: group and tensor
    "NaN in a resumed LoRA": ("lora", "lora_A"),
    "NaN in resumed optimizer states": ("optimizer", "m1.amax"),  # of FP8
}


def test_a_state_that_is_not_finite_is_neither_read_nor_written(scene, monkeypatch):
    argv = calm(scene)
    resumed(scene, argv, "NaN in resumed optimizer states")
    diverging(scene, argv, monkeypatch)


@pytest.mark.slow
def test_states_that_are_not_finite(any_scene, monkeypatch):
    argv = calm(any_scene)
    for name in STATES:
        resumed(any_scene, argv, name)
    diverging(any_scene, argv, monkeypatch)


def resumed(scene: Scene, argv: list, name: str) -> None:
    """The last checkpoint is damaged: the run goes on from the one before. It is as before, then."""
    run, whole, (group, tensor) = scene.folder / "run", scene.folder / "whole", STATES[name]
    shutil.copytree(run, whole)
    last = run / "checkpoints" / "000000004"
    change_checkpoint(last, group, tensor, partial(with_first, NAN))
    ended = scene.call(goes_on(scene, argv))
    words = rf"warning: checkpoint {last} is damaged \({group}.safetensors: .* holds NaN or infinity\)"
    right = ended.status == 0 and len(re.findall(words, ended.said)) == 1 and ended.seconds < USUAL
    right = right and f"resuming from {last.with_name('000000002')}" in ended.said
    judge(name, scene.family, right and all_finite(results(run)), told_of(ended))
    shutil.rmtree(run)
    whole.rename(run)


def diverging(scene: Scene, argv: list, monkeypatch) -> None:
    """After the fifth update a parameter is infinite: the sixth is the last, and would be saved."""
    update = Trainer._update

    def updated(trainer: Trainer, *given) -> None:
        update(trainer, *given)
        if trainer.step == 4:
            first = next(iter(trainer.side.parameters.values()))
            paddle.assign(with_first(INF, first.detach()), output=first)

    monkeypatch.setattr(Trainer, "_update", updated)
    before = results(scene.folder / "run")
    ended = scene.call(goes_on(scene, argv))
    after = results(scene.folder / "run")
    words = r"step (5|6): .* holds NaN or infinity.*diverged.* The last checkpoint, step 4, is unharmed"
    unharmed = all(after[path] == content for path, content in before.items())
    judge("an update that diverges", scene.family,
          refused(ended, 1, words) and unharmed and all_finite(after), told_of(ended))  # fmt: skip


@pytest.mark.slow
def test_codes_of_fp8_that_are_nan_are_refused(scene):
    """Linear codes have a NaN of their own, 127, which reads as no 448 here."""
    argv = calm(scene, "coat.optimizer.use_dynamic_range_expansion=false")
    last = scene.folder / "run/checkpoints/000000004"
    change_checkpoint(last, "optimizer", "m1.codes", partial(with_first, 127))
    before = results(scene.folder / "run")
    ended = scene.call(goes_on(scene, argv))
    right = refused(ended, 2, "optimizer state m1: holds NaN or infinity")
    right = right and results(scene.folder / "run") == before
    judge("NaN in a resumed code of FP8", "FLUX", right, told_of(ended))


@pytest.mark.slow
def test_a_rate_beyond_all_bounds_is_named_and_saves_nothing(scene):
    """Prodigy's, which no bound of train.lr holds."""
    more = ("train.optimizer=prodigy", "train.prodigy.d_coef=1e38", "train.lr=1.0")
    ended = scene.call(scene.argv("run", scene.data(), more=more, steps=8))
    right = refused(ended, 1, "step .* diverged.* The last checkpoint, step 2")
    judge("lr 10^38 by prodigy", "FLUX", right and all_finite(results(scene.folder / "run")), told_of(ended))


@pytest.mark.slow
def test_a_side_all_of_whose_steps_are_skipped_ends_the_run(scene):
    """The heads train well and the LoRA never does: its loss is beyond float32."""
    scene.family = "Lightning"
    ended = scene.call(scene.argv("run", scene.data(), more=("adv_weight=1e38",)))
    left = results(scene.folder / "run")
    right = refused(ended, 1, "2 steps in a row were skipped .* in step 4") and all_finite(left)
    judge(
        "a loss beyond float32",
        "Lightning",
        right and not any("run.safe" in path for path in left),
        told_of(ended),
    )


@pytest.mark.slow
def test_encodings_on_disk_that_are_not_finite_are_made_again(scene):
    data = scene.data()
    scene.cache = True
    argv = scene.argv("run", data)
    assert scene.call(argv).status == 0
    file, store = scene.folder / "run" / "run.safetensors", EmbeddingStore(scene.folder / "run" / "cache")
    whole = files.load_file(file)
    keys = [path.stem for path in store.folder.glob("*/*.safetensors")]
    for key in keys:
        tensors = store.get(key)
        store.put(key, {name: with_first(NAN, tensor) for name, tensor in tensors.items()})
    shutil.rmtree(scene.folder / "run" / "checkpoints")
    ended = scene.call(argv)
    warned = [line for line in ended.told if "holds NaN or infinity); it will be made anew" in line]
    right = ended.status == 0 and len(warned) == len(keys)
    right = right and all((found == whole[name]).all() for name, found in files.load_file(file).items())
    judge("NaN in encodings on disk", "FLUX", right, told_of(ended))


@pytest.mark.slow
def test_adapters_and_models_that_are_not_finite_draw_and_make_nothing(scene):
    """Commands that read a LoRA file, or draw with a damaged part."""
    calm(scene)
    run = scene.folder / "run"
    good, bad = run / "run.safetensors", scene.folder / "bad.safetensors"
    shutil.copy(good, bad)
    change_number(bad, "lora_B", NAN)
    size = ["--prompt", "a dress", "--width", 32, "--height", 32, "--steps", 1]
    out = scene.folder / "out"
    commands = {
        "continue": scene.argv("other", scene.data(), start=bad),
        "draw": ["generate", "--model", scene.model(), "--path_to_lora", bad, *size, "--output_dir", out],
        "merge": ["merge", "--model", scene.model(), "--lora", bad, "--output_dir", out],
        "convert": ["convert", bad, out, "--format", "kohya"],
        "resize": ["lora", "resize", bad, f"{out}.safetensors", "--rank", 1],
        "combine": ["lora", "combine", bad, good, f"{out}.safetensors"],
    }
    for name, argv in commands.items():
        ended = scene.call(argv)
        right = refused(ended, 2, f"{bad}: the tensor .*lora_B.* holds NaN or infinity") and not list(
            scene.folder.glob("out*")
        )
        judge("NaN in a LoRA", name, right, told_of(ended))
    for part in ("T5", "CLIP", "transformer"):
        argv = ["generate", "--model", scene.model(part), *size, "--output_dir", out]
        ended = scene.call(argv)
        right = refused(ended, 2, "the picture is not finite: .* holds NaN or infinity")
        judge(f"NaN in {part}", "draw", right and not list(out.glob("*.png")), told_of(ended))
    merged = scene.folder / "merged"
    ended = scene.call(
        ["merge", "--model", scene.model("transformer"), "--lora", good, "--output_dir", merged]
    )
    judge(
        "NaN in transformer",
        "merge",
        refused(ended, 2, "holds NaN or infinity") and not merged.exists(),
        told_of(ended),
    )
