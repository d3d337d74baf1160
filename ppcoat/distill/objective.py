"""What the two sides of the distillation minimise.

The generator is the LoRA: with it the frozen transformer is the student, without it the teacher.

    consistency   the student's jump from Euler step n to the end of its phase equals the jump that it makes
                  after the teacher has taken step n
    adversarial   heads on the teacher's blocks cannot tell the first jump (fake) from the second (real)
    matching      the teacher finds the student's samples as likely as the student itself does (DMD)
    reflow        from its own samples, noised again within the phase, the student returns to them

Randomness is drawn on the host for the whole global batch. All arithmetic on samples is float32; the model
gets the dtype of the latents. Sources: consistency models' pseudo-Huber (arXiv 2310.14189), hinge GAN as
phased consistency models have it (arXiv 2405.18407; discriminator.py), distribution matching (DMD, arXiv
2311.18828), reflow as in self-corrected flow distillation (arXiv 2412.16906); and solver.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import paddle

from ppcoat.distill.discriminator import Discriminator
from ppcoat.distill.solver import EulerPhases, jump, noised, per_picture
from ppcoat.lora import lora_disabled
from ppcoat.models.flux.scheduler import calculate_shift
from ppcoat.models.pictures import pack_latents
from ppcoat.objective import FlowLoss, Objective, velocity

NOISES = ("picture", "fake", "real", "matching", "reflow")
PLACES = ("adversarial", "matching", "reflow")
NORMALISER_FLOOR = 1e-5  # keeps the normaliser of distribution matching away from 0


@dataclass(frozen=True)
class Rules:
    """How known mistakes of the public code are handled: "fixed", or "published" to repeat them.

    forward_noise, dmd_normalizer: see solver.noised and matching_target below. reflow_entry: published, the
    jump back starts one Euler step above the level at which its input is. phase_delta: published, all
    pictures of a batch take as many teacher steps as the first (whole_phase only). last_sigma: see
    EulerPhases.of.
    """

    forward_noise: str = "fixed"
    reflow_entry: str = "fixed"
    dmd_normalizer: str = "fixed"
    phase_delta: str = "fixed"
    last_sigma: str = "fixed"


@dataclass(frozen=True)
class Terms:
    """loss_type: "huber" or "l2", of consistency. A weight of 0 leaves a term out. whole_phase: the teacher
    walks to the end of the phase instead of taking one step."""

    loss_type: str = "huber"
    huber_c: float = 1e-3
    adv_weight: float = 0.1
    dmd_weight: float = 0.0
    reflow_weight: float = 0.0
    whole_phase: bool = False


@dataclass
class Distillation(Objective):
    """The generator's loss. guidance: given to student and teacher alike. shift: image tokens -> mu.

    discriminator: wanted where terms.adv_weight is above 0. parts: the terms of the last loss by name,
    scalars without graph, each with its weight.
    """

    steps: int = 100
    phases: int = 4
    guidance: float = 3.5
    terms: Terms = field(default_factory=Terms)
    rules: Rules = field(default_factory=Rules)
    discriminator: Discriminator | None = None
    shift: Callable[[int], float] = calculate_shift
    parts: dict[str, paddle.Tensor] = field(default_factory=dict)

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """-> noise levels [B] float32, and a record per picture: `step` (of the solver), `places` [3] in 0..1
        (within the phase, for PLACES) and `noise` [5, tokens, C] (NOISES)."""
        count, channels, height, width = batch["latents"].shape
        tokens = (height // 2) * (width // 2)
        noise = (len(NOISES), tokens, 4 * channels)
        fields = [("step", "i8"), ("places", "f8", len(PLACES)), ("noise", "f4", noise)]
        drawn = np.zeros(count, dtype=fields)
        drawn["step"] = rng.integers(self.steps, size=count)
        drawn["places"] = rng.random([count, len(PLACES)])
        drawn["noise"] = rng.standard_normal(drawn["noise"].shape, dtype=np.float32)
        return self.solver(tokens).sigmas[drawn["step"]], drawn

    def losses_at(self, transformer, batch: dict, sigma: np.ndarray, drawn: np.ndarray) -> FlowLoss:
        """batch: latents [B, C, h, w], prompt_embeds, pooled; sigma and drawn as `draw` gives them.

        of_pictures are the consistency terms.
        """
        state = BatchState(self, transformer, batch, drawn)
        fake = state.jump_of_student()
        error = distance(fake, state.target(), self.terms.loss_type, self.terms.huber_c)
        parts = {"consistency": error.mean()}
        if self.terms.dmd_weight > 0:
            parts["matching"] = self.terms.dmd_weight * self._matching(state, fake)
        if self.terms.reflow_weight > 0:
            parts["reflow"] = self.terms.reflow_weight * self._reflow(state, fake.detach())
        if self.terms.adv_weight > 0:
            parts["adversarial"] = self.terms.adv_weight * self._adversarial(state, fake)
        self.parts = {name: part.detach() for name, part in parts.items()}
        return FlowLoss(sum(parts.values()), error.detach().mean([1, 2]))

    def solver(self, tokens: int) -> EulerPhases:
        """The Euler steps for pictures of so many image tokens."""
        return EulerPhases.of(self.shift(tokens), self.steps, self.phases, self.rules.last_sigma)

    def _adversarial(self, state: BatchState, fake: paddle.Tensor) -> paddle.Tensor:
        sigma = state.level_in_phase("adversarial")
        noisy = state.noised_to(fake, "fake", sigma)
        return self.discriminator.generator_loss(
            state.transformer, lambda: state.teacher_velocity(noisy, sigma)
        )

    def _matching(self, state: BatchState, fake: paddle.Tensor) -> paddle.Tensor:
        with paddle.no_grad():
            sigma = state.level_in_phase("matching")
            noisy = state.noised_to(fake, "matching", sigma)
            velocities = state.teacher_velocity(noisy, sigma), state.velocity(noisy, sigma)
            target = matching_target(fake, noisy, velocities, sigma, self.rules.dmd_normalizer)
        return (fake - target).square().mean()

    def _reflow(self, state: BatchState, fake: paddle.Tensor) -> paddle.Tensor:
        step, solver = state.step_in_phase("reflow"), state.solver
        level = solver.sigmas_next[step]
        noisy = state.noised_to(fake, "reflow", level)
        start = solver.sigmas[step] if self.rules.reflow_entry == "published" else level
        back = jump(noisy, state.velocity(noisy, level), start, state.sigma_end)
        return distance(back, fake, "huber", self.terms.huber_c).mean()


@dataclass
class DiscriminatorObjective(Objective):
    """The discriminator's turn, on the pictures, noise and levels that the generator would see.

    Nothing of the transformer's passes is saved. The heads' gradients are there when losses_at returns, each
    divided by `passes`, the forward passes of an update; `mean` has no way back to them.
    """

    generator: Distillation
    passes: int = 1
    parts: dict[str, paddle.Tensor] = field(default_factory=dict)

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As Distillation.draw."""
        return self.generator.draw(batch, rng)

    def losses_at(self, transformer, batch: dict, sigma: np.ndarray, drawn: np.ndarray) -> FlowLoss:
        """The hinge loss, a mean over heads; of_pictures repeats it for every picture."""
        heads, losses = self.generator.discriminator, {}
        with paddle.no_grad():
            state = BatchState(self.generator, transformer, batch, drawn)
            samples = {"fake": state.jump_of_student(), "real": state.target()}
            level = state.level_in_phase("adversarial")
            for kind, sample in samples.items():
                noisy = state.noised_to(sample, kind, level)
                losses[kind] = heads.train_heads(
                    transformer,
                    lambda noisy=noisy: state.teacher_velocity(noisy, level),
                    kind == "real",
                    1 / self.passes,
                )
        total = losses["fake"] + losses["real"]
        self.parts = {f"discriminator_{kind}": loss for kind, loss in losses.items()}
        mean = total.clone()
        mean.stop_gradient = False  # a leaf: going backward from it reaches nothing else
        return FlowLoss(mean, total.reshape([1]).tile([len(drawn)]))


class BatchState:
    """One batch and what was drawn for it: passes through student and teacher, and the samples they give."""

    def __init__(self, objective: Distillation, transformer, batch: dict, drawn: np.ndarray) -> None:
        self.transformer, self._batch, self._drawn = transformer, batch, drawn
        self._objective = objective
        clean = pack_latents(batch["latents"])
        self.solver = objective.solver(clean.shape[1])
        self.step = drawn["step"]
        self._start = self.solver.start_of(self.step)
        self.sigma, self.sigma_end = self.solver.sigmas[self.step], self.solver.sigmas_next[self._start]
        mix = per_picture(self.sigma)
        self.noisy = (1 - mix) * clean.astype("float32") + mix * self._noise("picture")

    def velocity(self, x: paddle.Tensor, sigma: np.ndarray) -> paddle.Tensor:
        """The transformer as it stands, at levels sigma [B]: [B, tokens, C] -> the same shape."""
        return velocity(self.transformer, self._batch, x, sigma, self._objective.guidance)

    def teacher_velocity(self, x: paddle.Tensor, sigma: np.ndarray) -> paddle.Tensor:
        """`velocity` without the LoRA, [B, tokens, C]."""
        with lora_disabled(self.transformer):
            return self.velocity(x, sigma)

    def jump_of_student(self) -> paddle.Tensor:
        """The student's sample at the end of the phase, float32 [B, tokens, C]."""
        return jump(self.noisy, self.velocity(self.noisy, self.sigma), self.sigma, self.sigma_end)

    @paddle.no_grad()
    def target(self) -> paddle.Tensor:
        """Where the student's jump should have led, float32 [B, tokens, C]; a constant."""
        if self._objective.terms.whole_phase:
            return self._walk_of_teacher()
        level = self.solver.sigmas_next[self.step]
        x = jump(self.noisy, self.teacher_velocity(self.noisy, self.sigma), self.sigma, level)
        return jump(x, self.velocity(x, level), level, self.sigma_end)

    def _walk_of_teacher(self) -> paddle.Tensor:
        """Euler steps of the teacher, picture by picture to the end of the phase."""
        steps = self.step - self._start + 1
        if self._objective.rules.phase_delta == "published":
            steps = np.full_like(steps, self.step[0] - self._start[0])
        x = self.noisy
        for done in range(int(steps.max())):
            index = np.maximum(self.step - done, 0)
            sigma, level = self.solver.sigmas[index], self.solver.sigmas_next[index]
            level = np.where(done < steps, level, sigma)  # a picture that is there stays where it is
            x = jump(x, self.teacher_velocity(x, sigma), sigma, level)
        return x

    def step_in_phase(self, place: str) -> np.ndarray:
        """A step [B] of each picture's phase, uniformly drawn for the term `place`."""
        share = self._drawn["places"][:, PLACES.index(place)]
        return self._start + (share * self.solver.length_of(self._start)).astype(np.int64)

    def level_in_phase(self, place: str) -> np.ndarray:
        """The level [B] to which that step leads, from the end of the phase on."""
        return self.solver.sigmas_next[self.step_in_phase(place)]

    def noised_to(self, x: paddle.Tensor, noise: str, sigma: np.ndarray) -> paddle.Tensor:
        """A sample [B, tokens, C] at the end of the phase, carried to levels sigma with that noise."""
        rule = self._objective.rules.forward_noise
        return noised(x, self._noise(noise), self.sigma_end, sigma, rule)

    def _noise(self, name: str) -> paddle.Tensor:
        return paddle.to_tensor(np.ascontiguousarray(self._drawn["noise"][:, NOISES.index(name)]))


def distance(
    found: paddle.Tensor, wanted: paddle.Tensor, loss_type: str, huber_c: float = 1e-3
) -> paddle.Tensor:
    """Per value, any shape, float32: "l2" d^2, "huber" sqrt(d^2 + c^2) - c (|d| far away, smooth near 0)."""
    d = found.astype("float32") - wanted.astype("float32")
    return d.square() if loss_type == "l2" else (d.square() + huber_c**2).sqrt() - huber_c


def matching_target(
    x: paddle.Tensor,
    noisy: paddle.Tensor,
    velocities: tuple[paddle.Tensor, paddle.Tensor],
    sigma: np.ndarray,
    rule: str = "fixed",
) -> paddle.Tensor:
    """Where distribution matching wants x to be: [B, tokens, C] float32, a constant.

    x: the student's sample; noisy: it, noised to levels sigma [B]; velocities: of the teacher ("real") and of
    the student ("fake") at noisy. Both predict the clean picture as noisy - sigma * velocity; x is moved by
    the difference of the two, divided by the mean distance from x to the teacher's clean picture.

    rule "published": the difference is that of the velocities (its factor sigma is missing) and the distance
    is from x to the teacher's *velocity*, a quantity of another kind.
    """
    x, real, fake = (each.detach().astype("float32") for each in (x, *velocities))
    if rule == "published":
        change, reference = real - fake, real
    else:
        level = per_picture(sigma)
        change, reference = level * (real - fake), noisy.detach().astype("float32") - level * real
    size = (x - reference).abs().mean([1, 2], keepdim=True) + NORMALISER_FLOOR
    return x - change / size
