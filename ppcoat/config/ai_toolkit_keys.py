"""ai-toolkit's keys for a FLUX LoRA, and what becomes of each: the one table that says so.

Keys are written without the `config.process[0]` around them. A key that is not here belongs to our own schema
(schema.py) or is unknown. Source: the published train_lora_flux_24gb.yaml and the section classes of
ai-toolkit's toolkit/config_modules.py.
"""

from __future__ import annotations

from typing import Any

from ppcoat.config import ai_toolkit_optimizers as optimizers
from ppcoat.config import ai_toolkit_values as values
from ppcoat.config.ai_toolkit_editing import EDITING, read_arch
from ppcoat.config.ai_toolkit_values import Honour, Idle, Read, Refuse, Treatment, Warn

_MEMORY = "it only saves memory; see train.gradient_checkpointing and the coat section for that"
_CACHED = "every picture and caption is encoded once before training and kept in main memory"
_ONCE = "every caption is encoded once in any case"
_CROPS = "pictures are cropped in the centre at full size; leave it out"
_SWITCH_OFF = "it is not built in; leave it out or set it to false"
_OTHER_TASK = "it belongs to another kind of training; leave it out"
_ONE_SET = "all pictures count the same; leave it out"
_TORCH = "it chooses between PyTorch kernels; Paddle chooses its own"
_SD_ERA = "it was made for noise-predicting models and FLUX is trained by flow matching; leave it out"
_CURVES = "curves and pictures go to VisualDL, <run folder>/logs"
_ONLY_FLUX = "only FLUX.1 is trained here; leave it out or set it to false"
_OLD_LOSSES = "the loss is that of flow matching; leave it out, or choose train.loss_type"
_FILM = "previews are single pictures"
_HUB = "nothing is uploaded; the LoRA file stays in the run folder"

_PROCESS: dict[str, Treatment] = {
    "name": Honour(),
    "type": Refuse("wanted type: sd_trainer", (None, "sd_trainer", "diffusion_trainer", "ui_trainer")),
    "training_folder": Honour("output_dir", null=True),
    "device": Read(values.read_device, "device"),
    "trigger_word": Honour(null=True),
    "training_seed": Honour("seed", null=True),
    "performance_log_every": Warn("times are on the progress bar", (None, 0, 10)),
    "log_dir": Warn(_CURVES, (None,)),
    "sqlite_db_path": Warn("there is no web interface", (None, "./aitk_db.db")),
    "torch_profiler": Warn(_TORCH),
    "first_sample": Warn("it changes previews only", (None,)),
    "guidance": Refuse(_OTHER_TASK, (None,)),
    "embedding": Refuse(_OTHER_TASK, (None,)),
    "decorator": Refuse(_OTHER_TASK, (None,)),
    "adapter": Refuse(_OTHER_TASK, (None,)),
    "do_lorm": Refuse(_OTHER_TASK),
    "precompute_text_embeddings": Warn(_CACHED, (None, True)),
    "precompute_image_embeddings": Warn(_CACHED, (None, True)),
    "save_cache_on_disk": Honour("datasets[].cache_to_disk", null=True),
    "quantize": Honour("model.quantize", null=True),
    "adam8bit": Read(optimizers.read_adam8bit),
    "slider": Refuse(_OTHER_TASK, (None, {})),
    "monitoring": Warn("there is no web interface", (None, {})),
    "meta": Warn(
        "the LoRA file's header has its own fields (rank, trigger word, step, base model)",
        (None, {"name": "[name]", "version": "1.0"}),
    ),
}  # fmt: skip
_NETWORK: dict[str, Treatment] = {
    "network.type": Honour(),
    "network.linear": Honour(),
    "network.rank": Honour("network.linear", null=True),
    "network.linear_alpha": Honour(),
    "network.alpha": Honour("network.linear_alpha", null=True),
    **dict.fromkeys(("network.conv", "network.conv_alpha"), Warn("FLUX has no convolutions", (None, 0, 16))),
    **dict.fromkeys(("network.lokr_full_rank", "network.lokr_factor"), Honour(null=True)),
    "network.old_lokr_format": Warn("the file has the names of its new format, transformer.X.lokr_w1"),
    "network.normalize": Refuse("the LoRA's weights are not scaled; leave it out"),
    "network.lorm_config": Refuse(_OTHER_TASK, (None,)),
    "network.dropout": Honour(null=True),
    "network.network_kwargs.only_if_contains": Honour("network.only_if_contains", null=True),
    "network.network_kwargs.ignore_if_contains": Honour("network.ignore_if_contains", null=True),
    "network.transformer_only": Refuse("name Linears outside the blocks in network.targets", (True, None)),
    "network.pretrained_lora_path": Honour(null=True),
    "network.layer_offloading": Warn(_MEMORY),
    "network.split_multistage_loras": Warn("FLUX has one stage", (None, True, False)),
    "network.all_layers": Warn("network.targets chooses the Linears"),
}  # fmt: skip
_SAVE: dict[str, Treatment] = {
    "save.dtype": Read(values.read_save_dtype, "save.dtype"),
    "save.save_every": Honour(),
    "save.max_step_saves_to_keep": Honour(),
    "save.save_format": Warn("a LoRA is always a safetensors file; save.format chooses its key names",
                             (None, "safetensors", "diffusers")),
    "save.push_to_hub": Warn(_HUB),
}  # fmt: skip
_DATASET: dict[str, Treatment] = {
    "datasets[].folder_path": Honour(),
    "datasets[].dataset_path": Honour("datasets[].folder_path", null=True),
    "datasets[].caption_ext": Honour(null=True),
    "datasets[].caption_type": Honour("datasets[].caption_ext", null=True),
    "datasets[].default_caption": Honour(),
    "datasets[].trigger_word": Read(values.read_trigger_word, "datasets[].trigger_word"),
    "datasets[].caption_dropout_rate": Honour(),
    "datasets[].batch_size": Honour("train.batch_size", null=True),
    "datasets[].num_repeats": Honour(),
    "datasets[].resolution": Honour(),
    "datasets[].buckets": Read(values.read_buckets, "datasets[].bucket_rule"),
    "datasets[].bucket_tolerance": Honour("datasets[].bucket_step", null=True),
    "datasets[].square_crop": Read(values.read_square_crop),
    "datasets[].random_crop": Refuse(_CROPS),
    "datasets[].random_scale": Refuse(_CROPS),
    "datasets[].scale": Refuse(_CROPS, (None, 1)),
    "datasets[].shuffle_tokens": Honour(null=True),
    "datasets[].token_dropout_rate": Honour(null=True),
    "datasets[].keep_tokens": Honour(null=True),
    "datasets[].replacements": Refuse("captions are not edited; change the caption files", (None, [])),
    "datasets[].cache_latents": Warn(_CACHED, (None, True)),
    "datasets[].cache_latents_to_disk": Honour("datasets[].cache_to_disk", null=True),
    "datasets[].cache_text_embeddings": Warn(_ONCE, (None, True, False)),
    "datasets[].is_reg": Honour(null=True),
    "datasets[].prior_reg": Refuse("the loss has one form for all pictures; leave it out, or set is_reg"),
    "datasets[].loss_multiplier": Refuse(_ONE_SET, (None, 1)),
    "datasets[].network_weight": Refuse(_ONE_SET, (None, 1)),
    "datasets[].flip_x": Honour(null=True),
    "datasets[].flip_y": Honour(null=True),
    "datasets[].num_workers": Warn(_CACHED, (None,)),
    "datasets[].prefetch_factor": Warn(_CACHED, (None,)),
    **dict.fromkeys(("datasets[].augments", "datasets[].augmentations"),
                    Refuse("pictures are not augmented; leave it out", (None, []))),
    "datasets[].clip_image_path": Refuse(_OTHER_TASK, (None,)),
    "datasets[].num_frames": Refuse(_OTHER_TASK, (None, 1)),
    "datasets[].do_audio": Refuse(_OTHER_TASK),
    "datasets[].poi": Refuse(_CROPS, (None,)),
    "datasets[].type": Refuse("wanted image", (None, "image")),
    **dict.fromkeys(("datasets[].controls", "datasets[].extra_values"), Refuse(_OTHER_TASK, (None, []))),
    **dict.fromkeys(
        ("datasets[].inpaint_path", "datasets[].unconditional_path"),
        Refuse(_OTHER_TASK, (None, "")),
    ),
    **dict.fromkeys(
        ("datasets[].clip_image_from_same_folder", "datasets[].standardize_images"), Refuse(_OTHER_TASK)
    ),
    "datasets[].clip_image_augmentations": Refuse(_OTHER_TASK, (None, [])),
    "datasets[].cache_clip_vision_to_disk": Warn(_CACHED),
    "datasets[].use_short_captions": Refuse("the caption is trained; put the short one there"),
    "datasets[].random_triggers": Refuse("there is one trigger word; leave it out", (None, [])),
    "datasets[].fast_image_size": Warn("every picture is decoded once as a check"),
}  # fmt: skip
_TRAIN: dict[str, Treatment] = {
    "train.batch_size": Honour(),
    "train.steps": Honour(),
    "train.gradient_accumulation": Honour(),
    "train.gradient_accumulation_steps": Read(values.read_accumulated_steps),
    "train.train_unet": Refuse("the LoRA of the transformer is what is trained; leave it out", (True, None)),
    "train.train_text_encoder": Refuse("text encoders stay frozen; set it to false"),
    "train.gradient_checkpointing": Honour(),
    "train.noise_scheduler": Refuse("FLUX is trained by flow matching: flowmatch", (None, "flowmatch")),
    "train.optimizer": Read(optimizers.read_optimizer, "train.optimizer"),
    "train.adam8bit": Read(optimizers.read_adam8bit),
    **{f"train.optimizer_params.{key}": Honour(to) for key, to in optimizers.SAME.items()},
    **{f"train.optimizer_params.{key}": Read(reader) for key, reader in optimizers.READERS.items()},
    "train.lr": Read(optimizers.read_lr),
    "train.unet_lr": Read(optimizers.read_unet_lr, "train.lr"),
    "train.lr_scheduler": Read(optimizers.read_lr_scheduler, "train.lr_scheduler"),
    "train.lr_scheduler_params": Read(optimizers.read_lr_scheduler_params),
    "train.dtype": Read(values.read_train_dtype, "model.dtype"),
    "train.max_grad_norm": Honour(),
    "train.gradient_clipping": Honour("train.max_grad_norm", null=True),
    "train.timestep_type": Honour(),
    **dict.fromkeys(("train.linear_timesteps", "train.linear_timesteps2"),
                    Refuse("use train.timestep_type: linear, which weighs all noise levels alike")),
    "train.content_or_style": Refuse("noise levels are not shifted; use balanced", (None, "balanced")),
    "train.min_denoising_steps": Refuse("all noise levels are trained; leave it out", (None, 0)),
    "train.max_denoising_steps": Refuse("all noise levels are trained; leave it out", (None, 999, 1000)),
    "train.loss_type": Honour(),
    "train.cfg_scale": Honour(),
    "train.bypass_guidance_embedding": Refuse(_SWITCH_OFF),
    "train.ema_config.use_ema": Honour("train.ema.use_ema", null=True),
    "train.ema_config.ema_decay": Honour("train.ema.ema_decay", null=True),
    "train.ema_config.use_feedback": Refuse(_SWITCH_OFF),
    "train.ema_config.param_multiplier": Refuse("the weights are not scaled; leave it out", (None, 1)),
    "train.skip_first_sample": Honour("sample.skip_first_sample", null=True),
    "train.force_first_sample": Honour("sample.force_first_sample", null=True),
    "train.disable_sampling": Read(values.read_disable_sampling),
    "train.unload_text_encoder": Refuse(
        "in ai-toolkit it replaces every caption by the trigger word; leave it out, text encoders are always "
        "released after the captions are encoded"
    ),
    "train.cache_text_embeddings": Warn(_ONCE, (None, True, False)),
    **dict.fromkeys(("train.diff_output_preservation", "train.diff_output_preservation_class",
                     "train.diff_output_preservation_multiplier", "train.blank_prompt_preservation",
                     "train.blank_prompt_preservation_multiplier"), Honour(null=True)),  # fmt: skip
    "train.validation_config": Read(values.read_validation_config, "train.validation"),
    "train.reg_weight": Honour("reg_weight", null=True),
    "train.start_step": Refuse("a run goes on from the checkpoint in its folder; leave it out", (None,)),
    "train.max_loss": Refuse("the loss is not clipped; leave it out", (None,)),
    "train.xformers": Warn(_TORCH),
    "train.sdp": Warn(_TORCH),
    "train.attention_backend": Warn(_TORCH, (None, "native")),
    "train.noise_offset": Refuse(_SD_ERA, (None, 0)),
    "train.snr_gamma": Refuse(_SD_ERA, (None,)),
    "train.min_snr_gamma": Refuse(_SD_ERA, (None,)),
    "train.learnable_snr_gos": Refuse(_SD_ERA),
    **dict.fromkeys(
        ("train.do_differential_guidance", "train.do_guidance_loss", "train.do_prior_divergence",
         "train.do_cfg", "train.do_random_cfg", "train.correct_pred_norm", "train.free_u",
         "train.merge_network_on_save", "train.short_and_long_captions", "train.single_item_batching",
         "train.force_consistent_noise", "train.blended_blur_noise", "train.match_noise_norm"),
        Refuse(_SWITCH_OFF),
    ),
    "train.do_paramiter_swapping": Refuse("all of the LoRA trains in every step; set it to false"),
    "train.adapter_assist_name_or_path": Refuse(_OTHER_TASK, (None,)),
    "train.match_adapter_assist": Refuse(_OTHER_TASK),
    "train.match_adapter_chance": Refuse(_OTHER_TASK, (None, 0)),
    **dict.fromkeys(
        ("train.noise_multiplier", "train.img_multiplier", "train.latent_multiplier",
         "train.target_noise_multiplier", "train.optimal_noise_pairing_samples"),
        Refuse(_SD_ERA, (None, 1)),
    ),
    **dict.fromkeys(
        ("train.random_noise_multiplier", "train.random_noise_shift", "train.weight_jitter",
         "train.prompt_saturation_chance"),
        Refuse(_SD_ERA, (None, 0)),
    ),
    "train.loss_target": Refuse(_OLD_LOSSES, (None, "noise")),
    "train.target_norm_std": Refuse(_OLD_LOSSES, (None,)),
    "train.auto_scale_batch_size": Warn("the batch stays as it is; memory: auto chooses one that fits"),
    "train.show_turbo_outputs": Warn("previews are drawn in sample.sample_steps steps"),
}  # fmt: skip
_MODEL: dict[str, Treatment] = {
    "model.name_or_path": Honour(),
    "model.is_flux": Refuse("only FLUX is trained here; set it to true", (None, True)),
    "model.arch": Read(read_arch, "model.arch"),
    "model.dtype": Read(values.read_model_dtype, "model.dtype"),
    "model.quantize": Honour(null=True),
    "model.qtype": Read(values.read_qtype),
    "model.quantize_te": Warn("text encoders stay in model.dtype and are released before training"),
    "model.low_vram": Warn("weights are always read one by one; for smaller cards see model.blocks_to_swap"),
    "model.layer_offloading": Warn(_MEMORY),
    "model.assistant_lora_path": Refuse("no second LoRA is loaded; train on FLUX.1-dev without", (None,)),
    "model.attn_masking": Refuse("text padding is not masked; set it to false"),
    "model.compile": Warn(_TORCH),
    "model.block_compile": Warn(_TORCH),
    "model.split_model_over_gpus": Refuse("the model stays on one device; set it to false"),
    "model.lora_path": Refuse("no other LoRA is loaded; merge it into the base folder first", (None,)),
    "model.inference_lora_path": Refuse("no other LoRA is loaded for previews; leave it out", (None,)),
    "model.vae_path": Honour("model.vae", null=True),
    "model.te_name_or_path": Honour("model.text_encoders", null=True),
    "model.extras_name_or_path": Honour("model.tokenizers", null=True),  # a FLUX folder gives all that lacks
    "model.unet_path": Refuse("make it model.name_or_path, and the folder text_encoders", (None,)),
    "model.model_kwargs": Refuse("there is nothing to pass on; leave it out", (None, {})),
    "model.quantize_kwargs": Refuse("all Linears are quantised; leave it out",
                                    (None, {}, {"exclude": []})),
    "model.accuracy_recovery_adapter": Refuse("no second LoRA is loaded; leave it out", (None, "")),
    "model.auto_memory": Warn(_MEMORY),
    "model.text_encoder_bits": Warn("text encoders stay in model.dtype and are released before training",
                                    (None, 16)),
    "model.use_flux_cfg": Refuse("train.cfg_scale sets the guidance that training sees; set it to false"),
    **dict.fromkeys(
        ("model.is_v2", "model.is_v3", "model.is_xl", "model.is_v_pred", "model.is_pixart", "model.is_ssd",
         "model.is_auraflow", "model.is_lumina2", "model.is_vega", "model.is_pixart_sigma"),
        Refuse(_ONLY_FLUX),
    ),
    **dict.fromkeys(("model.use_text_encoder_1", "model.use_text_encoder_2"),
                    Refuse("both text encoders are used; leave it out", (None, True))),
    "model.refiner_name_or_path": Refuse(_ONLY_FLUX, (None,)),
    "model.latent_space_version": Refuse(_ONLY_FLUX, (None,)),
}  # fmt: skip
_SAMPLE: dict[str, Treatment] = {
    "sample.sampler": Warn("FLUX is drawn by flow matching: flowmatch", (None, "flowmatch")),
    "sample.sample_every": Honour(),
    "sample.sample_start_step": Warn("previews start with the first sample_every", (None, 0)),
    "sample.width": Read(values.preview_setting("width"), "sample.width"),
    "sample.height": Read(values.preview_setting("height"), "sample.height"),
    "sample.prompts": Read(values.read_prompts, "sample.prompts"),
    "sample.samples": Read(values.read_samples, "sample.samples"),
    "sample.neg": Warn("FLUX draws without a negative prompt", (None, False, "")),
    "sample.seed": Read(values.preview_setting("seed"), "sample.seed"),
    "sample.walk_seed": Honour(),
    "sample.guidance_scale": Read(values.preview_setting("guidance_scale"), "sample.guidance_scale"),
    "sample.sample_steps": Read(values.preview_setting("sample_steps"), "sample.sample_steps"),
    **dict.fromkeys(("sample.format", "sample.ext"),
                    Warn("previews are PNG files with the prompt inside", (None, "png"))),
    "sample.num_frames": Warn(_FILM, (None, 1)),
    "sample.network_multiplier": Warn("previews show the LoRA at full strength", (None, 1, "1", "1.0")),
    "sample.guidance_rescale": Warn("it is not built in", (None, 0)),
    "sample.do_cfg_norm": Warn("it is not built in"),
    "sample.extra_values": Warn("FLUX takes none", (None, [])),
}  # fmt: skip
_LOGGING: dict[str, Treatment] = {
    "logging.log_every": Honour(),
    "logging.verbose": Warn("there is one amount of output"),
    "logging.use_wandb": Warn(_CURVES),
}  # fmt: skip

# Switch -> keys that say something only where it is on.
_IDLE = {
    "save.push_to_hub": "save.hf_repo_id save.hf_private",
    "datasets[].clip_image_augmentations": "datasets[].clip_image_shuffle_augmentations",
    "datasets[].augmentations": "datasets[].shuffle_augmentations",
    "datasets[].random_triggers": "datasets[].random_triggers_max",
    "train.train_text_encoder": "train.text_encoder_lr",
    "model.arch": "train.refiner_lr train.switch_boundary_every",
    "embedding": "train.embedding_lr",
    "adapter": "train.adapter_lr sample.adapter_conditioning_scale",
    "train.max_loss": "train.max_loss_debug",
    "train.do_differential_guidance": "train.differential_guidance_scale",
    "train.do_guidance_loss": "train.guidance_loss_target",
    "train.correct_pred_norm": "train.correct_pred_norm_multiplier",
    "train.short_and_long_captions": "train.short_and_long_captions_encoder_split",
    "train.do_cfg": "train.unconditional_prompt train.negative_prompt",
    "train.do_paramiter_swapping": "train.paramiter_swapping_factor",
    "train.inverted_mask_prior": "train.inverted_mask_prior_multiplier",
    "train.auto_scale_batch_size":
        "train.min_batch_size train.max_batch_size train.batch_size_warmup_steps",
    "model.layer_offloading":
        "model.layer_offloading_transformer_percent model.layer_offloading_text_encoder_percent",
    "model.quantize_te": "model.qtype_te",
    "model.compile": "model.compile_mode",
    "model.is_xl": "model.experimental_xl",
    "model.unet_path": "model.unet_sample_size",
    "sample.num_frames": "sample.fps",
    "model.refiner_name_or_path": "sample.refiner_start_at",
    "logging.use_wandb": "logging.project_name logging.run_name",
    "datasets[].num_frames":
        "datasets[].shrink_video_to_frames datasets[].do_i2v datasets[].fps "
        "datasets[].auto_frame_count",
    "datasets[].do_audio": "datasets[].audio_normalize datasets[].audio_preserve_pitch",
    "sqlite_db_path": "logging.use_ui_logger",
}  # fmt: skip

KEYS: dict[str, Treatment] = _PROCESS | _NETWORK | _SAVE | _DATASET | _TRAIN | _MODEL | _SAMPLE | _LOGGING
KEYS |= EDITING
KEYS |= {key: Idle(switch) for switch, keys in _IDLE.items() for key in keys.split()}

# What ai-toolkit takes where its YAML says nothing and our schema has another default. Not here: train.dtype
# (fp32 there, which few cards can hold), the unseeded start, and linear_alpha, which is the rank for FLUX.
DEFAULTS: dict[str, Any] = {
    "network.linear": 4,
    "save.save_every": 1000,
    "save.max_step_saves_to_keep": 5,
    "save.dtype": "float16",
    "train.steps": 1000,
    "train.lr": 1e-6,
    "train.epsilon": 1e-6,
    "train.gradient_checkpointing": True,
    "sample.sample_every": 100,
    "sample.skip_first_sample": False,
    "sample.seed": 0,
    "sample.guidance_scale": 7.0,
    "sample.sample_steps": 20,
    "logging.log_every": 100,
}
