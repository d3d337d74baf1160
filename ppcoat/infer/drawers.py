"""Drawing in two steps, alike for FLUX and NewBie: the texts of all pictures are encoded, each once, and then
the pictures are drawn; in between the text encoders can leave the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import paddle
from PIL import Image

from ppcoat.infer.editing import Sight, edit_arguments, edit_class, own_guidance
from ppcoat.lora import LoRAFile, put_adapters
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.progress import Progress

Loras = list[tuple[LoRAFile, float]]  # with their strengths
Texts = tuple[str, ...]  # what the encoders see at once
Encoded = Mapping[str, paddle.Tensor]  # argument of the pipeline -> its value, on the host
# Pictures whose texts are in host memory at a time: 4 MiB a text with FLUX.1's T5, 5 with NewBie's Gemma.
AT_ONCE = 256


class Drawer(ABC):
    """A pipeline that is loaded, with its LoRAs at the strengths of `loras`."""

    def __init__(self, pipeline: FluxPipeline | NewbiePipeline, loras: Loras) -> None:
        self.pipeline = pipeline
        self.files = [file for file, _ in loras]
        self.strengths = tuple(by for _, by in loras)

    @abstractmethod
    def texts(self, drawing: Any) -> list[Texts]:
        """What is encoded for a drawing of one prompt."""

    @abstractmethod
    def encode(self, texts: Texts, length: int | None) -> Encoded:
        """Tensors [rows, ...] in the transformer's dtype; length: at most so many tokens."""

    @abstractmethod
    def draw(self, drawing: Any, encoded: Sequence[Encoded]) -> list[Image.Image]:
        """num_images pictures from what `encode` made of each of `texts`."""

    @abstractmethod
    def put(self, strengths: Sequence[float]) -> None:
        """Set the LoRAs' strengths; nothing is read again."""

    def drawn(self, drawings: Iterable[Any]) -> Iterator[list[Image.Image]]:
        """The pictures of each drawing (an infer.drawing.Drawing of one prompt)."""
        drawings = list(drawings)
        remaining, left = iter(drawings), len(drawings)
        while some := list(islice(remaining, AT_ONCE)):
            known: dict[tuple, Encoded] = {}
            distinct = self._distinct(some)
            for key, texts, drawing in Progress(distinct, "encoding prompts", unit="prompt"):
                if self._changes_encoders:
                    self._set(drawing)
                known[key] = self.encode(texts, drawing.max_sequence_length)
            left -= len(some)
            if not left and not self._changes_encoders:
                self.release_encoders()
            for drawing in some:
                self._set(drawing)
                keys = [self._key(texts, drawing) for texts in self.texts(drawing)]
                yield self.draw(drawing, [_on_device(known[key]) for key in keys])

    def release_encoders(self) -> None:
        """All is encoded: where parts are moved at all, the text encoders go."""
        self.pipeline.release_encoders()

    @property
    def _changes_encoders(self) -> bool:
        return any(change.part != "transformer" for file in self.files for change in file.changes)

    def _key(self, texts: Texts, drawing: Any) -> tuple:
        """What decides an encoding."""
        by = tuple(by for _, by in drawing.loras) if self._changes_encoders else ()
        return by, drawing.max_sequence_length, texts

    def _distinct(self, drawings: Sequence[Any]) -> list[tuple[tuple, Texts, Any]]:
        """(key, texts, a drawing) of all; those of one strength side by side."""
        found = {self._key(texts, each): (texts, each) for each in drawings for texts in self.texts(each)}
        return [(key, *found[key]) for key in sorted(found, key=lambda key: key[0])]

    def _set(self, drawing: Any) -> None:
        wanted = tuple(by for _, by in drawing.loras)
        if wanted != self.strengths:
            self.put(wanted)
            self.strengths = wanted


class FluxDrawer(Drawer):
    """control_image: what a control LoRA or FLUX.1 Canny or Depth draws after, else None. sight: of the
    model, which with a drawing's pictures says which pipeline draws it."""

    def __init__(
        self, pipeline: FluxPipeline, loras: Loras, control_image: Image.Image | None, sight: Sight
    ) -> None:
        super().__init__(pipeline, loras)
        self.control_image, self.sight = control_image, sight
        self._made = {FluxPipeline: pipeline}

    def texts(self, drawing: Any) -> list[Texts]:
        return [(drawing.prompt[0],)] + ([(drawing.negative_prompt,)] if drawing.true_cfg_scale > 1 else [])

    def encode(self, texts: Texts, length: int | None) -> Encoded:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(texts), max_sequence_length=length)
        return _on_host({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def draw(self, drawing: Any, encoded: Sequence[Encoded]) -> list[Image.Image]:
        given = dict(encoded[0])
        for each in encoded[1:]:
            given |= {f"negative_{name}": tensor for name, tensor in each.items()}
        kind = edit_class(drawing, self.sight)
        if self.control_image is not None:
            given["control_image"] = self.control_image
        return self._pipeline(kind)(
            **given,
            **_options(drawing, own_guidance(kind)),
            **edit_arguments(drawing, self.sight),
            true_cfg_scale=drawing.true_cfg_scale,
        ).images

    def _pipeline(self, kind: type[FluxPipeline]) -> FluxPipeline:
        """One that draws with the same models."""
        if kind not in self._made:
            self._made[kind] = kind(**self.pipeline.components)
            shown = getattr(self.pipeline, "_progress_bar_config", {})
            self._made[kind].set_progress_bar_config(**shown)
        return self._made[kind]

    def release_encoders(self) -> None:
        self._made = {FluxPipeline: self.pipeline}  # the others of an earlier round hold them, too
        super().release_encoders()

    def put(self, strengths: Sequence[float]) -> None:
        self.pipeline.set_adapters([f"lora_{i}" for i in range(len(strengths))], list(strengths))


class NewbieDrawer(Drawer):
    """Euler steps on a time grid with shift 6. A prompt and its negative are padded to one length."""

    pipeline: NewbiePipeline

    def texts(self, drawing: Any) -> list[Texts]:
        return [(drawing.prompt[0], drawing.negative_prompt)]

    def encode(self, texts: Texts, length: int | None) -> Encoded:
        return _on_host(self.pipeline.encode_prompt(list(texts), max_sequence_length=length))

    def draw(self, drawing: Any, encoded: Sequence[Encoded]) -> list[Image.Image]:
        count = drawing.num_images
        conditions = {name: rows.repeat_interleave(count, axis=0) for name, rows in encoded[0].items()}
        return self.pipeline(conditions=conditions, **_options(drawing, 5.0)).images

    def put(self, strengths: Sequence[float]) -> None:
        put_adapters(
            {"transformer": self.pipeline.transformer}, list(zip(self.files, strengths, strict=True))
        )


def _options(drawing: Any, guidance_scale: float) -> dict:
    """What both pipelines are called with; a size that was not given is the pipeline's own."""
    sizes = {"height": drawing.height, "width": drawing.width}
    return {
        "num_inference_steps": drawing.steps,
        "guidance_scale": guidance_scale if drawing.guidance_scale is None else drawing.guidance_scale,
        "num_images_per_prompt": drawing.num_images,
        "seed": drawing.seed,
        **{name: side for name, side in sizes.items() if side is not None},
    }


def _on_host(tensors: Encoded) -> Encoded:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _on_device(tensors: Encoded) -> Encoded:
    return {name: tensor.to(paddle.get_device()) for name, tensor in tensors.items()}
