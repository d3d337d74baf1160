"""Updates the discriminator's heads one after the other, so that no update holds more than one head's memory.

At FLUX.1's width the 57 heads have 1,077 M parameters. An optimizer that takes them at once needs their
gradients and several float32 copies together; here each head has an optimizer of its own, and its gradients
are given back as soon as it is updated. The states, and so the result, are those of one optimizer over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import paddle

from ppcoat.train.optimizer_state import is_of_parameter, optimizer_state_bytes


class HeadsOptimizer:
    """One optimizer per head, seen as one.

    make(parameters) -> an optimizer without gradient clipping; all share one learning rate schedule.
    max_grad_norm: bound of the norm of all heads' gradients together, 0 for none.
    """

    def __init__(
        self,
        heads: Sequence[paddle.nn.Layer],
        make: Callable[[list[paddle.Tensor]], paddle.optimizer.Optimizer],
        max_grad_norm: float = 1.0,
    ) -> None:
        self._parameters = [head.parameters() for head in heads]
        self._optimizers = [make(parameters) for parameters in self._parameters]
        self._max_grad_norm = max_grad_norm

    def get_lr(self) -> float:
        """The learning rate, the same for all."""
        return self._optimizers[0].get_lr()

    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(optimizer_state_bytes(optimizer) for optimizer in self._optimizers)

    @paddle.no_grad()
    def step(self) -> None:
        """One update of every head from the gradients that are there; they are gone afterwards."""
        factor = self._clip_factor() if self._max_grad_norm > 0 else None
        for optimizer, parameters in zip(self._optimizers, self._parameters, strict=True):
            if factor is not None:
                for parameter in parameters:
                    parameter.grad.multiply_(factor)
            optimizer.step()
            _release(parameters)

    def clear_grad(self) -> None:
        """Give back the memory of all gradients."""
        for parameters in self._parameters:
            _release(parameters)

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """The states of all; names that do not begin with a parameter's own get the number of the head in
        front."""
        return {
            name if is_of_parameter(name, parameters) else f"{i}.{name}": value
            for i, (optimizer, parameters) in self._numbered()
            for name, value in optimizer.state_dict().items()
        }

    def set_state_dict(self, state: dict[str, paddle.Tensor]) -> None:
        """Restore what state_dict gave. Raises ConfigError as FP8AdamW does."""
        for i, (optimizer, parameters) in self._numbered():
            own = {name: value for name, value in state.items() if is_of_parameter(name, parameters)}
            prefix = f"{i}."
            own |= {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
            optimizer.set_state_dict(own)

    def _numbered(self) -> Iterator[tuple[int, tuple[paddle.optimizer.Optimizer, list[paddle.Tensor]]]]:
        return enumerate(zip(self._optimizers, self._parameters, strict=True))

    def _clip_factor(self) -> paddle.Tensor:
        """What brings the norm of all gradients down to its bound, float32 scalar, at most 1."""
        squares = [p.grad.astype("float32").square().sum() for head in self._parameters for p in head]
        norm = paddle.stack(squares).sum().sqrt()
        return self._max_grad_norm / paddle.clip(norm, min=self._max_grad_norm)


def _release(parameters: list[paddle.Tensor]) -> None:
    for parameter in parameters:
        parameter.clear_gradient(False)
