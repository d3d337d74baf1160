"""What each setting means to a run that goes on from a checkpoint: may it be another one than before?

    same    no: weights and optimizer states would mean something else. The run is refused
    order   no, or the order of the pictures begins anew (--restart_data)
    told    yes, from the next step on; one line names it
    free    yes: weights come out bit for bit the same, and nothing is said

`same` and `order` count by what follows from a setting. Where that stays (other targets that choose the same
Linears; half the batch on twice the ranks) it is told. Places are free: what lies there is compared by its
content, models byte by byte (a changed one is refused), pictures and captions file by file (told).

The result is the weights. What only decides when and where something is written, drawn or measured is free,
and so is what moves weights between host and device and leaves the arithmetic as it is.
tests/train/test_resume.py changes every setting and looks; its slow part trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ppcoat.config.lightning import LightningConfig
from ppcoat.config.schema import RunConfig

Class = Literal["same", "order", "told", "free"]

# {section: {class: its fields}}
_RUN: dict[str, dict[Class, str]] = {
    "": {
        "order": "seed datasets",  # of datasets: how many
        "told": "device trigger_word reg_weight",
        # what `memory: auto` chooses stands in the other settings
        "free": "name output_dir memory vram_gb cache_dir",
    },
    "model": {
        "same": "family",
        # quantize: the same base in another format, as for a smaller card: other numbers, the same meaning
        "told": "arch prompt_prefix dtype quantize quantize_matmul",
        "free": "name_or_path text_encoders vae tokenizers quantized_beside_model stream_encoders "
        "blocks_to_swap",
    },
    "network": {
        "same": "type linear linear_alpha lokr_full_rank lokr_factor targets only_if_contains "
        "ignore_if_contains double_blocks single_blocks",
        "told": "dropout lokr_rank_dropout lokr_module_dropout",
        "free": "pretrained_lora_path pretrained_lora_partly",  # read at the start only
    },
    "datasets": {
        "order": "resolution bucket_rule bucket_step num_repeats is_reg flip_x flip_y "
        "full_size_control_images",
        "told": "caption_ext default_caption trigger_word caption_dropout_rate shuffle_tokens "
        "token_dropout_rate keep_tokens caption_variants control_transparent_color alpha_mask invert_mask "
        "mask_min_value",
        "free": "folder_path control_path mask_path cache_to_disk skip_bad",
    },
    "train": {
        "same": "optimizer fp8_states",
        "order": "batch_size",
        "told": "steps num_epochs gradient_accumulation lr lr_scheduler lr_warmup_steps lr_num_cycles "
        "lr_power lr_step_size lr_gamma weight_decay beta1 beta2 epsilon max_grad_norm timestep_type "
        "cfg_scale gradient_checkpointing deterministic max_sequence_length loss_type "
        "diff_output_preservation diff_output_preservation_class diff_output_preservation_multiplier "
        "blank_prompt_preservation blank_prompt_preservation_multiplier",
        "free": "max_skipped_in_a_row rank_timeout",
    },
    "train.prodigy": {
        "same": "d0 slice_p",  # sums are in units of d0, over every slice_p-th value
        "told": "d_coef growth_rate beta3 use_bias_correction safeguard_warmup",
    },
    "train.schedulefree": {"told": "r weight_lr_power"},
    "train.adafactor": {
        "same": "beta1",  # whether there is a momentum
        "told": "eps1 eps2 clip_threshold decay_rate scale_parameter relative_step warmup_init",
    },
    "train.ema": {"told": "use_ema ema_decay"},
    # weights do not depend on these, but the curves are not to be compared with those before
    "train.validation": {"told": "folder_path items control_path resolution sigmas", "free": "every"},
    "coat": {"same": "enabled"},  # where it decides whether optimizer states are in FP8
    "coat.optimizer": {
        "same": "use_fp8 m1_format m2_format block_size use_dynamic_range_expansion stochastic_rounding"
    },
    "coat.activation": {
        "told": "use_fp8 policy linear_granularity nonlinear_granularity group_size",
    },
    "coat.memory": {"told": "enable_efficient_checkpoint checkpoint_blocks", "free": "log_memory_stats"},
    "save": {
        "told": "dtype format",  # of the file that is the result
        "free": "save_every save_every_epochs max_step_saves_to_keep strict_resume restart_data",
    },
    "sample": {
        "free": "sample_every prompts samples skip_first_sample force_first_sample width height seed "
        "walk_seed guidance_scale sample_steps"
    },
    "logging": {"free": "log_every visualdl"},
}
_LIGHTNING: dict[Class, str] = {
    "same": "lora_rank lora_alpha resolution fp8_optimizer num_euler_timesteps multiphase head_blocks "
    "guidance_scale adv_weight",  # of adv_weight: whether there are heads
    "order": "seed train_batch_size bucket_rule",
    "told": "device mixed_precision fp16_opt_level learning_rate loss_type adam_weight_decay max_train_steps "
    "gradient_accumulation_steps gradient_checkpointing adv_lr use_dmd_loss dmd_weight apply_reflow_loss "
    "reflow_loss_weight huber_c use_distill_loss lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm deterministic max_sequence_length save_format quantize saving_policy "
    "image_column caption_column forward_noise reflow_entry dmd_normalizer last_sigma phase_delta bad_rows "
    "resume_order",
    "free": "data_path file_list_path pretrained_teacher_model text_encoders vae tokenizers output_dir "
    "tracker_project_name dataloader_num_workers validation_steps checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint pre_alloc_memory cache_to_disk encode_ahead "
    "strict_resume validation_prompt log_every visualdl blocks_to_swap max_bad_share compat rank_timeout",
}
# In these each of several ranks may differ: where things lie on its machine, and how long it waits.
PLACES = ("device", "rank_timeout", "data_path", "file_list_path", "output_dir", "pretrained_teacher_model",
          "text_encoders", "vae", "tokenizers", "train.validation.folder_path",
          "train.validation.control_path")  # fmt: skip
CLASSES: Mapping[str, Class] = {
    f"{section}.{name}".removeprefix("."): each
    for section, classes in [*_RUN.items(), ("", _LIGHTNING)]
    for each, names in classes.items()
    for name in names.split()
}


def class_of(key: str) -> Class:
    """Of a setting by its dotted name, "datasets.0.flip_x"; what is not known any more may change."""
    return CLASSES.get(key) or CLASSES.get(without_number(key), "told")


def without_number(key: str) -> str:
    """datasets.0.flip_x -> datasets.flip_x."""
    return ".".join(part for part in key.split(".") if not part.isdecimal())


def setting_fields(config: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """{"train.lr": its field, ...} of all sections; of the list of datasets the fields of one, of any other
    list the list itself."""
    found: dict[str, FieldInfo] = {}
    for name, field in config.model_fields.items():
        inner = field.annotation
        if name == "datasets" and get_origin(inner) is tuple:
            inner = get_args(inner)[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= setting_fields(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def settings_that_matter(config: RunConfig | LightningConfig) -> dict[str, object]:
    """{"train.lr": 0.001, "datasets.0.flip_x": False, ...}: all that are not free, as JSON gives them
    back."""
    dump, flat = config.model_dump(mode="json"), {}
    if "datasets" in dump:
        dump["datasets"] = {str(number): each for number, each in enumerate(dump["datasets"])}

    def put(prefix: str, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                put(f"{prefix}{name}.", value)
            elif class_of(prefix + name) != "free":
                flat[prefix + name] = value

    put("", dump)
    return flat


def must_stay(settings: Mapping[str, object]) -> dict[str, object]:
    """Of flat settings those of class `same` that are not among the compatible facts of a checkpoint: the
    model, and with what the states of the optimizer that is used are made."""
    optimizer = str(settings.get("train.optimizer"))
    keys = {
        "prodigy": ("train.prodigy.d0", "train.prodigy.slice_p"),
        "schedulefree_adamw": ("train.beta1",),
    }.get(optimizer, ())  # by which the average is read
    # at 0 there is no first moment
    whether = {key: settings[key] == 0 for key in ("train.beta1", "train.adafactor.beta1", "adam_beta1")
               if key in settings}  # fmt: skip
    return whether | {key: settings[key] for key in ("model.family", *keys) if key in settings}
