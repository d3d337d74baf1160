"""The LoRA methods of FLUX's pipelines, under the names that diffusers and ppdiffusers give them.

Everything is done by ppcoat.lora; a LoRA may have parts for the transformer and for both text encoders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn

from ppcoat.errors import ConfigError
from ppcoat.models.blocks import adapters, adapters_set, wanted_scale

_PARTS = ("transformer", "text_encoder", "text_encoder_2")


class LoRAMethods:
    """Mixed into a pipeline with a transformer and two text encoders, each of which may be None."""

    def load_lora_weights(
        self,
        path_or_dict: str | os.PathLike | Mapping[str, paddle.Tensor],
        adapter_name: str | float | None = None,
        *,
        scale: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
        ignore_unknown: bool = False,
        from_diffusers: bool | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> Any:
        """Puts an adapter on the transformer and the text encoders -> ppcoat.lora.LoRAInfo.

        path_or_dict: a .safetensors file, a folder (weight_name and subfolder choose in it) or tensors by
        key, any shape and floating dtype. adapter_name: kept beside those that are loaded, and the only
        active one until set_adapters says otherwise; without a name all others go. A number there is the
        scale. scale: strength. ignore_unknown: apply the rest where some keys name nothing here. The last
        four are diffusers', without effect: files say their layout themselves, and nothing is downloaded.
        Raises ConfigError, and changes nothing, for what cannot be applied (see ppcoat.lora.load_lora).
        """
        if isinstance(adapter_name, int | float):
            adapter_name, scale = None, float(adapter_name)
        if subfolder is not None:
            path_or_dict = Path(path_or_dict) / subfolder
        return self._lora_adapters().load(path_or_dict, adapter_name, scale, weight_name, ignore_unknown)

    def unload_lora_weights(self) -> None:
        """Takes all adapters off again: the models are what they were before `load_lora_weights`. What
        `fuse_lora` added stays."""
        state = self._lora_adapters()
        state.delete(list(state.files))

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Makes these adapters active, each with its strength (default 1), and all others not. Several add
        up, each as it would change the base alone. Raises ConfigError for names that are not loaded, and
        for strengths by block."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights: Any = 1.0 if adapter_weights is None else adapter_weights
        weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if not all(isinstance(weight, int | float) for weight in weights):
            raise ConfigError(
                f"set_adapters: strengths by block are not known here, give numbers, got {weights}"
            )
        self._lora_adapters().set_active(names, weights)

    def disable_lora(self) -> None:
        """Draws without adapters, which stay loaded, until `enable_lora` or `set_adapters`."""
        state = self._lora_adapters()
        self.__dict__["_resting"] = state.strengths or self.__dict__.get("_resting", {})
        state.set_active([], [])

    def enable_lora(self) -> None:
        """Makes active again what `disable_lora` found active; nothing where others became active since."""
        state, resting = self._lora_adapters(), self.__dict__.pop("_resting", {})
        if not state.strengths:
            again = {name: by for name, by in resting.items() if name in state.files}
            state.set_active(list(again), list(again.values()))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that take part in drawing."""
        return list(self._lora_adapters().strengths)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """{part of the pipeline: names of the adapters that are loaded for it}."""
        files = self._lora_adapters().files
        found: dict[str, list[str]] = {}
        for name, file in files.items():
            for part in {each.part for each in file.changes}:
                found.setdefault(part, []).append(name)
        return found

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forgets these adapters."""
        self._lora_adapters().delete(
            [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        )

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds the active adapters (or those named), at lora_scale times their strengths, to the weights,
        each rounded once. What the weights were is kept in host memory for `unfuse_lora`.

        components: of the pipeline, whose weights are to change (default: all that the adapters change); in
        the others the adapters stay beside the weights, at their own strengths. safe_fusing is diffusers',
        without effect: no LoRA with NaN is ever loaded. Raises ConfigError, and changes nothing, where none
        is active, where they change none of the components, and for quantised weights.
        """
        if components is not None and not set(components) <= set(_PARTS):
            raise ConfigError(f"fuse_lora: components are of {', '.join(_PARTS)}, got {list(components)}")
        self._lora_adapters().fuse(adapter_names, lora_scale, _PARTS if components is None else components)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """The weights are bit for bit what they were before `fuse_lora`; the adapters are on beside them.
        components: diffusers', without effect: all that was fused is what it was."""
        self._lora_adapters().unfuse()

    @contextmanager
    def _lora_scaled(self, joint_attention_kwargs: dict | None) -> Iterator[None]:
        """Context manager: the adapters of the text encoders at the "scale" of a call, as the transformer's
        are in its own forward."""
        scale = wanted_scale(joint_attention_kwargs)
        with ExitStack() as stack:
            for encoder in (self.text_encoder, self.text_encoder_2):
                if scale is not None and isinstance(encoder, nn.Layer):
                    stack.enter_context(adapters_set(adapters(encoder, scale)))
            yield

    def _lora_adapters(self) -> Any:
        """The pipeline's ppcoat.lora.Adapters, made at its first use."""
        from ppcoat.lora import Adapters

        self.bring("transformer")  # which adapters may look at
        if "_adapters" not in self.__dict__:
            self.__dict__["_adapters"] = Adapters(
                lambda: {part: model for part in _PARTS if (model := getattr(self, part)) is not None}
            )
        return self.__dict__["_adapters"]
