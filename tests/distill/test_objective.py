"""Samples, targets and terms, with plain passes through the same small FLUX as the reference."""

import numpy as np
import paddle
import pytest

from ppcoat.distill.discriminator import Discriminator
from ppcoat.distill.objective import BatchState, DiscriminatorObjective, Distillation, Rules, Terms
from ppcoat.lora import lora_disabled, lora_layers, lora_parameters
from ppcoat.models.pictures import latent_image_ids, pack_latents

STEPS = np.array([7, 5, 2])  # of 8, in phases of 2: the second step, then the first steps of phases


def objective(**settings):
    terms = Terms(**{"adv_weight": 0.0, **settings.pop("terms", {})})
    return Distillation(steps=8, phases=4, guidance=3.0, terms=terms, **settings)


def drawn_for(made, batch, steps=STEPS, places=0.0):
    drawn = made.draw(batch, np.random.default_rng(4))[1]
    drawn["step"], drawn["places"] = steps, places
    return drawn


def velocity(student, batch, x, sigma):
    return student(
        x, batch["prompt_embeds"], batch["pooled"], paddle.to_tensor(sigma, "float32"),
        latent_image_ids(2, 2), paddle.zeros([5, 3]), guidance=paddle.full([len(sigma)], 3.0),
        return_dict=False,
    )[0].numpy().astype(np.float64)  # fmt: skip


def column(values):
    return np.asarray(values, np.float64).reshape(-1, 1, 1)


@paddle.no_grad()
def by_hand(student, batch, made, drawn):
    """(student's jump, target) in float64, the textbook way."""
    solver = made.solver(4)
    step = drawn["step"]
    sigma, after = solver.sigmas[step], solver.sigmas_next[step]
    end = solver.sigmas_next[step // 2 * 2]
    clean = pack_latents(batch["latents"]).numpy().astype(np.float64)
    x = (1 - column(sigma)) * clean + column(sigma) * drawn["noise"][:, 0]

    def v(x, sigma):
        return velocity(student, batch, paddle.to_tensor(x, "float32"), sigma)

    with lora_disabled(student):
        one_step = x + column(after - sigma) * v(x, sigma)
    target = one_step + column(end - after) * v(one_step, after)
    return x + column(end - sigma) * v(x, sigma), target, one_step


def test_consistency_is_the_distance_between_the_two_jumps(student, batch):
    made = objective(terms={"huber_c": 0.1})
    drawn = drawn_for(made, batch)
    fake, target, _ = by_hand(student, batch, made, drawn)
    found = made.losses_at(student, batch, made.solver(4).sigmas[STEPS], drawn)
    each = np.sqrt((fake - target) ** 2 + 0.01) - 0.1
    assert float(found.mean) == pytest.approx(each.mean(), rel=1e-4)
    np.testing.assert_allclose(found.of_pictures.numpy(), each.mean((1, 2)), rtol=1e-4)
    found.mean.backward()
    assert all(np.abs(layer.lora_A.grad.numpy()).max() > 0 for layer in lora_layers(student).values())


def test_at_the_first_step_of_a_phase_the_target_is_the_teachers_step_itself(student, batch):
    made = objective()
    drawn = drawn_for(made, batch, np.array([6, 4, 0]))
    one_step = by_hand(student, batch, made, drawn)[2]
    found = BatchState(made, student, batch, drawn).target()
    np.testing.assert_allclose(found.numpy(), one_step, atol=1e-5)
    assert found.stop_gradient


def test_the_teacher_is_the_student_without_lora_and_leaves_it_on(student, batch):
    made = objective()
    state = BatchState(made, student, batch, drawn_for(made, batch))
    on, off = (call(state.noisy, state.sigma).numpy() for call in (state.velocity, state.teacher_velocity))
    assert np.abs(on - off).max() > 1e-3
    for layer in lora_layers(student).values():
        assert layer.enabled
        layer.lora_B.set_value(paddle.zeros_like(layer.lora_B))
    np.testing.assert_allclose(state.velocity(state.noisy, state.sigma).numpy(), off, atol=1e-6)


def test_reflow_at_the_edge_of_a_phase_is_the_identity_and_was_not_as_published(student, batch):
    """The student is at the edge already: nothing to learn. As published it jumps a step from there."""
    losses = {}
    for rule in ("fixed", "published"):
        made = objective(terms={"reflow_weight": 1.0}, rules=Rules(reflow_entry=rule))
        drawn = drawn_for(made, batch, places=0.0)
        made.losses_at(student, batch, None, drawn)
        losses[rule] = float(made.parts["reflow"])
    assert losses["fixed"] == 0
    assert losses["published"] > 1e-3


def test_each_picture_walks_its_own_steps_and_as_published_those_of_the_first(student, batch):
    def walk(rule, rows):
        made = objective(terms={"whole_phase": True}, rules=Rules(phase_delta=rule))
        some = {name: value[rows] for name, value in batch.items()}
        drawn = drawn_for(made, batch, np.array([7, 4, 2]))[rows]
        return BatchState(made, student, some, drawn).target().numpy()

    together = walk("fixed", slice(None))
    for i in range(3):
        np.testing.assert_allclose(together[i], walk("fixed", slice(i, i + 1))[0], atol=1e-5)
    assert np.abs(walk("published", slice(None)) - together).max() > 1e-2


def test_rules_reach_the_noise_and_the_last_level(student, batch):
    made = {
        rule: objective(rules=Rules(forward_noise=rule, last_sigma=rule)) for rule in ("fixed", "published")
    }
    assert made["fixed"].solver(4).sigmas_next[0] == 0 < made["published"].solver(4).sigmas_next[0]
    states = [BatchState(each, student, batch, drawn_for(each, batch)) for each in made.values()]
    x, level = paddle.ones([3, 4, 16]), np.array([1.0, 0.9, 0.8])
    fixed, published = (state.noised_to(x, "fake", level).numpy() for state in states)
    assert np.abs(fixed - published).max() > 0.01


def test_matching_pulls_to_the_teacher_and_stops_where_student_and_teacher_agree(student, batch):
    made = objective(terms={"dmd_weight": 0.5})
    drawn = drawn_for(made, batch, places=0.6)
    made.losses_at(student, batch, None, drawn).mean.backward()
    assert float(made.parts["matching"]) > 0
    for layer in lora_layers(student).values():
        layer.lora_B.set_value(paddle.zeros_like(layer.lora_B))
    made.losses_at(student, batch, None, drawn)
    assert float(made.parts["matching"]) == pytest.approx(0, abs=1e-10)


def test_the_discriminators_turn_trains_heads_only_and_divides_by_the_passes(student, batch):
    made = objective(terms={"adv_weight": 0.1}, discriminator=Discriminator(student))
    drawn = drawn_for(made, batch, places=0.6)
    grads = []
    for passes in (1, 2):
        turn = DiscriminatorObjective(made, passes)
        loss = turn.losses_at(student, batch, None, drawn)
        (loss.mean / passes).backward()
        grads.append(made.discriminator.heads[0].conv1.weight.grad.numpy().copy())
        made.discriminator.clear_gradients()
    np.testing.assert_allclose(grads[1], grads[0] / 2, rtol=1e-5, atol=1e-9)
    assert all(parameter.grad is None for parameter in lora_parameters(student))
    assert float(loss.mean) == pytest.approx(2, abs=0.7) and loss.of_pictures.shape == [3]


def test_the_adversarial_gradient_reaches_the_lora_through_the_teacher(student, batch):
    """Heads and teacher are frozen in the generator's turn; the chain goes on to the student's jump."""
    heads = Discriminator(student)
    losses = {}
    for weight in (0.0, 0.5):
        made = objective(terms={"adv_weight": weight}, discriminator=heads)
        found = made.losses_at(student, batch, None, drawn_for(made, batch, places=0.6))
        found.mean.backward()
        losses[weight] = [p.grad.numpy().copy() for p in lora_parameters(student)]
        student.clear_gradients()
    assert max(np.abs(a - b).max() for a, b in zip(*losses.values(), strict=True)) > 1e-5


def test_drawing_is_reproducible_and_covers_all_steps(batch):
    made = objective()
    sigma, drawn = made.draw(batch, np.random.default_rng(0))
    again = made.draw(batch, np.random.default_rng(0))[1]
    assert drawn.tobytes() == again.tobytes() and drawn[1:].shape == (2,)
    np.testing.assert_array_equal(sigma, made.solver(4).sigmas[drawn["step"]])
    rng = np.random.default_rng(1)
    assert {int(step) for _ in range(40) for step in made.draw(batch, rng)[1]["step"]} == set(range(8))
