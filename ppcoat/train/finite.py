"""Where NaN or inf came from: the first module of a forward pass whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable

import paddle


@paddle.no_grad()
def first_bad_module(model: paddle.nn.Layer, forward: Callable[[], object]) -> str | None:
    """Path of the first sublayer (in the order in which they end) whose output holds NaN or inf in
    `forward()`, a pass through `model`; None if all are finite. Every output is read by the host: this is for
    a run that has gone wrong.
    """
    bad: list[str] = []

    def note(path: str) -> Callable:
        def hook(layer: paddle.nn.Layer, inputs: object, outputs: object) -> None:
            tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
            if not bad and not all(_is_finite(tensor) for tensor in tensors):
                bad.append(path)

        return hook

    hooks = [layer.register_forward_post_hook(note(path)) for path, layer in model.named_sublayers()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


def _is_finite(value: object) -> bool:
    if not isinstance(value, paddle.Tensor) or not value.is_floating_point():
        return True
    return bool(paddle.isfinite(value.astype("float32")).all())
