"""The plan of a FLUX-Lightning run: the plan of its LoRA, and what the discriminator's heads add.

A step trains either the heads or the LoRA. Heads' turn: the transformer saves nothing for backward, and heads
run one by one, but the gradients of all of them stay until the update, which gives them back head by head.
LoRA's turn: the student's pass, the teacher's pass under the heads and, with the reflow loss, a second pass
of the student are all saved until one backward, and beside them the gradient of every head's features
(distill/discriminator.py). Between two steps the next pictures may be encoded (distill/encoding.py), one by
one, while blocks of the transformer wait in host memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ppcoat.config.lightning import LightningConfig
from ppcoat.optim import FP8QuantizationConfig, update_bytes
from ppcoat.plan.model import FLOAT32
from ppcoat.plan.phases import MemoryModel, Phase, Settings
from ppcoat.plan.settings import as_given

# Transient memory of a head that goes forward and backward, in float32 tensors of image tokens x width:
# measured with Paddle's allocator on the CPU. With bfloat16 features it is less.
HEAD_WORKING = 9.0


@dataclass(frozen=True)
class Heads:
    """How many there are, and their width: that of the transformer's tokens."""

    count: int
    width: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Of one head's parameters: two layers width x width with biases and norms, and the score's."""
        square, vector = (self.width, self.width), (self.width,)
        return [square, square, *[vector] * 6, (self.width, 1), (1,)]

    @property
    def bytes_of_one(self) -> int:
        """Of the float32 parameters of one head."""
        return FLOAT32 * sum(map(math.prod, self.shapes()))

    def optimizer_bytes(self, config: LightningConfig) -> int:
        """Second moments of all heads: beta1 is 0, so there is no first; AdamW keeps both all the same."""
        if not config.fp8_optimizer:
            return 2 * self.count * self.bytes_of_one
        return self.count * FP8QuantizationConfig().state_bytes(self.shapes(), beta1=0.0)


class LightningMemoryModel(MemoryModel):
    """A MemoryModel of a distillation. transformer: as MemoryModel takes them."""

    def __init__(self, config: LightningConfig, on_gpu: bool, transformer: dict | None = None) -> None:
        super().__init__(config.run_config(config.data_path), on_gpu, transformer)
        self.lightning = config
        every = 2 if config.head_blocks == "published" else 1
        count = len(self.model.blocks[::every]) if config.adv_weight > 0 else 0
        self.heads = Heads(count, self.model.width)
        self.head_states = self.heads.optimizer_bytes(config)

    @property
    def settings(self) -> Settings:
        """The settings of the config."""
        return as_given(self.config, len(self.model.blocks))

    def phases(self, settings: Settings) -> tuple[Phase, ...]:
        """All phases of a run, in order. An update takes one head after the other and gives its gradients
        back."""
        own = {phase.name: phase.parts for phase in super().phases(settings)}
        count, one = self.heads.count, self.heads.bytes_of_one
        learner = own["update"] | {"heads": count * one, "head states": self.head_states}
        judging = learner | {"head gradients": count * one}
        named = [("captions", own["captions"]), ("pictures", own["pictures"])]
        named.append(("window", learner | self._encoding(settings)))
        if self.heads.count:
            transient = update_bytes(one // FLOAT32, self.on_gpu) if self.lightning.fp8_optimizer else one
            named += [
                ("heads' step", judging | {"working": self._judging(settings)}),
                ("their update", judging | {"working": transient}),
            ]
        named += [("LoRA's step", learner | self._learning(settings)), ("its update", learner)]
        if "previews" in own:
            resident = {name: learner[name] for name in ("heads", "head states")}
            named.append(("previews", own["previews"] | resident))
        return tuple(Phase(name, parts) for name, parts in named)

    def _encoding(self, settings: Settings) -> dict[str, int]:
        """What differs while encoders are there beside the learner: on a GPU, the last blocks that weigh as
        much have left."""
        encoders, count = self.model.encoders, len(self.model.blocks)
        weight = encoders.text * self.itemsize + encoders.vae * self.vae_itemsize
        base, room = self.base_by_swapped(settings.quantize)[settings.blocks_to_swap], weight
        _, blocks = self.weight_bytes(settings.quantize)
        for block in reversed(blocks[: count - settings.blocks_to_swap]):
            if self.on_gpu and room > 0:
                base, room = base - block, room - block
        reading = encoders.text_working(1, self.text_tokens, self.itemsize)
        seeing = encoders.vae_working(
            self.token_side**2 * self.image_tokens, self.vae_itemsize, False, self.on_gpu
        )
        return {"base": base, "encoders": weight, "working": max(reading, seeing)}

    def _judging(self, settings: Settings) -> int:
        """Working memory of the heads' turn: a pass without gradients, and the head in its midst."""
        return self._drawing_working(settings, settings.batch_size) + self._head_working(settings)

    def _learning(self, settings: Settings) -> dict[str, int]:
        """What the LoRA's turn holds beyond the weights when its backward begins."""
        adversarial = self.heads.count > 0
        graphs = 1 + adversarial + self.lightning.apply_reflow_loss
        saved, working = self.activations(settings)
        features = settings.batch_size * self.image_tokens * self.model.width * self.itemsize
        return {
            "kept": graphs * saved,
            "head features": self.heads.count * features,
            "working": max(working, self._judging(settings) if adversarial else 0),
        }

    def _head_working(self, settings: Settings) -> int:
        values = settings.batch_size * self.image_tokens * self.model.width
        copies = 2 * self.model.width**2 * self.itemsize  # of its float32 weights, in the compute dtype
        return int(HEAD_WORKING * FLOAT32 * values) + copies
