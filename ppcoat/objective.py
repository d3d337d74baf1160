"""What a step minimises: flow matching, the objective that FLUX and NewBie-image were trained with.

    FLUX      x_t = (1 - sigma) * latents + sigma * noise          the model predicts noise - latents
    NewBie    x_t = t * latents + (1 - t) * noise                  the model predicts latents - noise

So NewBie's t is 1 - sigma, and its velocity has the opposite sign. NewBie's times are logit-normal, then
shifted by the number of image tokens of the batch (not of the configured resolution: buckets differ).

Sources: rectified flow (arXiv 2209.03003) as in the FLUX training scripts of diffusers and ai-toolkit; the
transport of the public NewBie-image trainer (Linear path, velocity prediction).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle

from ppcoat.data.cache import CLASS
from ppcoat.lora import lora_disabled
from ppcoat.models.flux.picture_inputs import fill_latents, pack_references
from ppcoat.models.flux.scheduler import calculate_shift
from ppcoat.models.pictures import latent_image_ids, pack_latents

PSEUDO_HUBER_C = 0.01  # errors below it count by their square, errors above it by their size
# Weight of the loss at a noise level: ai-toolkit's "weighted" scheme, which its authors measured on a flow
# model. Theirs is a table of 1000 numbers with mean 1; straight lines between these agree within 0.025.
_WEIGHTED_SIGMA = (0.001, 0.014, 0.069, 0.1, 0.13, 0.278, 0.412, 0.548, 0.779, 0.826, 0.865, 0.919, 0.931,
                   0.957, 0.979, 0.987, 0.994, 1.0)  # fmt: skip
_WEIGHTED_LOSS = (0.447, 0.458, 0.649, 0.716, 0.733, 0.722, 0.817, 0.997, 1.408, 1.483, 1.52, 1.487, 1.459,
                  1.348, 1.19, 1.1, 0.969, 0.906)  # fmt: skip
_PATCH = 2  # latent pixels of a side per image token


@dataclass(frozen=True)
class FlowLoss:
    """mean: what is minimised, scalar float32 with its graph. of_pictures: float32 [B] without graph or
    weights, to be told apart by noise level."""

    mean: paddle.Tensor
    of_pictures: paddle.Tensor


class Objective:
    """What any objective can do that has `draw`, `predict` and `losses_at`."""

    def noise_levels(self, levels: np.ndarray) -> np.ndarray:
        """What `draw` gives -> share of noise, 1 for noise alone; and back."""
        return levels

    def loss(self, transformer: paddle.nn.Layer, batch: dict, rng: np.random.Generator) -> paddle.Tensor:
        """`loss_at` with noise levels and noise from `draw`, scalar float32."""
        return self.loss_at(transformer, batch, *self.draw(batch, rng))

    def loss_at(self, transformer, batch: dict, levels: np.ndarray, noise: np.ndarray) -> paddle.Tensor:
        """The mean of `losses_at`, scalar float32."""
        return self.losses_at(transformer, batch, levels, noise).mean

    def preservation_at(
        self, transformer, batch: dict, levels: np.ndarray, noise: np.ndarray
    ) -> paddle.Tensor:
        """How far the adapter moves what the model predicts for the class captions of a batch, scalar
        float32: the mean square between its predictions with the adapter and without, for the pictures,
        noise levels and noise of `losses_at`. Source: differential output preservation of ai-toolkit.
        """
        of_class = [name for name in batch if name.startswith(CLASS)]
        batch = batch | {name.removeprefix(CLASS): batch[name] for name in of_class}
        with paddle.no_grad(), lora_disabled(transformer):
            wanted, _ = self.predict(transformer, batch, levels, noise)
        found, _ = self.predict(transformer, batch, levels, noise)
        return (found - wanted).square().mean()


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Draws noise levels and noise, runs the transformer, returns the loss.

    timestep_type: "sigmoid" (sigmoid of a normal number), "linear" (uniform), "shift" (uniform, then
    shifted by the number of image tokens as in sampling), "weighted" (uniform, and the loss of a picture is
    multiplied by `level_weights`). guidance: the value fed to the guidance embedding. loss_type: of the error
    e of the velocity, "mse" e^2, "mae" |e| or "pseudo_huber" sqrt(e^2 + c^2) - c with c = 0.01.
    """

    timestep_type: str = "sigmoid"
    guidance: float = 1.0
    loss_type: str = "mse"

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """-> noise levels [B] and noise [B, tokens, C * 4], float32.

        All randomness comes from `rng` on the host, so that a step is the same on every device.
        """
        count, channels, height, width = batch["latents"].shape
        tokens = (height // 2) * (width // 2)
        sigma = self.draw_sigma(rng, count, tokens)
        return sigma, rng.standard_normal((count, tokens, 4 * channels), dtype=np.float32)

    def losses_at(self, transformer, batch: dict, sigma: np.ndarray, noise: np.ndarray) -> FlowLoss:
        """batch: latents [B, C, h, w], prompt_embeds [B, T, D], pooled [B, P] and, if wanted, loss_weight (a
        number, 1 by default, that multiplies the loss), loss_mask [B, h, w] (what each latent's error is
        multiplied by) and what `velocity` takes; noise levels [B] in 0..1 and noise [B, tokens, C * 4].
        """
        predicted, target = self.predict(transformer, batch, sigma, noise)
        distance = self._distance(predicted - target)
        if "loss_mask" in batch:  # of a token's 2 x 2 latents, the same for all channels
            weights = pack_latents(batch["loss_mask"].astype("float32").unsqueeze(1))
            distance = distance * weights.tile([1, 1, distance.shape[2] // 4])
        mean = distance.mean()
        if self.timestep_type == "weighted":
            mean = (distance.mean([1, 2]) * paddle.to_tensor(level_weights(sigma))).mean()
        weight = batch.get("loss_weight", 1.0)
        return FlowLoss(mean if weight == 1.0 else mean * weight, distance.detach().mean([1, 2]))

    def predict(
        self, transformer, batch: dict, sigma: np.ndarray, noise: np.ndarray
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The velocity that the transformer predicts and the true one, float32 [B, tokens, C * 4]; arguments
        as in `losses_at`."""
        noise = paddle.to_tensor(noise, dtype="float32")
        mix = paddle.to_tensor(sigma, dtype="float32").reshape([-1, 1, 1])
        clean = pack_latents(batch["latents"]).astype("float32")
        noisy = (1 - mix) * clean + mix * noise
        predicted = velocity(transformer, batch, noisy, sigma, self.guidance)
        return predicted.astype("float32"), noise - clean

    def draw_sigma(self, rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
        """Noise levels, float32 [count] in 0..1."""
        if self.timestep_type == "sigmoid":
            return (1 / (1 + np.exp(-rng.standard_normal(count)))).astype(np.float32)
        sigma = rng.uniform(size=count)
        if self.timestep_type == "shift":
            shift = math.exp(calculate_shift(tokens))
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return sigma.astype(np.float32)

    def _distance(self, error: paddle.Tensor) -> paddle.Tensor:
        if self.loss_type == "mae":
            return error.abs()
        if self.loss_type == "pseudo_huber":
            return (error.square() + PSEUDO_HUBER_C**2).sqrt() - PSEUDO_HUBER_C
        return error.square()


def velocity(
    transformer: paddle.nn.Layer, batch: dict, x: paddle.Tensor, levels: np.ndarray, guidance: float
) -> paddle.Tensor:
    """What a FLUX transformer predicts for noisy latents x [B, tokens, C * 4] at noise levels [B] in 0..1, of
    the shape of x, in the dtype of the model.

    batch: see FlowMatching.losses_at; x is cast to the dtype of its latents. It is shown, after the noisy
    tokens, the references that there are: reference_0, reference_1, ..., latents [B, C, h', w'] each; and a
    Fill model, beside the noise, masked_latents [B, C, h, w] and mask uint8 [B, 1, 8h, 8w]. guidance: for the
    guidance embedding, where the model has one.
    """
    height, width = (side // 2 for side in batch["latents"].shape[-2:])
    embeds = batch["prompt_embeds"]
    with_guidance = transformer.config.guidance_embeds
    seen, ids = x.astype(batch["latents"].dtype), latent_image_ids(height, width)
    if "masked_latents" in batch:
        beside = fill_latents(batch["masked_latents"], batch["mask"])
        seen = paddle.concat([seen, pack_latents(beside)], axis=-1)
    references = [batch[name] for name in batch if name.startswith("reference_")]
    if references:
        tokens, places = pack_references(references)
        seen, ids = paddle.concat([seen, tokens], axis=1), paddle.concat([ids, places])
    predicted = transformer(
        hidden_states=seen,
        encoder_hidden_states=embeds,
        pooled_projections=batch["pooled"],
        timestep=paddle.to_tensor(levels, dtype="float32"),
        img_ids=ids,
        txt_ids=paddle.zeros([embeds.shape[1], 3]),
        guidance=paddle.full([x.shape[0]], guidance, dtype="float32") if with_guidance else None,
        return_dict=False,
    )[0]
    return predicted[:, : x.shape[1]] if references else predicted


def level_weights(sigma: np.ndarray) -> np.ndarray:
    """Factors of the loss at noise levels in 0..1 for timestep_type "weighted", float32, about 1 on
    average."""
    return np.interp(sigma, _WEIGHTED_SIGMA, _WEIGHTED_LOSS).astype(np.float32)


class NewbieFlowMatching(Objective):
    """Draws times and noise, runs NextDiT_CLIP, returns the loss; the same methods as FlowMatching."""

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """-> times [B] and noise [B, C, h, w], float32; all randomness is `rng`'s, on the host."""
        count, _, height, width = shape = batch["latents"].shape
        times = self.times(rng.standard_normal(count), (height // _PATCH) * (width // _PATCH))
        return times, rng.standard_normal(shape, dtype=np.float32)

    def noise_levels(self, levels: np.ndarray) -> np.ndarray:
        """Times -> share of noise; and back."""
        return 1 - levels

    def losses_at(self, transformer, batch: dict, times: np.ndarray, noise: np.ndarray) -> FlowLoss:
        """batch: latents [B, C, h, w], cap_feats [B, L, D], cap_mask [B, L], clip_text_pooled [B, P] and, if
        wanted, loss_weight (a number that multiplies the mean); times [B] in 0..1 and noise [B, C, h, w].
        """
        predicted, target = self.predict(transformer, batch, times, noise)
        of_pictures = (predicted - target).square().mean([1, 2, 3])
        mean, weight = of_pictures.mean(), batch.get("loss_weight", 1.0)
        return FlowLoss(mean if weight == 1.0 else mean * weight, of_pictures.detach())

    def predict(
        self, transformer, batch: dict, times: np.ndarray, noise: np.ndarray
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The velocity that the transformer predicts and the true one, float32 [B, C, h, w]; arguments as in
        `losses_at`."""
        latents = batch["latents"]
        times = paddle.to_tensor(times, dtype="float32")
        noisy, target = interpolate(latents, paddle.to_tensor(noise, dtype="float32"), times)
        velocity = transformer(
            noisy.astype(batch["cap_feats"].dtype),  # the weights'; latents may be more exact
            times,
            batch["cap_feats"],
            batch["cap_mask"],
            batch["clip_text_pooled"],
        )
        return velocity.astype("float32"), target

    def times(self, raw: np.ndarray, tokens: int) -> np.ndarray:
        """Normal draws [B] -> times, float32 [B] in 0..1: their sigmoid, moved towards noise, the more the
        larger the picture.

        tokens: image tokens of a picture. The shift is sigma' = e^mu sigma / (1 + (e^mu - 1) sigma) of sigma
        = 1 - t, with mu of `calculate_shift`, not clamped.
        """
        sigma = 1 / (1 + np.exp(np.asarray(raw, dtype="float64")))
        factor = math.exp(calculate_shift(tokens))
        return (1 - factor * sigma / (1 + (factor - 1) * sigma)).astype(np.float32)


def interpolate(
    latents: paddle.Tensor, noise: paddle.Tensor, times: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(x_t, target), float32: t * latents + (1 - t) * noise and latents - noise. Both [B, ...], times [B]."""
    clean = latents.astype("float32")
    t = times.reshape([-1] + [1] * (clean.ndim - 1))
    return t * clean + (1 - t) * noise, clean - noise
