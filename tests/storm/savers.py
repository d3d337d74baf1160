"""Everything that reports a result as written, as savers that the storm can run: how version k is written,
and what is found when it is read again.
"""

import base64
import io
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
from disk import snapshot
from PIL import Image
from safetensors.numpy import save as numpy_bytes
from safetensors.paddle import save

from ppcoat.atomic import remove_dead_drafts, whole_file, write_text
from ppcoat.cli.merge import write_merged
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.laion import LaionSource, unpack_laion
from ppcoat.infer.generate import save_picture
from ppcoat.lora import LoRAModule, read_lora_file, write_lora_file
from ppcoat.lora.layer import inject_lora
from ppcoat.lora.peft import save_comfyui, save_peft
from ppcoat.models import writing
from ppcoat.models.newbie import convert
from ppcoat.models.newbie.convert import checkpoint_infos, write_newbie_folder
from ppcoat.models.quantized_base import QuantizedCopy
from ppcoat.models.writing import write_component
from ppcoat.studio.runs import Queue
from ppcoat.train.checkpoint import load_latest, save_checkpoint


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


def once(write: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    """For results that are never replaced: the command says that it is there."""

    def save(root: Path, k: int) -> None:
        if not (root / "out" / str(k)).exists():
            write(root / "out" / str(k), k)

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


def save_queue(root: Path, k: int) -> None:
    queue = Queue(root / "studio")
    queue.add(SimpleNamespace(folder=Path(f"/runs/{k}"), is_alive=False))


def read_queue(root: Path) -> object:
    return [str(path) for path in Queue(root / "studio").waiting]


def save_drawing(root: Path, k: int) -> None:
    save_picture(Image.new("RGB", (8, 8), (k, 0, 0)), root / "drawn", k, "a dress", 0)


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
    "LoRA file, diffusers": lora_saver("diffusers"),
    "LoRA file, kohya": lora_saver("kohya"),
    "LoRA file, paddle": lora_saver("paddle"),
    "NewBie adapter": Saver(save_newbie, read_lora("adapter", ["to_q"])),
    "LoRA file, ComfyUI": Saver(save_comfy, read_lora("comfyui.safetensors", ["to_q"])),
    "cache of encodings": Saver(save_encodings, read_encodings),
    "quantised copy": Saver(save_copy, read_copy),
    "merge": Saver(once(save_merged), snapshot),
    "convert-newbie": Saver(once(save_converted), snapshot),
    "unpacked LAION": Saver(once(save_unpacked), snapshot),
    "drawn picture": Saver(save_drawing, snapshot),
    "config.yaml": Saver(save_text, snapshot),
    "studio's queue": Saver(save_queue, read_queue),
    "studio's upload": Saver(save_bytes, snapshot),
}
