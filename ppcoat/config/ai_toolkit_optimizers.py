"""Names of optimizers and schedules and their parameters in ai-toolkit, kohya's sd-scripts and the authors'
packages, and what each is in our schema. Readers are as in ai_toolkit_values.py.

An 8-bit optimizer keeps its states in FP8 here, instead of bitsandbytes' codes.
"""

from __future__ import annotations

from typing import Any

from ppcoat.config.ai_toolkit_values import Document, Reading, in_updates
from ppcoat.errors import unknown_name

# a name in lower case without marks -> ours
NAMES = {
    "adamw": "adamw", "coatfp8adamw": "coat_fp8_adamw", "prodigy": "prodigy", "lion": "lion",
    "adafactor": "adafactor",
    **dict.fromkeys(("schedulefreeadamw", "adamwschedulefree"), "schedulefree_adamw"),
    **dict.fromkeys(("adamw8bit", "adam8bit", "pagedadamw8bit"), "coat_fp8_adamw"),
    "prodigy8bit": "prodigy", **dict.fromkeys(("lion8bit", "pagedlion8bit"), "lion"),
}  # fmt: skip
OURS = ("adamw", "coat_fp8_adamw", "prodigy", "schedulefree_adamw", "lion", "adafactor")
PRODIGY_RATE = 0.1  # ai-toolkit takes a rate below this for that of another optimizer
# key of optimizer_params -> our setting
SAME = {
    "weight_decay": "train.weight_decay",
    **{name: f"train.prodigy.{name}" for name in ("d0", "d_coef", "growth_rate", "beta3", "slice_p",
                                                  "use_bias_correction", "safeguard_warmup")},
    **{name: f"train.adafactor.{name}" for name in ("clip_threshold", "decay_rate", "scale_parameter",
                                                    "relative_step", "warmup_init")},
    **{name: f"train.schedulefree.{name}" for name in ("r", "weight_lr_power")},
}  # fmt: skip
# name of a schedule -> torch's or diffusers' parameter -> our setting
_SHAPE: dict[Any, dict[str, str]] = {
    "cosine_with_restarts": {"num_cycles": "train.lr_num_cycles"},
    "polynomial": {"power": "train.lr_power"},
    "step": {"step_size": "train.lr_step_size", "gamma": "train.lr_gamma"},
}


def our_name(value: Any) -> Any:
    """The name of an optimizer as anybody writes it -> one of OURS, or the value itself where it is not text.
    Raises ValueError for another name."""
    if not isinstance(value, str):
        return value
    plain = value.lower().replace("_", "").replace("-", "")
    if plain not in NAMES:
        raise ValueError(unknown_name("optimizer", value, (*OURS, "adamw8bit", "prodigy8bit", "lion8bit")))
    return NAMES[plain]


def read_optimizer(value: Any, document: Document) -> Reading:
    """A name; 8-bit ones keep their states in FP8, unless coat.optimizer.use_fp8 forbids it."""
    name = our_name(value)
    settings: dict[str, Any] = {"train.optimizer": name}
    if not (isinstance(value, str) and "8bit" in value.lower()):
        return Reading(settings)
    states = document.get("coat", "optimizer", {})
    if isinstance(states, dict) and states.get("use_fp8") is False:
        full = "adamw" if name == "coat_fp8_adamw" else name
        note = f"read as {full}: coat.optimizer.use_fp8 is false, so all states are kept in full"
        return Reading(settings | {"train.optimizer": full}, (note,))
    if name != "coat_fp8_adamw":
        settings["train.fp8_states"] = True
    note = f"read as {name}: its states are kept in FP8 instead of bitsandbytes' 8-bit codes"
    return Reading(settings, (note,))


def read_adam8bit(value: Any, document: Document) -> Reading:
    """true: as optimizer: adamw8bit."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("wanted true or false")
    return read_optimizer("adamw8bit", document) if value else Reading()


def read_lr(value: Any, document: Document) -> Reading:
    """A learning rate. Prodigy finds its own: one below PRODIGY_RATE becomes 1, as in ai-toolkit."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    prodigy = str(document.get("train", "optimizer")).lower().startswith("prodigy")
    if prodigy and number and 0 < value < PRODIGY_RATE:
        note = "read as 1: prodigy finds the rate by itself; train.prodigy.d_coef makes it smaller"
        return Reading({"train.lr": 1.0}, (note,))
    return Reading({"train.lr": value})


def read_unet_lr(value: Any, document: Document) -> Reading:
    """As `read_lr`; nothing, an empty list and an empty text stand for none."""
    return Reading() if value in (None, [], "") else read_lr(value, document)


def read_lr_scheduler(value: Any, document: Document) -> Reading:
    """The name of a schedule. ai-toolkit's own `linear` rises; ours, like most, falls to 0."""
    params = document.get("train", "lr_scheduler_params") or {}
    if document.nested and value == "linear" and params == {}:
        raise ValueError("ai-toolkit's linear rises from lr / 3 to lr; for one that falls to 0 add "
                         "lr_scheduler_params: {start_factor: 1.0, end_factor: 0.0}, or choose constant or "
                         "cosine")  # fmt: skip
    if document.nested and value == "step" and "step_size" not in params:
        raise ValueError("step needs lr_scheduler_params: {step_size: 500, gamma: 0.1}")
    settings = {"train.lr_scheduler": value}
    if document.nested and value == "constant_with_warmup" and "num_warmup_steps" not in params:
        settings["train.lr_warmup_steps"] = document.get(
            "train", "lr_warmup_steps", in_updates(1000, document)
        )
    return Reading(settings)


def read_lr_scheduler_params(value: Any, document: Document) -> Reading:
    """num_warmup_steps and what shapes a schedule count; anything else must say what it does anyway."""
    if value is None or value == {}:
        return Reading()
    if not isinstance(value, dict):
        raise ValueError("wanted a section with keys, for example {num_warmup_steps: 100}")
    name, steps = document.get("train", "lr_scheduler", "constant"), document.get("train", "steps", 1000)
    done_anyway = {
        "constant": {"factor": 1.0},
        "cosine": {"eta_min": 0.0, "total_iters": steps, "T_max": steps},
        "cosine_with_restarts": {"eta_min": 0.0, "total_iters": steps, "T_0": steps, "T_mult": 1},
        "linear": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps},
        "polynomial": {"lr_end": 0.0},
    }.get(name if isinstance(name, str) else "", {})
    honoured = {"num_warmup_steps": "train.lr_warmup_steps"}
    honoured |= _SHAPE.get(name if isinstance(name, str) else "", {})
    settings = {ours: value[key] for key, ours in honoured.items() if key in value}
    for counted in ("train.lr_warmup_steps", "train.lr_step_size"):
        if counted in settings:
            settings[counted] = in_updates(settings[counted], document)
    rest = {key: given for key, given in value.items() if key not in honoured}
    wrong = [key for key, given in rest.items() if key not in done_anyway or given != done_anyway[key]]
    if name == "linear" and not {"start_factor", "end_factor"} <= rest.keys():
        wrong.append("start_factor and end_factor")
    if wrong:
        known = ", ".join([*honoured, *(f"{key}: {wanted}" for key, wanted in done_anyway.items())])
        raise ValueError(f"{', '.join(wrong)} cannot be followed with lr_scheduler {name}; wanted {known}")
    return Reading(settings)


def _read_epsilon(value: Any, document: Document) -> Reading:
    """A number; for adafactor two."""
    if isinstance(value, list):
        if len(value) != 2:
            raise ValueError("wanted a number, or two for adafactor, for example [1e-30, 0.001]")
        return Reading({"train.adafactor.eps1": value[0], "train.adafactor.eps2": value[1]})
    return Reading({"train.epsilon": value})


def _read_betas(value: Any, document: Document) -> Reading:
    """[beta1, beta2] -> two settings."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("wanted two numbers, for example [0.9, 0.999]")
    return Reading({"train.beta1": value[0], "train.beta2": value[1]})


def _read_beta1(value: Any, document: Document) -> Reading:
    """Adafactor's momentum; none is 0."""
    return Reading({"train.adafactor.beta1": 0.0 if value is None else value})


def _read_warmup(value: Any, document: Document) -> Reading:
    """schedulefree's own warmup_steps."""
    if value in (None, 0):
        return Reading()
    return Reading({"train.lr_scheduler": "constant_with_warmup", "train.lr_warmup_steps": value})


def _read_decouple(value: Any, document: Document) -> Reading:
    """Weight decay is always decoupled here."""
    if value is not True:
        raise ValueError("weight decay is always decoupled; wanted true")
    return Reading()


READERS = {
    "eps": _read_epsilon, "betas": _read_betas, "beta1": _read_beta1, "warmup_steps": _read_warmup,
    "decouple": _read_decouple,
}  # fmt: skip
