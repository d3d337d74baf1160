"""Everything that reports a result as written, as savers that the storm can run: how version k is written,
and what is found when it is read again.
"""

import base64
import errno
import io
import json
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import paddle
import pytest
from disk import snapshot
from PIL import Image
from safetensors.numpy import save as numpy_bytes
from safetensors.paddle import save

from ppcoat import atomic
from ppcoat.atomic import remove_dead_drafts, whole_file, write_text
from ppcoat.cli.lora_files import run_convert
from ppcoat.cli.merge import write_merged
from ppcoat.data.caption_edits import CaptionEditor
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.laion import LaionSource, unpack_laion
from ppcoat.data.sources import Item
from ppcoat.infer.generate import save_picture
from ppcoat.lora import LoRAModule, read_lora_file, write_lora_file
from ppcoat.lora.layer import inject_lora
from ppcoat.lora.peft import save_comfyui, save_peft
from ppcoat.models import writing
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.newbie import convert
from ppcoat.models.newbie.convert import checkpoint_infos, write_newbie_folder
from ppcoat.models.quantized_base import QuantizedCopy
from ppcoat.models.writing import write_component
from ppcoat.studio.draw_list import Asked, read_drawing, write_drawing
from ppcoat.studio.runs import ChildRun, Queue
from ppcoat.train.checkpoint import load_latest, save_checkpoint
from ppcoat.train.search import Costs, Journal, Rounds


@dataclass(frozen=True)
class Saver:
    """save(root, k) writes version k, from 1; read(root) gives what is there, and the same for the same
    version."""

    save: Callable[[Path, int], None]
    read: Callable[[Path], object]


def stand_ins(patch) -> None:
    """save_file writes from Rust, where the storm sees nothing: here Python writes the same bytes. And
    convert-newbie takes parts that are no models."""

    def save_file(tensors, name, metadata=None):
        Path(name).write_bytes(save(tensors, metadata))

    patch.setattr(writing, "save_file", save_file)
    patch.setattr(convert, "check_newbie_vae", lambda *_: None)
    patch.setattr(convert, "check_newbie_folder", lambda *_: None)


def raw(tensor: paddle.Tensor) -> bytes:
    odd = tensor.dtype in (paddle.float8_e4m3fn, paddle.bfloat16)
    return (tensor.view("uint8") if odd else tensor).contiguous().numpy().tobytes()


def save_run(root: Path, k: int) -> None:
    codes = paddle.full([300], k, "float32").astype(paddle.float8_e4m3fn)
    lora = {"a.lora_A": paddle.full([4, 3], k, "float32"), "a.lora_B": paddle.zeros([2])}
    tensors = {"lora": lora, "optimizer": {"codes": codes}}
    save_checkpoint(root / "out" / "run", 10 * k, tensors, {"loss": 0.1 + k}, keep=2)


def save_lightning(root: Path, k: int) -> None:
    """Two sides, and always the same step: a checkpoint that replaces one."""
    sides = {f"{side}_{what}": {"w": paddle.full([8, 8], k, "float32"), "b": paddle.zeros([3], "bfloat16")}
             for side in ("generator", "heads") for what in ("weights", "optimizer")}  # fmt: skip
    save_checkpoint(root / "out" / "run", 7, sides, {"turn": k}, keep=1)


def read_run(root: Path) -> object:
    found = load_latest(root / "out" / "run")
    if found is None:
        return None
    groups = {group: {name: raw(tensor) for name, tensor in named.items()}
              for group, named in found.tensors.items()}  # fmt: skip
    return found.step, groups, json.dumps(found.state)


def lora_saver(file_format: str) -> Saver:
    def save(root: Path, k: int) -> None:
        shape = ([2, 8], [8, 2])
        a, b = (np.random.default_rng(k).standard_normal(each).astype("float32") for each in shape)
        paths = [f"transformer_blocks.0.attn.{each}" for each in ("to_q", "to_k", "to_v")]
        modules = {path: LoRAModule(a, b, 2.0) for path in paths}
        write_lora_file(root / "out" / "lora.safetensors", modules, {"step": str(k)}, file_format)

    return Saver(save, read_lora("lora.safetensors"))


def read_lora(name: str, paths: Collection[str] | None = None) -> Callable[[Path], object]:
    """Not the bytes: the order of a header's fields is another in every process."""

    def read(root: Path) -> object:
        file = root / "out" / name
        if not (file / "adapter_model.safetensors" if name == "adapter" else file).exists():
            return None
        found = read_lora_file(file, paths)
        return {path: module.delta(np.zeros(module.shape, "float32"), 1.0).tobytes()
                for path, module in found.modules.items()}  # fmt: skip

    return read


def read_converted(root: Path) -> object:
    return [(name, read_lora(Path(name).name)(root)) for name in snapshot(root)]


class Block(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = paddle.nn.Linear(8, 8)


def adapted(k: int) -> Block:
    paddle.seed(k)
    model = Block()
    for layer in inject_lora(model, 1 + k, alpha=3.0 * k, targets=["to_q"]).values():
        layer.lora_B.set_value(paddle.full(layer.lora_B.shape, k, "float32"))
    return model


def save_two_renames(root: Path, k: int) -> None:
    """Where two names cannot change places: other systems, some file systems."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda *_: cannot())
        save_lightning(root, k)


def cannot() -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def save_newbie(root: Path, k: int) -> None:
    save_peft(root / "out" / "adapter", adapted(k), ["to_q"])


def save_encodings(root: Path, k: int) -> None:
    store = EmbeddingStore(root / "cache" / "deep")
    for number in range(2):
        tensors = {"x": paddle.full([5], 10 * k + number, "bfloat16"), "y": paddle.ones([2, 2])}
        store.put(f"{16 * k + number:02x}" * 32, tensors)


def read_encodings(root: Path) -> object:
    """An entry is there or not; one that is there is right, which `get` checks."""
    store, found = EmbeddingStore(root / "cache" / "deep"), []
    for k in range(1, 5):
        entries = [store.get(f"{16 * k + number:02x}" * 32) for number in range(2)]
        if all(entry is not None for entry in entries):
            found.append((k, [raw(entry[name]) for entry in entries for name in "xy"]))
    return found


def save_copy(root: Path, k: int) -> None:
    layout = {f"{name}.weight": ("F32", [4, 4]) for name in "abc"}
    values = ((name, np.full([4, 4], k, "float32")) for name in layout)
    writing.SHARD_BYTES, before = 130, writing.SHARD_BYTES
    try:
        folder = root / "cache" / "copy-fp8"
        write_component(folder, {"k": k}, layout, values, {"source": copy_of(root)._stamp})
    finally:
        writing.SHARD_BYTES = before


def copy_of(root: Path) -> QuantizedCopy:
    return QuantizedCopy(root / "cache" / "copy-fp8", "weights")


def read_copy(root: Path) -> object:
    remove_dead_drafts(root / "cache")  # as whoever writes it again does first
    return snapshot(root) if copy_of(root).is_usable() else None


def once(write: Callable[[Path, int], None], ending: str = "") -> Callable[[Path, int], None]:
    """For results that are never replaced: the command says that it is there."""

    def save(root: Path, k: int) -> None:
        output = root / "out" / f"{k}{ending}"
        if not output.exists():
            write(output, k)

    return save


def model_folder(root: Path) -> Path:
    folder = root.parent / f"{root.name}-model"
    if not folder.exists():
        for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"name": name}))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder


def save_merged(output: Path, k: int) -> None:
    model = Block()
    model.config, model.source_config = SimpleNamespace(get=lambda *_: None), {"k": k}
    for parameter in model.parameters():
        parameter.set_value(paddle.full(parameter.shape, k, "float32"))
    write_merged(model_folder(output.parents[1]), output, {"vae": model}, lambda draft: None)


def save_converted(output: Path, k: int) -> None:
    """Of stand-ins for the parts: whether a model fits is checked before, and not the storm's."""
    root = model_folder(output.parents[1])
    parts = {name: root / name for name in ("text_encoder", "clip_model", "vae")}
    for folder in parts.values():
        if not folder.exists():
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"part": folder.name}))
            (folder / "model.safetensors").write_bytes(numpy_bytes({"w": np.ones([8, 8], "float32")}))
    checkpoint = root / f"{k}.safetensors"
    checkpoint.write_bytes(numpy_bytes({"x": np.full([16, 16], k, "float32")}))
    write_newbie_folder(output, checkpoint_infos(checkpoint), parts, "bf16", {"k": k})


def save_unpacked(output: Path, k: int) -> None:
    data, buffer = model_folder(output.parents[1]), io.BytesIO()
    Image.new("RGB", (20, 30), (40, 90, 10)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows = [f"{i}\thttp://x\t{json.dumps({'caption': f'dress {i}'})}\t{picture}" for i in range(2)]
    (data / "0.txt").write_text("\n".join(rows) + "\n")
    (data / "list.txt").write_text("0.txt\n")
    unpack_laion(LaionSource(str(data), str(data / "list.txt")), output)


class Config(dict):
    __getattr__ = dict.__getitem__


class Words:
    """A tokenizer that was made in memory, and writes its files as it likes."""

    init_kwargs: ClassVar[dict] = {}

    def __init__(self, k: int) -> None:
        self.files = {"vocab.json": [k] * 300, "tokenizer_config.json": {"k": k, "name_or_path": "/a"}}

    def save_pretrained(self, folder: str) -> None:
        for name, content in self.files.items():
            with open(Path(folder) / name, "w", encoding="utf-8") as file:
                json.dump(content, file)


def save_pipeline(root: Path, k: int) -> None:
    """Into a folder that holds something else, too, over the one before."""
    folder, model, scheduler = root / "out" / "pipeline", Block(), SimpleNamespace(config={"k": k})
    if not (folder / "more" / "README.md").exists():
        write_text(folder / "more" / "README.md", "of the user")
    model.config, model.source_config, model.out_channels = Config(in_channels=64), {"k": k}, 64
    for parameter in model.parameters():
        parameter.set_value(paddle.full(parameter.shape, k, "float32"))
    models = dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"), model)
    parts = models | {"scheduler": scheduler, "tokenizer": Words(k), "tokenizer_2": Words(k)}
    FluxPipeline.save_pretrained(SimpleNamespace(**parts), folder)


def read_pipeline(root: Path) -> object:
    found = snapshot(root)
    return found if "out/pipeline/model_index.json" in found else None


def save_caption(root: Path, k: int) -> None:
    """As the studio's page and the command `captions` write one."""
    picture, before = root / "data" / "0001.png", str(k - 1) * 5000 if k > 1 else ""
    item = Item(picture, before, 8, 8, caption_file=picture.with_suffix(".txt"))
    CaptionEditor([item], "txt").write({picture: str(k) * 5000})


def save_note(root: Path, k: int) -> None:
    ChildRun(root / "runs" / "a").prepare(["train", str(k)], root)


def read_note(root: Path) -> object:
    note = ChildRun(root / "runs" / "a").note
    return note and note.argv


def save_drawing_list(root: Path, k: int) -> None:
    write_drawing(Asked(model="m", prompt="a dress", seed=k), root / "drawings" / "a", "a")


def read_drawing_list(root: Path) -> object:
    return read_drawing(root / "drawings" / "a")


def save_journal(root: Path, k: int) -> None:
    file = root / "tune" / "journal.json"
    journal = Journal(file, {"k": 0}, Costs(1.0, 1.0, 1.0), Rounds((4,), (10,)))
    journal.seconds = float(k)
    journal.save()


def read_journal(root: Path) -> object:
    return Journal.of(root / "tune" / "journal.json", {"k": 0}).seconds


def save_lora_of_another_program(output: Path, k: int) -> None:
    """The command that converts one, from a file to a file."""
    source = model_folder(output.parents[1]) / f"kohya_{k}.safetensors"
    module = LoRAModule(np.full([2, 8], k, "float32"), np.ones([8, 2], "float32"), 2.0)
    write_lora_file(source, {"transformer_blocks.0.attn.to_q": module}, {}, "kohya")
    quietly(run_convert, SimpleNamespace(input=source, output=output, format="diffusers", dtype=None,
                                         ignore_unknown=False))  # fmt: skip


def quietly(action: Callable, *given: object) -> None:
    with redirect_stdout(io.StringIO()):
        action(*given)


def save_queue(root: Path, k: int) -> None:
    queue = Queue(root / "studio")
    queue.add(SimpleNamespace(folder=Path(f"/runs/{k}"), is_alive=False))


def read_queue(root: Path) -> object:
    return [str(path) for path in Queue(root / "studio").waiting]


def save_drawing(root: Path, k: int) -> None:
    quietly(save_picture, Image.new("RGB", (8, 8), (k, 0, 0)), root / "drawn", k, "a dress", 0)


def save_text(root: Path, k: int) -> None:
    write_text(root / "run" / "config.yaml", f"name: {k}\n" * 2000)


def save_comfy(root: Path, k: int) -> None:
    save_comfyui(root / "out" / "comfyui.safetensors", adapted(k))


def save_bytes(root: Path, k: int) -> None:
    """A file as the studio takes it from a browser."""
    with whole_file(root / "uploads" / "a.bin") as draft, open(draft, "wb") as target:
        for part in range(3):
            target.write(bytes([k, part]) * 9000)


SAVERS = {
    "checkpoint": Saver(save_run, read_run),
    "Lightning's checkpoint": Saver(save_lightning, read_run),
    "the same, without an exchange of names": Saver(save_two_renames, read_run),
    "LoRA file, diffusers": lora_saver("diffusers"),
    "LoRA file, kohya": lora_saver("kohya"),
    "LoRA file, paddle": lora_saver("paddle"),
    "NewBie adapter": Saver(save_newbie, read_lora("adapter", ["to_q"])),
    "LoRA file, ComfyUI": Saver(save_comfy, read_lora("comfyui.safetensors", ["to_q"])),
    "cache of encodings": Saver(save_encodings, read_encodings),
    "quantised copy": Saver(save_copy, read_copy),
    "merge": Saver(once(save_merged), snapshot),
    "saved pipeline": Saver(save_pipeline, read_pipeline),
    "convert": Saver(once(save_lora_of_another_program, ".safetensors"), read_converted),
    "convert-newbie": Saver(once(save_converted), snapshot),
    "unpacked LAION": Saver(once(save_unpacked), snapshot),
    "caption": Saver(save_caption, snapshot),
    "drawn picture": Saver(save_drawing, snapshot),
    "config.yaml": Saver(save_text, snapshot),
    "studio's queue": Saver(save_queue, read_queue),
    "studio's run": Saver(save_note, read_note),
    "studio's drawing": Saver(save_drawing_list, read_drawing_list),
    "studio's upload": Saver(save_bytes, snapshot),
    "tune's journal": Saver(save_journal, read_journal),
}
