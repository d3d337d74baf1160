import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift
from ppcoat.models.loading import load_scheduler


@pytest.mark.parametrize(("steps", "mu"), [(4, "0.6"), (4, "1.15"), (28, "1.15")])
def test_sigmas_and_timesteps_are_those_of_diffusers(fp32_folder, torch_refs, steps, mu):
    scheduler = load_scheduler(fp32_folder / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=float(mu))
    np.testing.assert_array_equal(scheduler.sigmas.numpy(), torch_refs[f"sch_s_{steps}_{mu}"])
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), torch_refs[f"sch_t_{steps}_{mu}"])


def test_shift_is_linear_between_the_two_sizes_of_flux():
    assert calculate_shift(256) == pytest.approx(0.5)
    assert calculate_shift(4096) == pytest.approx(1.15)
    assert calculate_shift(16, 16, 32, 0.0, 1.0) == 0.0


def test_static_shift_formula():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0], rtol=1e-6)


def test_explicit_timesteps_stand_as_given():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(timesteps=[1000, 250], mu=1.15)
    np.testing.assert_array_equal(scheduler.sigmas.numpy(), np.float32([1, 0.25, 0]))


def test_steps_along_a_constant_velocity_lead_from_noise_to_image():
    image, noise = paddle.to_tensor([[1.0, -2.0]]), paddle.to_tensor([[0.5, 3.0]])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(num_inference_steps=7, mu=0.8)
    x = noise
    for t in scheduler.timesteps:
        np.testing.assert_allclose(x.numpy(), scheduler.scale_noise(image, t, noise).numpy(), atol=1e-6)
        (x,) = scheduler.step(noise - image, t, x, return_dict=False)
    np.testing.assert_allclose(x.numpy(), image.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("shift_terminal", 0.02),
        ("time_shift_type", "linear"),
        ("invert_sigmas", True),
    ],
)
def test_what_is_not_implemented_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        FlowMatchEulerDiscreteScheduler(**{key: value})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 4}, "mu"),
        ({"num_inference_steps": 0, "mu": 1.0}, "at least 1"),
        ({"mu": 1.0}, "one of"),
        ({"sigmas": [0.5, 1.0], "mu": 1.0}, "fall"),
        ({"timesteps": [2000.0]}, "fall"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(**kwargs)


def test_unknown_timestep_is_named():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=[1000, 500])
    with pytest.raises(ConfigError, match="123"):
        scheduler.step(paddle.zeros([1]), 123.0, paddle.zeros([1]))
