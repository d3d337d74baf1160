"""Train the small FLUX transformer of the built-in tiny FLUX on latents of drawings, by flow matching.

A FluxTransformer2DModel in the layout of FLUX.1-dev with 2.4 M parameters. Pictures are drawn and encoded
once.

Its matrices are trained by Muon: momentum with an orthogonalised update. On these drawings 500 steps of it
reach the loss that AdamW reaches after about 1,500. Source: Jordan et al., "Muon: an optimizer for hidden
layers in neural networks" (2024). The scale of the update is that of Liu et al., "Muon is scalable for LLM
training" (2025), section 2.2, with which AdamW's learning rates fit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
from paddle.io import DataLoader, Dataset

from ppcoat.atomic import whole_file
from ppcoat.data import garments
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.scheduler import calculate_shift
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.pictures import latent_image_ids, pack_latents
from ppcoat.models.writing import save_diffusers_model
from ppcoat.pretrain import DenoiserTraining
from ppcoat.pretrain.autoencoder import HELD_OUT_SEED, to_pixels
from ppcoat.pretrain.text import CLIP_WIDTH, T5_WIDTH, reword_caption
from ppcoat.progress import Progress
from ppcoat.train.ranks import Ranks

SAVE_EVERY = 1000  # steps between saves
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5 drives singular values to about 1


def build_transformer() -> FluxTransformer2DModel:
    """2 double + 4 single blocks, 4 heads of 32; every block starts as the identity and the output as zero
    (adaLN-Zero: Peebles and Xie, "Scalable diffusion models with transformers", 2023, section 3.2)."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(".linear.weight") or name == "proj_out.weight":
            parameter.set_value(paddle.zeros_like(parameter))
    return transformer


class CaptionedDrawings(Dataset):
    """Item i: (float32 [3, size, size] in -1..1, caption). Only trained captions and trained seeds."""

    def __init__(self, count: int, size: int, seed: int):
        super().__init__()
        self.size, self.count, self.first_seed = size, count, (seed + 1) * 1_000_000
        self.garments, _ = garments.split_garments()
        assert self.first_seed + count < HELD_OUT_SEED

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        rng = np.random.default_rng([self.first_seed, i])
        garment = garments.choose(self.garments, rng)
        picture = garments.draw(garment, self.first_seed + i, self.size)
        return to_pixels(picture), reword_caption(garment.caption, rng)


@paddle.no_grad()
def encode_drawings(pipeline: FluxPipeline, training: DenoiserTraining, file: Path, workers: int = 2) -> dict:
    """Draw and encode pictures and captions, and write the arrays to `file` (.npz), which a second call
    reads.

    -> latents [N, tokens, 16] (packed to tokens, deviation 1), prompt_embeds [N, L, T5 width], pooled [N,
    CLIP width], and those of the empty caption: empty_embeds [L, T5 width], empty_pooled [CLIP width].
    float32.
    """
    if not file.exists():
        drawings = CaptionedDrawings(training.pictures, training.size, training.seed)
        parts: dict[str, list[np.ndarray]] = {"latents": [], "prompt_embeds": [], "pooled": []}
        for pixels, captions in Progress(
            DataLoader(drawings, batch_size=100, num_workers=workers), desc="drawings"
        ):
            latents = pack_latents(pipeline.encode_image(pixels))
            embeds, pooled, _ = pipeline.encode_prompt(list(captions))
            for name, value in (("latents", latents), ("prompt_embeds", embeds), ("pooled", pooled)):
                parts[name].append(value.numpy().astype(np.float16))
        with whole_file(file) as draft:
            np.savez(draft, **{name: np.concatenate(values) for name, values in parts.items()})
    data = {name: array.astype(np.float32) for name, array in np.load(file).items()}
    embeds, pooled, _ = pipeline.encode_prompt("")
    return {**data, "empty_embeds": embeds[0].numpy(), "empty_pooled": pooled[0].numpy()}


def train_transformer(
    transformer: FluxTransformer2DModel,
    data: dict,
    training: DenoiserTraining,
    folder: Path,
    ranks: Ranks | None = None,
) -> list[float]:
    """Train `transformer` by flow matching -> the loss of every step. All ranks together share a batch.

    data: as `encode_drawings` returns it. The running mean of the weights draws best: it is written to
    `folder` every SAVE_EVERY steps, and `transformer` gets it at the end.
    """
    ranks = ranks or Ranks()
    training = replace(
        training,
        batch_size=len(ranks.share(range(training.batch_size))),
        seed=training.seed * ranks.size + ranks.rank,
    )
    paddle.seed(training.seed)
    matrices, others = _trained_parameters(transformer)
    ranks.broadcast([*matrices, *others])
    muon = Muon(matrices, ranks=ranks)
    adamw = paddle.optimizer.AdamW(training.learning_rate, parameters=others, weight_decay=0.01,
                                   grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0))  # fmt: skip
    average = FluxTransformer2DModel.from_config(transformer.config)
    average.set_state_dict(transformer.state_dict())
    batches = FlowBatches(data, average, training)
    losses = []
    transformer.train()
    bar = Progress(range(1, training.steps + 1), desc="transformer", disable=not ranks.is_first)
    for step in bar:
        arguments, target = batches.draw(guided=step > training.guided_after)
        loss = (transformer(**arguments)[0] - target).square().mean()
        loss.backward()
        ranks.average_gradients([*matrices, *others])
        rate = _rate(step, training)
        muon.step(training.matrix_learning_rate * rate)
        adamw.set_lr(training.learning_rate * rate)
        adamw.step()
        muon.clear_grad()
        adamw.clear_grad()
        _update_average(average, transformer, min(training.ema_decay, (1 + step) / (10 + step)))
        losses.append(float(loss))
        if step % 25 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", lr=f"{adamw.get_lr():.1e}")
        if ranks.is_first and (step % SAVE_EVERY == 0 or step == training.steps):
            save_diffusers_model(average, folder)
    transformer.set_state_dict(average.state_dict())
    transformer.eval()
    return losses


class FlowBatches:
    """Draws noisy latents and their targets (noise - latents).

    Noise levels are distributed as in sampling: uniform, then shifted. The sigmoid of a normal number, which
    LoRA training uses, rarely comes near 1, where the layout of a picture is decided.

    As in FLUX.1-dev, the guidance embedding learns to replace classifier-free guidance. Half of a guided
    batch has a guidance above 1; its target is moved by (guidance - 1) times the change that the caption
    makes to the `teacher`'s velocity. All other rows have guidance 1 and, in a few cases, an empty caption.
    At the highest noise levels guidance has no effect, so that pictures stay diverse. (Guidance distillation:
    Meng et al., "On distillation of guided diffusion models", 2023. From a model that still learns: Tang et
    al., "Diffusion models without classifier-free guidance", 2025. Not at all noise levels: Kynkaanniemi et
    al., "Applying guidance in a limited interval improves sample and distribution quality in diffusion
    models", 2024.)
    """

    def __init__(self, data: dict, teacher: FluxTransformer2DModel, training: DenoiserTraining):
        self.data, self.teacher, self.training = data, teacher, training
        self.rng = np.random.default_rng(training.seed)
        tokens = data["latents"].shape[1]
        self.positions = {
            "img_ids": latent_image_ids(int(tokens**0.5), int(tokens**0.5)),
            "txt_ids": paddle.zeros([data["prompt_embeds"].shape[1], 3]),
            "return_dict": False,
        }
        self.shift = math.exp(calculate_shift(tokens))

    def draw(self, guided: bool) -> tuple[dict, paddle.Tensor]:
        """-> (arguments of the transformer, target float32 [B, tokens, 16])."""
        size = self.training.batch_size
        rows = self.rng.integers(len(self.data["latents"]), size=size)
        latents = paddle.to_tensor(self.data["latents"][rows])
        level = self.rng.uniform(size=size)
        sigma = paddle.to_tensor(self.shift * level / (1 + (self.shift - 1) * level), dtype="float32")
        noise, mix = paddle.randn(latents.shape), sigma.reshape([-1, 1, 1])
        noisy, target = (1 - mix) * latents + mix * noise, noise - latents

        count, guidance = size // 2 if guided else 0, np.ones(size)
        guidance[:count] = self.rng.uniform(1, self.training.largest_guidance, count)
        dropped = self.rng.uniform(size=size) < self.training.caption_dropout
        dropped[:count] = False
        embeds, pooled = self.data["prompt_embeds"][rows], self.data["pooled"][rows]
        inside = np.flatnonzero((guidance > 1) & (sigma.numpy() <= self.training.guided_below))
        if len(inside):
            change = self.caption_change(noisy[inside], sigma[inside], embeds[inside], pooled[inside])
            moves = np.zeros(target.shape, np.float32)
            moves[inside] = (guidance[inside] - 1).reshape([-1, 1, 1]) * change.numpy()
            target = target + paddle.to_tensor(moves)
        embeds[dropped], pooled[dropped] = self.data["empty_embeds"], self.data["empty_pooled"]
        return self._arguments(noisy, sigma, embeds, pooled, guidance), target

    @paddle.no_grad()
    def caption_change(
        self, noisy: paddle.Tensor, sigma: paddle.Tensor, embeds: np.ndarray, pooled: np.ndarray
    ) -> paddle.Tensor:
        """The teacher's velocity with these captions minus that with empty captions, both at guidance 1.

        noisy and the result float32 [B, tokens, 16], sigma [B], embeds [B, L, T5 width], pooled
        [B, CLIP width].
        """
        count = len(embeds)
        empty = (self.data["empty_embeds"], self.data["empty_pooled"])
        embeds, pooled = (
            np.concatenate([given, np.repeat(none[None], count, axis=0)])
            for given, none in zip((embeds, pooled), empty, strict=True)
        )
        noisy, sigma = (paddle.concat([each, each]) for each in (noisy, sigma))
        answer = self.teacher(**self._arguments(noisy, sigma, embeds, pooled, np.ones(2 * count)))[0]
        return answer[:count] - answer[count:]

    def _arguments(self, noisy, sigma, embeds, pooled, guidance) -> dict:
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": paddle.to_tensor(embeds),
            "pooled_projections": paddle.to_tensor(pooled),
            "timestep": sigma,
            "guidance": paddle.to_tensor(guidance, dtype="float32"),
            **self.positions,
        }


def _trained_parameters(transformer: FluxTransformer2DModel) -> tuple[list, list]:
    """(matrices of the blocks, for Muon; the rest, for AdamW). Biases of Linears that see every token are
    frozen at zero, because on a CPU their gradients take a sixth of a step."""
    matrices, others = [], []
    for name, parameter in transformer.named_parameters():
        in_block = "transformer_blocks" in name
        if in_block and name.endswith(".bias") and "norm" not in name:
            parameter.stop_gradient = True
        elif in_block and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return matrices, others


def _rate(step: int, training: DenoiserTraining) -> float:
    """Share of the full learning rates at `step` (counted from 1)."""
    left = (training.steps - step + 1) / max(1, training.decay * training.steps)
    return min(1.0, step / training.warmup, left)


@paddle.no_grad()
def _update_average(average: paddle.nn.Layer, model: paddle.nn.Layer, decay: float) -> None:
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.scale_(decay)
        mean.add_(parameter * (1 - decay))


class Muon:
    """Optimizer for matrices. Those of one shape, or its transpose, are updated in one batch.

    parameters: trainable 2-D tensors; each must have a gradient at `step`. ranks: those that train together,
    with equal parameters and gradients; each rank computes the updates of some shapes for all of them. Raises
    ValueError for a parameter that is not 2-D.
    """

    def __init__(
        self, parameters: list, momentum: float = 0.95, weight_decay: float = 0.01, ranks: Ranks | None = None
    ):
        self.momentum, self.weight_decay = momentum, weight_decay
        self._ranks = ranks or Ranks()
        self._groups: dict[tuple[int, int], list] = {}
        for parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"{parameter.name}: Muon takes matrices, not shape {parameter.shape}")
            self._groups.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        owners = _owners({shape: len(group) for shape, group in self._groups.items()}, self._ranks.size)
        self._moments = {
            shape: paddle.zeros([len(group), *shape])
            for shape, group in self._groups.items()
            if owners[shape] == self._ranks.rank
        }

    @paddle.no_grad()
    def step(self, learning_rate: float) -> None:
        updates = [
            self._update(shape) if shape in self._moments else paddle.zeros([len(group), *shape])
            for shape, group in self._groups.items()
        ]
        for (shape, parameters), group_updates in zip(
            self._groups.items(), self._of_all_ranks(updates), strict=True
        ):
            scale = -learning_rate * 0.2 * max(shape) ** 0.5
            for parameter, update in zip(parameters, group_updates, strict=True):
                parameter.scale_(1 - learning_rate * self.weight_decay)
                parameter.add_((update if tuple(parameter.shape) == shape else update.T) * scale)

    def _update(self, shape: tuple[int, int]) -> paddle.Tensor:
        """The orthogonalised update [n, *shape] of the matrices of one shape; updates their momentum."""
        gradients = paddle.stack(
            [p.grad if tuple(p.shape) == shape else p.grad.T for p in self._groups[shape]]
        )
        moment = self._moments[shape]
        moment.scale_(self.momentum)
        moment.add_(gradients * (1 - self.momentum))
        return orthogonalized(gradients * (1 - self.momentum) + moment * self.momentum)

    def _of_all_ranks(self, updates: list[paddle.Tensor]) -> list[paddle.Tensor]:
        if self._ranks.size == 1:
            return updates
        flat = self._ranks.sum(paddle.concat([update.flatten() for update in updates]))
        pieces = flat.split([update.size for update in updates])
        return [piece.reshape(update.shape) for piece, update in zip(pieces, updates, strict=True)]

    def clear_grad(self) -> None:
        for parameters in self._groups.values():
            for parameter in parameters:
                parameter.clear_gradient(set_to_zero=False)


def _owners(groups: dict[tuple[int, int], int], ranks: int) -> dict[tuple[int, int], int]:
    """{shape: rank that updates it}, with about equal work on all ranks. groups: {(rows <= columns): number
    of matrices}."""
    work = [0.0] * ranks
    owners = {}
    cost = {shape: count * shape[0] ** 2 * (2 * shape[1] + shape[0]) for shape, count in groups.items()}
    for shape in sorted(cost, key=cost.get, reverse=True):
        owners[shape] = work.index(min(work))
        work[owners[shape]] += cost[shape]
    return owners


def orthogonalized(matrices: paddle.Tensor, iterations: int = 5) -> paddle.Tensor:
    """Newton-Schulz iteration: float32 [n, rows <= columns, columns] -> matrices of the same shape and
    singular vectors, with singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.square().sum(axis=[1, 2], keepdim=True).sqrt() + 1e-7)
    for _ in range(iterations):
        square = paddle.bmm(x, x.transpose([0, 2, 1]))
        x = a * x + paddle.bmm(b * square + c * paddle.bmm(square, square), x)
    return x
