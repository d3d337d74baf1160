"""The Euler sampler of flow matching with FLUX's dynamic shift: the noise levels to visit, and a step
between two.

A latent at noise level sigma is (1 - sigma) * image + sigma * noise; the model predicts noise - image. The
class and its config keys are those of diffusers, whose folders it reads; keys that would change the
sampling in a way not written here are refused.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from ppdiffusers.configuration_utils import ConfigMixin, register_to_config
from ppdiffusers.schedulers.scheduling_utils import SchedulerMixin
from ppdiffusers.utils import BaseOutput

from ppcoat.errors import ConfigError

# Config keys of diffusers that are not implemented here, with the values that switch them off.
_OFF = {
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "time_shift_type": ("exponential",),
    "stochastic_sampling": (False,),
}
_LARGEST_MU = 20.0  # all noise levels but the last are 1 in float32 long before


@dataclass
class FlowMatchEulerOutput(BaseOutput):
    """prev_sample: the latents one step nearer to the image; shape and dtype of the velocity."""

    prev_sample: paddle.Tensor


class FlowMatchEulerDiscreteScheduler(SchedulerMixin, ConfigMixin):
    """Noise levels `sigmas` (float32 [n + 1], the last is 0), `timesteps` = 1000 * sigmas[:-1], the Euler
    step.

    With `use_dynamic_shifting` the noise levels are shifted by `mu` (see `calculate_shift`) when they are
    set, and `shift` has no effect; without it they are shifted by `shift`. Raises ConfigError for a config
    key whose value asks for something that is not implemented.
    """

    _compatibles = []
    order = 1
    _step_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ):
        for key, off in _OFF.items():
            if self.config[key] not in off:
                raise ConfigError(
                    f"scheduler_config.json: {key} is {self.config[key]!r}, which is not implemented: "
                    f"set it to {off[0]!r}"
                )
        sigmas = np.linspace(1, 1 / num_train_timesteps, num_train_timesteps)
        if not use_dynamic_shifting:
            sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.sigma_min, self.sigma_max = float(sigmas[-1]), float(sigmas[0])
        self._set(sigmas)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Chooses the noise levels to visit; exactly one of the three ways is given.

        num_inference_steps: evenly from sigma_max to sigma_min, then shifted. sigmas: these, then shifted.
        timesteps: these (0 to num_train_timesteps), taken as they stand. mu: the dynamic shift, which
        `use_dynamic_shifting` wants. Raises ConfigError if the choice is not clear or the levels do not fall.
        """
        choices = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps}
        given = [name for name, value in choices.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(
                f"give one of num_inference_steps, sigmas and timesteps to set_timesteps, not {given}"
            )
        if timesteps is not None:
            levels = np.asarray(timesteps, dtype="float64") / self.config.num_train_timesteps
        elif sigmas is not None:
            levels = self._shift(np.asarray(sigmas, dtype="float64"), mu)
        else:
            if num_inference_steps < 1:
                raise ConfigError(f"num_inference_steps is {num_inference_steps}: it must be at least 1")
            levels = self._shift(np.linspace(self.sigma_max, self.sigma_min, num_inference_steps), mu)
        if (
            levels.ndim != 1
            or not len(levels)
            or not 0 < levels[-1] <= levels[0] <= 1
            or np.any(np.diff(levels) >= 0)
        ):
            raise ConfigError(f"noise levels must fall and lie in (0, 1]; here they are {levels.tolist()}")
        self._set(levels)

    def step(
        self,
        model_output: paddle.Tensor,
        timestep: float | paddle.Tensor,
        sample: paddle.Tensor,
        return_dict: bool = True,
    ) -> FlowMatchEulerOutput | tuple[paddle.Tensor]:
        """x + (next sigma - sigma) * velocity, in float32, then back to the dtype of the velocity.

        model_output (the velocity) and sample have one shape. The first call finds its place by `timestep`,
        the following ones take the next level each.
        """
        if self._step_index is None:
            self._step_index = self._index(timestep)
        sigma, sigma_next = self._levels[self._step_index], self._levels[self._step_index + 1]
        self._step_index += 1
        prev = sample.astype("float32") + float(sigma_next - sigma) * model_output.astype("float32")
        prev = prev.astype(model_output.dtype)
        return FlowMatchEulerOutput(prev_sample=prev) if return_dict else (prev,)

    def scale_noise(
        self, sample: paddle.Tensor, timestep: float | paddle.Tensor, noise: paddle.Tensor
    ) -> paddle.Tensor:
        """sigma * noise + (1 - sigma) * sample. timestep: one of `timesteps`, or a tensor [B] of such."""
        times = np.asarray(timestep, dtype="float32").reshape(-1)
        sigma = paddle.to_tensor([self._levels[self._index(t)] for t in times], dtype="float32")
        sigma = sigma.reshape([-1] + [1] * (sample.ndim - 1))
        mixed = sigma * noise.astype("float32") + (1 - sigma) * sample.astype("float32")
        return mixed.astype(sample.dtype)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _shift(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        sigmas = sigmas.astype("float32")  # diffusers rounds here: so all digits of the timesteps agree
        if not self.config.use_dynamic_shifting:
            shift = self.config.shift
            return shift * sigmas / (1 + (shift - 1) * sigmas)
        if mu is None:
            raise ConfigError("this scheduler has use_dynamic_shifting: pass mu, see calculate_shift")
        if abs(mu) > _LARGEST_MU:
            raise ConfigError(
                f"the dynamic shift of so many tokens is {mu:.4g}, FLUX's are 0.5 to 1.15: take base_shift, "
                "max_shift, base_image_seq_len and max_image_seq_len of the original's scheduler_config.json"
            )
        return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))

    def _set(self, levels: np.ndarray) -> None:
        levels = levels.astype("float32")
        self._times = levels * np.float32(self.config.num_train_timesteps)
        self._levels = np.append(levels, np.float32(0))
        self.timesteps, self.sigmas = paddle.to_tensor(self._times), paddle.to_tensor(self._levels)
        self.num_inference_steps = len(levels)
        self._step_index = None

    def _index(self, timestep: float | paddle.Tensor) -> int:
        distance = np.abs(self._times - np.float32(float(timestep)))
        if distance.min() > 1e-3:
            raise ConfigError(
                f"timestep {float(timestep)} is not one of the scheduler's: {self._times.tolist()}"
            )
        return int(distance.argmin())


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu, the dynamic shift: linear in the number of image tokens, through two given points."""
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return base_shift + slope * (image_seq_len - base_seq_len)


def flux_scheduler(scheduler: Any) -> Any:
    """What FLUX draws with if a user gives it this scheduler: itself if it can shift dynamically, ours with
    its config if it is ppdiffusers' flow matching, which cannot. Raises ConfigError for every other."""
    set_timesteps = getattr(scheduler, "set_timesteps", None)
    if set_timesteps is not None and "mu" in inspect.signature(set_timesteps).parameters:
        return scheduler
    if type(scheduler).__name__ == FlowMatchEulerDiscreteScheduler.__name__:
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    raise ConfigError(
        f"scheduler: came {type(scheduler).__name__}, which is not of flow matching; FLUX is drawn with "
        "FlowMatchEulerDiscreteScheduler, of ppcoat or ppdiffusers"
    )


def set_flux_timesteps(
    scheduler: Any,
    tokens: int,
    steps: int,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Chooses the noise levels for pictures of so many tokens: `steps` of them, evenly from 1 before they are
    shifted, unless timesteps or sigmas say them. Raises ConfigError as `set_timesteps` does."""
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    if timesteps is None and sigmas is None:
        if steps < 1:
            raise ConfigError(f"num_inference_steps is {steps}: it must be at least 1")
        sigmas = np.linspace(1.0, 1 / steps, steps)
    given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    scheduler.set_timesteps(**{name: value for name, value in given.items() if value is not None})
