"""A running mean of the trained parameters (exponential moving average), kept in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import paddle


class RunningMean:
    """mean <- mean - (1 - decay) * (mean - parameter), after every update of the parameters.

    parameters: {path: tensor}; the mean starts from their values. Source: ai-toolkit's `ema_config`, which
    has no warm-up either.
    """

    def __init__(self, parameters: Mapping[str, paddle.Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.tensors = {
            path: parameter.detach().astype("float32").clone() for path, parameter in parameters.items()
        }

    @paddle.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for path, mean in self.tensors.items():
            distance = mean - self.parameters[path].astype("float32")
            mean.subtract_(distance.scale_(1.0 - self.decay))

    @contextmanager
    def in_place_of_parameters(self) -> Iterator[None]:
        """Within it, the parameters hold the mean; afterwards, whatever happens, their own bits again."""
        own = {path: parameter.detach().clone() for path, parameter in self.parameters.items()}
        self._assign(self.tensors)
        try:
            yield
        finally:
            self._assign(own)

    def load(self, tensors: Mapping[str, paddle.Tensor]) -> None:
        """Take the mean from a checkpoint's tensors."""
        for path, mean in self.tensors.items():
            paddle.assign(tensors[path], output=mean)

    @paddle.no_grad()
    def _assign(self, values: Mapping[str, paddle.Tensor]) -> None:
        # into the memory that the parameters have: the optimizer may hold views of it
        for path, parameter in self.parameters.items():
            paddle.assign(values[path].astype(parameter.dtype), output=parameter)
