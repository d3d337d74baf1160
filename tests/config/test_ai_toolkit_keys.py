"""Every key of ai-toolkit's FLUX LoRA YAML, one by one: it has an effect, a warning or a refusal."""

import pytest

from ppcoat.config.ai_toolkit_keys import DEFAULTS, KEYS
from ppcoat.config.ai_toolkit_values import Honour, Read
from ppcoat.config.explain import _all_keys
from ppcoat.config.schema import PreviewConfig, RunConfig

# key, value -> our setting and its value
HONOURED = [
    ("name", "coats", "name", "coats"),
    ("training_folder", "runs", "output_dir", "runs"),
    ("device", "cuda:1", "device", "gpu:1"),
    ("trigger_word", "sks", "trigger_word", "sks"),
    ("training_seed", "7", "seed", 7),
    ("quantize", "true", "model.quantize", "fp8"),
    ("adam8bit", "true", "train.optimizer", "coat_fp8_adamw"),
    ("network.type", "LoRA", "network.type", "lora"),
    ("network.type", "dora", "network.type", "dora"),
    ("network.type", "LoKr", "network.type", "lokr"),
    ("network.lokr_factor", "8", "network.lokr_factor", 8),
    ("network.lokr_full_rank", "true", "network.lokr_full_rank", True),
    ("network.linear", "8", "network.linear", 8),
    ("network.rank", "8", "network.linear", 8),
    ("network.linear_alpha", "2", "network.linear_alpha", 2.0),
    ("network.alpha", "2", "network.linear_alpha", 2.0),
    ("network.dropout", "0.1", "network.dropout", 0.1),
    ("network.pretrained_lora_path", "a.safetensors", "network.pretrained_lora_path", "a.safetensors"),
    ("network.network_kwargs.only_if_contains", "[proj_out]", "network.only_if_contains", ("proj_out",)),
    ("network.network_kwargs.ignore_if_contains", "[ff]", "network.ignore_if_contains", ("ff",)),
    ("train.diff_output_preservation_class", "person", "train.diff_output_preservation_class", "person"),
    ("train.diff_output_preservation_multiplier", "2", "train.diff_output_preservation_multiplier", 2.0),
    ("train.blank_prompt_preservation", "true", "train.blank_prompt_preservation", True),
    ("train.blank_prompt_preservation_multiplier", "2", "train.blank_prompt_preservation_multiplier", 2.0),
    ("save.dtype", "bf16", "save.dtype", "bfloat16"),
    ("save.save_every", "5", "save.save_every", 5),
    ("save.max_step_saves_to_keep", "2", "save.max_step_saves_to_keep", 2),
    ("datasets[].folder_path", "other", "datasets.0.folder_path", "other"),
    ("datasets[].dataset_path", "other", "datasets.0.folder_path", "other"),
    ("datasets[].caption_ext", ".cap", "datasets.0.caption_ext", "cap"),
    ("datasets[].caption_type", "cap", "datasets.0.caption_ext", "cap"),
    ("datasets[].default_caption", "a shirt", "datasets.0.default_caption", "a shirt"),
    ("datasets[].trigger_word", "sks", "datasets.0.trigger_word", "sks"),
    ("datasets[].caption_dropout_rate", "0.2", "datasets.0.caption_dropout_rate", 0.2),
    ("datasets[].batch_size", "3", "train.batch_size", 3),
    ("datasets[].num_repeats", "4", "datasets.0.num_repeats", 4),
    ("datasets[].resolution", "[64]", "datasets.0.resolution", 64),
    ("datasets[].resolution", "[64, 128]", "datasets.1.resolution", 128),
    ("datasets[].buckets", "true", "datasets.0.bucket_rule", "ai-toolkit"),
    ("datasets[].bucket_tolerance", "32", "datasets.0.bucket_step", 32),
    ("datasets[].square_crop", "true", "datasets.0.bucket_rule", "square"),
    ("datasets[].shuffle_tokens", "true", "datasets.0.shuffle_tokens", True),
    ("datasets[].token_dropout_rate", "0.1", "datasets.0.token_dropout_rate", 0.1),
    ("datasets[].keep_tokens", "2", "datasets.0.keep_tokens", 2),
    ("datasets[].cache_latents_to_disk", "true", "datasets.0.cache_to_disk", True),
    ("save_cache_on_disk", "true", "datasets.0.cache_to_disk", True),
    ("datasets[].is_reg", "false", "datasets.0.is_reg", False),
    ("datasets[].flip_x", "true", "datasets.0.flip_x", True),
    ("datasets[].flip_y", "true", "datasets.0.flip_y", True),
    ("datasets[].control_path", "before", "datasets.0.control_path", ("before",)),
    ("datasets[].control_path", "[a, b]", "datasets.0.control_path", ("a", "b")),
    ("datasets[].control_path_1", "a", "datasets.0.control_path", ("a",)),
    ("datasets[].control_path_2", "a", "datasets.0.control_path", ("a",)),
    ("datasets[].control_path_3", "a", "datasets.0.control_path", ("a",)),
    ("datasets[].mask_path", "masks", "datasets.0.mask_path", "masks"),
    ("datasets[].alpha_mask", "true", "datasets.0.alpha_mask", True),
    ("train.reg_weight", "0.5", "reg_weight", 0.5),
    ("train.batch_size", "3", "train.batch_size", 3),
    ("train.steps", "12", "train.steps", 12),
    ("train.gradient_accumulation", "3", "train.gradient_accumulation", 3),
    ("train.gradient_accumulation_steps", "4", "train.steps", 250),
    ("train.gradient_checkpointing", "false", "train.gradient_checkpointing", False),
    ("train.optimizer", "AdamW", "train.optimizer", "adamw"),
    ("train.adam8bit", "true", "train.optimizer", "coat_fp8_adamw"),
    ("train.optimizer_params.weight_decay", "0.3", "train.weight_decay", 0.3),
    ("train.optimizer_params.eps", "1e-7", "train.epsilon", 1e-7),
    ("train.optimizer_params.betas", "[0.5, 0.6]", "train.beta2", 0.6),
    ("train.lr", "3e-4", "train.lr", 3e-4),
    ("train.unet_lr", "3e-4", "train.lr", 3e-4),
    ("train.lr_scheduler", "cosine", "train.lr_scheduler", "cosine"),
    ("train.dtype", "fp32", "model.dtype", "float32"),
    ("train.max_grad_norm", "0.5", "train.max_grad_norm", 0.5),
    ("train.gradient_clipping", "0.5", "train.max_grad_norm", 0.5),
    ("train.timestep_type", "shift", "train.timestep_type", "shift"),
    ("train.loss_type", "mse", "train.loss_type", "mse"),
    ("train.cfg_scale", "2", "train.cfg_scale", 2.0),
    ("train.disable_sampling", "true", "sample.sample_every", 0),
    ("train.skip_first_sample", "true", "sample.skip_first_sample", True),
    ("train.force_first_sample", "true", "sample.force_first_sample", True),
    ("train.ema_config.use_ema", "true", "train.ema.use_ema", True),
    ("train.ema_config.ema_decay", "0.99", "train.ema.ema_decay", 0.99),
    ("train.validation_config", "{validation_sigmas: [0.5]}", "train.validation.sigmas", (0.5,)),
    ("model.name_or_path", "flux", "model.name_or_path", "flux"),
    ("model.vae_path", "ae", "model.vae", "ae"),
    ("model.te_name_or_path", "dev", "model.text_encoders", ("dev",)),
    ("model.extras_name_or_path", "dev", "model.tokenizers", ("dev",)),
    ("model.dtype", "bf16", "model.dtype", "bfloat16"),
    ("model.quantize", "true", "model.quantize", "fp8"),
    ("sample.sample_every", "5", "sample.sample_every", 5),
    ("sample.width", "64", "sample.width", 64),
    ("sample.height", "64", "sample.height", 64),
    ("sample.prompts", "[a dress]", "sample.prompts", ("a dress",)),
    ("sample.samples", "[{prompt: a dress}]", "sample.samples", (PreviewConfig(prompt="a dress"),)),
    ("sample.seed", "5", "sample.seed", 5),
    ("sample.walk_seed", "true", "sample.walk_seed", True),
    ("sample.guidance_scale", "2", "sample.guidance_scale", 2.0),
    ("sample.sample_steps", "5", "sample.sample_steps", 5),
    ("logging.log_every", "5", "logging.log_every", 5),
]
# key, value that is warned about, value (or none) that asks for nothing
WARNED = [
    ("performance_log_every", "50", "10"), ("log_dir", "logs", "null"),
    ("sqlite_db_path", "a.db", "./aitk_db.db"),
    ("torch_profiler", "true", "false"), ("first_sample", "{a: 1}", "null"), ("meta", "{a: 1}", "null"),
    ("network.conv", "4", "16"), ("network.conv_alpha", "4", "16"), ("monitoring", "{enabled: true}", "{}"),
    ("network.old_lokr_format", "true", "false"),
    ("network.layer_offloading", "true", "false"), ("network.all_layers", "true", "false"),
    ("save.save_format", "pt", "diffusers"), ("save.push_to_hub", "true", "false"),
    ("datasets[].cache_latents", "false", "true"),
    ("precompute_text_embeddings", "false", "true"), ("precompute_image_embeddings", "false", "true"),
    ("datasets[].cache_text_embeddings", "1", "false"),
    ("datasets[].num_workers", "2", "null"), ("datasets[].prefetch_factor", "2", "null"),
    ("train.cache_text_embeddings", "1", "false"),
    ("train.xformers", "true", "false"), ("train.sdp", "true", "false"),
    ("train.attention_backend", "flash", "native"),
    ("model.quantize_te", "true", "false"), ("model.low_vram", "true", "false"),
    ("model.layer_offloading", "true", "false"), ("model.compile", "true", "false"),
    ("model.block_compile", "true", "false"), ("sample.sample_start_step", "10", "0"),
    ("sample.neg", "ugly", "''"), ("sample.format", "jpg", "png"), ("logging.verbose", "true", "false"),
    ("logging.use_wandb", "true", "false"), ("sample.sampler", "ddpm", "flowmatch"),
    ("sample.ext", "jpg", "png"),
    ("datasets[].cache_clip_vision_to_disk", "true", "false"),
    ("datasets[].fast_image_size", "true", "false"),
    ("train.auto_scale_batch_size", "true", "false"), ("train.show_turbo_outputs", "true", "false"),
    ("model.auto_memory", "true", "false"), ("model.text_encoder_bits", "8", "16"),
    ("sample.num_frames", "41", "1"), ("sample.network_multiplier", "0.5", "'1.0'"),
    ("sample.guidance_rescale", "0.7", "0.0"), ("sample.do_cfg_norm", "true", "false"),
    ("sample.extra_values", "[1]", "[]"),
]  # fmt: skip
# key, value that is refused, value (or none) that asks for nothing
REFUSED = [
    ("type", "concept_slider", "ui_trainer"), ("guidance", "{a: 1}", "null"),
    ("embedding", "{a: 1}", "null"),
    ("decorator", "{a: 1}", "null"), ("adapter", "{a: 1}", "null"), ("do_lorm", "true", "false"),
    ("network.transformer_only", "false", "true"),
    ("datasets[].random_crop", "true", "false"),
    ("datasets[].random_scale", "true", "false"), ("datasets[].scale", "1.5", "1.0"),
    ("datasets[].replacements", "[a|b]", "[]"),
    ("datasets[].prior_reg", "true", "false"), ("datasets[].loss_multiplier", "2.0", "1.0"),
    ("datasets[].network_weight", "0.5", "1.0"), ("datasets[].augments", "[a]", "[]"),
    ("datasets[].augmentations", "[{a: 1}]", "[]"), 
    ("datasets[].clip_image_path", "a", "null"), ("datasets[].num_frames", "9", "1"),
    ("datasets[].do_audio", "true", "false"), ("datasets[].poi", "face", "null"),
    ("train.gradient_accumulation_steps", "-1", "1"), ("train.train_unet", "false", "true"),
    ("train.train_text_encoder", "true", "false"), ("train.noise_scheduler", "ddpm", "flowmatch"),
    ("train.optimizer", "dadaptadam", "adamw"), ("train.lr_scheduler", "linear", "constant"),
    ("train.lr_scheduler", "step", "constant"),
    ("train.lr_scheduler_params", "{factor: 0.5}", "{factor: 1.0}"),
    ("train.dtype", "fp16", "bf16"),
    ("train.timestep_type", "lognorm_blend", "sigmoid"), ("train.linear_timesteps", "true", "false"),
    ("train.linear_timesteps2", "true", "false"), ("train.content_or_style", "style", "balanced"),
    ("train.min_denoising_steps", "100", "0"), ("train.max_denoising_steps", "500", "999"),
    ("train.loss_type", "wavelet", "mse"), ("train.bypass_guidance_embedding", "true", "false"),
    ("train.ema_config.use_feedback", "true", "false"),
    ("train.ema_config.param_multiplier", "1.1", "1.0"), ("train.unload_text_encoder", "true", "false"),
    ("train.start_step", "10", "null"), ("train.max_loss", "1.0", "null"),
    ("train.noise_offset", "0.1", "0.0"), ("train.snr_gamma", "5", "null"),
    ("train.min_snr_gamma", "5", "null"), ("train.learnable_snr_gos", "true", "false"),
    ("model.is_flux", "false", "true"), ("model.arch", "wan21", "flux:1"),
    ("model.qtype", "uint3|a.st", "uint3"),
    ("model.assistant_lora_path", "a", "null"),
    ("model.attn_masking", "true", "false"), ("model.split_model_over_gpus", "true", "false"),
    ("model.lora_path", "a", "null"), ("model.inference_lora_path", "a", "null"),
]  # fmt: skip
REFUSED += [(f"train.{switch}", "true", "false") for switch in (
    "do_differential_guidance", "do_guidance_loss", "do_prior_divergence", "do_cfg", "do_random_cfg",
    "correct_pred_norm", "free_u", "merge_network_on_save", "short_and_long_captions",
    "single_item_batching", "force_consistent_noise", "blended_blur_noise", "match_noise_norm",
    "do_paramiter_swapping", "inverted_mask_prior", "match_adapter_assist")]  # fmt: skip
REFUSED += [(f"model.{kind}", "true", "false") for kind in (
    "is_v2", "is_v3", "is_xl", "is_v_pred", "is_pixart", "is_ssd", "is_auraflow", "is_lumina2", "is_vega",
    "is_pixart_sigma", "use_flux_cfg")]  # fmt: skip
REFUSED += [
    ("slider", "{a: 1}", "null"), ("network.normalize", "true", "false"),
    ("network.lorm_config", "{a: 1}", "null"),
    ("datasets[].type", "slider", "image"), ("datasets[].controls", "[depth]", "[]"),
    ("datasets[].inpaint_path", "a", "null"),
    ("datasets[].unconditional_path", "a", "null"),
    ("datasets[].clip_image_from_same_folder", "true", "false"),
    ("datasets[].standardize_images", "true", "false"),
    ("datasets[].clip_image_augmentations", "[1]", "null"),
    ("datasets[].use_short_captions", "true", "false"), ("datasets[].random_triggers", "[a]", "[]"),
    ("datasets[].extra_values", "[1]", "[]"),
    ("train.adapter_assist_name_or_path", "a", "null"), ("train.match_adapter_chance", "0.5", "0.0"),
    ("train.noise_multiplier", "1.1", "1.0"), ("train.img_multiplier", "1.1", "1.0"),
    ("train.latent_multiplier", "1.1", "1.0"), ("train.target_noise_multiplier", "1.1", "1.0"),
    ("train.optimal_noise_pairing_samples", "2", "1"), ("train.random_noise_multiplier", "0.1", "0.0"),
    ("train.random_noise_shift", "0.1", "0.0"), ("train.weight_jitter", "0.1", "0.0"),
    ("train.prompt_saturation_chance", "0.1", "0.0"), ("train.loss_target", "source", "noise"),
    ("train.target_norm_std", "1.0", "null"),
    ("model.model_kwargs", "{a: 1}", "{}"), ("model.quantize_kwargs", "{exclude: [a]}", "{exclude: []}"),
    ("model.accuracy_recovery_adapter", "a", "null"), ("model.use_text_encoder_1", "false", "true"),
    ("model.use_text_encoder_2", "false", "true"), ("model.unet_path", "a", "null"),
    ("model.refiner_name_or_path", "a", "null"), ("model.latent_space_version", "sdxl", "null"),
]  # fmt: skip
# keys that only tune another key, and that key, which is warned about or refused where it is on
IDLE = {
    "save.hf_repo_id": "save.push_to_hub",
    "save.hf_private": "save.push_to_hub",
    "train.text_encoder_lr": "train.train_text_encoder",
    "train.refiner_lr": "model.arch", "train.embedding_lr": "embedding", "train.adapter_lr": "adapter",
    "train.max_loss_debug": "train.max_loss",
    "model.layer_offloading_transformer_percent": "model.layer_offloading",
    "model.layer_offloading_text_encoder_percent": "model.layer_offloading",
    "logging.project_name": "logging.use_wandb", "logging.run_name": "logging.use_wandb",
    "logging.use_ui_logger": "sqlite_db_path", "model.compile_mode": "model.compile",
    "model.qtype_te": "model.quantize_te",
    **dict.fromkeys(("datasets[].shrink_video_to_frames", "datasets[].do_i2v", "datasets[].fps",
                     "datasets[].auto_frame_count"), "datasets[].num_frames"),
    **dict.fromkeys(("datasets[].audio_normalize", "datasets[].audio_preserve_pitch"), "datasets[].do_audio"),
    "datasets[].clip_image_shuffle_augmentations": "datasets[].clip_image_augmentations",
    "datasets[].shuffle_augmentations": "datasets[].augmentations",
    "datasets[].random_triggers_max": "datasets[].random_triggers",
    "train.switch_boundary_every": "model.arch",
    "train.differential_guidance_scale": "train.do_differential_guidance",
    "train.guidance_loss_target": "train.do_guidance_loss",
    "train.correct_pred_norm_multiplier": "train.correct_pred_norm",
    "train.short_and_long_captions_encoder_split": "train.short_and_long_captions",
    "train.unconditional_prompt": "train.do_cfg", "train.negative_prompt": "train.do_cfg",
    "train.paramiter_swapping_factor": "train.do_paramiter_swapping",
    "train.inverted_mask_prior_multiplier": "train.inverted_mask_prior",
    **dict.fromkeys(("train.min_batch_size", "train.max_batch_size", "train.batch_size_warmup_steps"),
                    "train.auto_scale_batch_size"),
    "model.experimental_xl": "model.is_xl", "model.unet_sample_size": "model.unet_path",
    "sample.fps": "sample.num_frames", "sample.adapter_conditioning_scale": "adapter",
    "sample.refiner_start_at": "model.refiner_name_or_path",
}  # fmt: skip
ALWAYS_SO = {"network.split_multistage_loras"}
# key, value, our setting and its value, and what it tunes, without which it is left out: ai-toolkit's web
# interface always writes it
TUNING = [
    ("datasets[].full_size_control_images", "false", "datasets.0.full_size_control_images", False,
     "datasets.0.control_path=a"),
    ("datasets[].control_transparent_color", "[9, 8, 7]", "datasets.0.control_transparent_color", (9, 8, 7),
     "datasets.0.control_path=a"),
    ("datasets[].invert_mask", "true", "datasets.0.invert_mask", True, "datasets.0.alpha_mask=true"),
    ("datasets[].mask_min_value", "0.1", "datasets.0.mask_min_value", 0.1, "datasets.0.mask_path=m"),
    ("datasets[].conditioning_data_dir", "m", "datasets.0.mask_path", "m", "train.masked_loss=true"),
    ("train.masked_loss", "true", "datasets.0.mask_path", "m", "datasets.0.mask_path=m"),
]  # fmt: skip


def setting(config, dotted):
    for part in dotted.split("."):
        config = config[int(part)] if part.isdecimal() else getattr(config, part)
    return config


def override(key, value):
    return f"{key.replace('[]', '.0')}={value}"


@pytest.mark.parametrize(("key", "value", "ours", "expected"), HONOURED, ids=lambda each: str(each))
def test_honoured_keys_reach_our_settings(load, key, value, ours, expected):
    found = setting(load(override(key, value)), ours)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("key", "value", "quiet"), WARNED, ids=lambda each: str(each))
def test_keys_without_effect_are_warned_about_once(load, warnings, key, value, quiet):
    (said,) = warnings(override(key, value))
    assert said.startswith(f"--set {override(key, value)}: {key.replace('[]', '.0')}: came ")
    assert "which has no effect here: " in said
    assert not warnings(override(key, quiet))
    assert load(override(key, value)) == load(override(key, quiet)) == load()


@pytest.mark.parametrize(("key", "value", "quiet"), REFUSED, ids=lambda each: str(each))
def test_keys_that_would_change_the_result_are_refused(load, refusal, warnings, key, value, quiet):
    said = refusal(override(key, value))
    assert said.startswith(f"--set {override(key, value)}: {key.replace('[]', '.0')}: came ")
    assert not warnings(override(key, quiet))
    assert load(override(key, quiet)) == load()


@pytest.mark.parametrize("name", ["locon", "lorm", "DoRAs"])
def test_another_kind_of_adapter_is_answered_with_those_that_there_are(refusal, name):
    said = refusal(f"network.type={name}")
    assert f"network.type: unknown kind of adapter {name!r}" in said and "use one of lora, dora, lokr" in said


def test_a_lokr_is_whole_unless_the_file_says_otherwise_as_in_ai_toolkit(load):
    assert load("network.type=LoKr").network.lokr_full_rank
    assert not load("network.type=lokr", "network.lokr_full_rank=false").network.lokr_full_rank
    assert not load().network.lokr_full_rank


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["network.type=lokr", "network.dropout=0.1"], "network.dropout has no effect with lokr"),
        (["network.type=lokr", "save.format=[kohya]"], "save.format has no effect with lokr"),
        (["network.type=dora", "save.format=[diffusers, paddle]"], "paddle has no place for dora"),
    ],
)
def test_settings_that_another_kind_of_adapter_lacks_are_refused(refusal, overrides, part):
    assert part in refusal(*overrides)


@pytest.mark.parametrize("key", sorted(IDLE))
def test_keys_that_only_tune_another_one_are_silent(load, warnings, key):
    assert not warnings(override(key, "1"))
    assert load(override(key, "1")) == load()
    assert KEYS[key].switch == IDLE[key]
    assert IDLE[key] in {row[0] for row in WARNED + REFUSED}


@pytest.mark.parametrize(("key", "value", "ours", "expected", "tuned"), TUNING, ids=lambda each: str(each))
def test_what_tunes_references_and_masks_needs_them(load, warnings, key, value, ours, expected, tuned):
    assert setting(load(override(key, value), tuned), ours) == expected
    if key.endswith(("_images", "_color", "_mask", "_value")):
        assert load(override(key, value)) == load() and not warnings(override(key, value))


# optimizer, key of train.optimizer_params, value -> our setting in train and its value
OF_OPTIMIZERS = [
    ("prodigy", "d0", "1e-5", "prodigy.d0", 1e-5),
    ("prodigy", "d_coef", "0.5", "prodigy.d_coef", 0.5),
    ("prodigy", "growth_rate", "1.02", "prodigy.growth_rate", 1.02),
    ("prodigy", "beta3", "0.99", "prodigy.beta3", 0.99),
    ("prodigy", "slice_p", "11", "prodigy.slice_p", 11),
    ("prodigy", "use_bias_correction", "true", "prodigy.use_bias_correction", True),
    ("prodigy", "safeguard_warmup", "true", "prodigy.safeguard_warmup", True),
    ("prodigy", "decouple", "true", "optimizer", "prodigy"),
    ("Prodigy8bit", "eps", "1e-7", "epsilon", 1e-7),
    ("AdaFactor", "clip_threshold", "0.8", "adafactor.clip_threshold", 0.8),
    ("adafactor", "decay_rate", "-0.7", "adafactor.decay_rate", -0.7),
    ("adafactor", "scale_parameter", "true", "adafactor.scale_parameter", True),
    ("adafactor", "relative_step", "true", "adafactor.relative_step", True),
    ("adafactor", "warmup_init", "false", "adafactor.warmup_init", False),
    ("adafactor", "beta1", "0.9", "adafactor.beta1", 0.9),
    ("adafactor", "eps", "[1e-28, 0.01]", "adafactor.eps2", 0.01),
    ("AdamWScheduleFree", "r", "0.5", "schedulefree.r", 0.5),
    ("schedulefree_adamw", "weight_lr_power", "1.0", "schedulefree.weight_lr_power", 1.0),
    ("AdamWScheduleFree", "warmup_steps", "7", "lr_warmup_steps", 7),
]


@pytest.mark.parametrize(("optimizer", "key", "value", "ours", "expected"), OF_OPTIMIZERS)
def test_parameters_of_optimizers_reach_our_settings(load, optimizer, key, value, ours, expected):
    found = setting(load(f"train.optimizer={optimizer}", f"train.optimizer_params.{key}={value}").train, ours)
    assert found == expected and type(found) is type(expected)


def test_the_lists_above_hold_every_key_of_the_table_and_no_other():
    rows = (*HONOURED, *WARNED, *REFUSED, *TUNING)
    tried = {row[0] for row in rows} | set(IDLE) | ALWAYS_SO
    tried |= {f"train.optimizer_params.{row[1]}" for row in OF_OPTIMIZERS}
    tried.add("train.diff_output_preservation")  # wants a trigger word: below
    assert tried == set(KEYS)


def test_every_honoured_key_leads_to_a_setting_that_exists():
    ours = set(_all_keys(RunConfig, ""))
    for key, rule in KEYS.items():
        if isinstance(rule, Honour) or (isinstance(rule, Read) and rule.to):
            assert (rule.to or key).replace("[]", ".0") in ours, key
    assert set(DEFAULTS) <= ours


def test_output_preservation_takes_its_keys(load, refusal):
    word = ["trigger_word=sks", "train.diff_output_preservation=true"]
    train = load(
        *word, "train.diff_output_preservation_class=person", "train.diff_output_preservation_multiplier=2"
    ).train
    assert (train.diff_output_preservation_class, train.preservation_weight) == ("person", 2)
    assert load("train.blank_prompt_preservation=true").train.preservation_weight == 1
    assert load("train.diff_output_preservation_class=person").train.preservation_weight == 0
    itself = "train.diff_output_preservation_class=a sks"
    assert "holds the trigger word" in refusal(*word, itself) and load(word[0], itself)
    assert "set one" in refusal(*word, "train.blank_prompt_preservation=true")
    assert "set trigger_word" in refusal("trigger_word=null", "train.diff_output_preservation=true")
