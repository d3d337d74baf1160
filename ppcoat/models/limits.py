"""What may stand in the JSON files of a model: each key that is read here, with its type and limits.

Keys that are not here are of newer programs, or say nothing about the computation: they are allowed, and
`known` keeps them from the libraries that build the parts. That sizes are those of the weights is checked
where a part is opened (loading.py, newbie/files.py). Defaults are those of the classes that are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ppcoat.errors import ConfigError
from ppcoat.reading import shown

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Epsilon = Annotated[float, Field(gt=0, le=0.1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=1000)]
Base = Annotated[float, Field(gt=1, le=1e12)]  # of rotary angles
Shift = Annotated[float, Field(gt=0, le=100)]


class Limits(BaseModel):
    """A JSON object; strict: "2" and true are no numbers, NaN is none either."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True, extra="ignore")


class FluxTransformer(Limits):
    """transformer/config.json of FLUX.1."""

    class_name: Literal["FluxTransformer2DModel"] = Field("FluxTransformer2DModel", alias="_class_name")
    patch_size: Annotated[int, Field(ge=1, le=1)] = 1
    in_channels: Size = 64
    out_channels: Size | None = None
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    attention_head_dim: Size = 128
    num_attention_heads: Size = 24
    joint_attention_dim: Size = 4096
    pooled_projection_dim: Size = 768
    guidance_embeds: bool = False
    axes_dims_rope: Annotated[list[Size], Field(min_length=3, max_length=3)] = [16, 56, 56]


class Autoencoder(Limits):
    """vae/config.json of FLUX.1 and NewBie-image."""

    class_name: Literal["AutoencoderKL"] = Field("AutoencoderKL", alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: list[Literal["DownEncoderBlock2D"]] = ["DownEncoderBlock2D"]
    up_block_types: list[Literal["UpDecoderBlock2D"]] = ["UpDecoderBlock2D"]
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=8)] = [64]
    layers_per_block: Layers = 1
    act_fn: Literal["silu", "swish"] = "silu"
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    sample_size: Annotated[int, Field(ge=8, le=8192)] = 32
    scaling_factor: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.18215
    shift_factor: Annotated[float, Field(ge=-100, le=100)] | None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: Literal[True] = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        channels, groups = self.block_out_channels, self.norm_num_groups
        for key in ("down_block_types", "up_block_types"):
            if len(getattr(self, key)) != len(channels):
                count = len(getattr(self, key))
                raise ValueError(f"{key} has {count} entries, block_out_channels {len(channels)}")
        if any(width % groups for width in channels):
            raise ValueError(f"block_out_channels {channels} must be multiples of norm_num_groups {groups}")
        return self


class ClipText(Limits):
    """text_encoder/config.json of FLUX.1."""

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    projection_dim: Size = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Size = 77
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Rate = 0.0
    initializer_range: Factor = 0.02
    initializer_factor: Factor = 1.0
    pad_token_id: Id | None = 1
    bos_token_id: Id | None = 49406
    eos_token_id: Id = 49407

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is beyond vocab_size {self.vocab_size}")
        return self


class T5Text(Limits):
    """text_encoder_2/config.json of FLUX.1."""

    vocab_size: Size = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Layers = 6
    num_heads: Size = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1 << 16)] = 32
    relative_attention_max_distance: Size = 128
    num_decoder_layers: Layers | None = None
    dropout_rate: Rate = 0.1
    initializer_factor: Factor = 1.0
    pad_token_id: Id | None = 0
    eos_token_id: Id | None = 1
    decoder_start_token_id: Id | None = 0
    is_encoder_decoder: bool = True
    layer_norm_epsilon: Epsilon = 1e-6
    feed_forward_proj: Literal["gated-gelu"] = "gated-gelu"
    dense_act_fn: Literal["gelu_new"] = "gelu_new"
    is_gated_act: Literal[True] = True
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets {buckets} must be a multiple of 4, and "
                f"relative_attention_max_distance {distance} more than a quarter of it"
            )
        return self


class Scheduler(Limits):
    """scheduler_config.json of FLUX.1; which of its ways are implemented, the scheduler's class says."""

    class_name: Literal["FlowMatchEulerDiscreteScheduler"] = Field(
        "FlowMatchEulerDiscreteScheduler", alias="_class_name"
    )
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    shift: Shift = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Annotated[float, Field(ge=-10, le=10)] = 0.5
    max_shift: Annotated[float, Field(ge=-10, le=10)] = 1.15
    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len {self.base_image_seq_len} must be less than max_image_seq_len "
                f"{self.max_image_seq_len}"
            )
        return self


class Token(Limits):
    """A special token, as older versions write it."""

    content: str


Special = Annotated[str, Field(max_length=1000)] | Token | None
Flag = bool | None


class TokenizerSettings(Limits):
    """tokenizer_config.json, special_tokens_map.json."""

    model_max_length: Annotated[float, Field(ge=2)] | None = None
    bos_token: Special = None
    eos_token: Special = None
    pad_token: Special = None
    unk_token: Special = None
    sep_token: Special = None
    cls_token: Special = None
    mask_token: Special = None
    additional_special_tokens: Annotated[list[Special], Field(max_length=10_000)] | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Token] | None = None
    extra_ids: Annotated[int, Field(ge=0, le=10_000)] = 0
    do_lower_case: Flag = None
    add_prefix_space: Flag = None
    legacy: Flag = None
    errors: Literal["replace", "strict", "ignore"] | None = None
    tokenizer_class: str | None = None
    sp_model_kwargs: Annotated[dict, Field(max_length=0)] | None = None


class WeightIndex(Limits):
    """*.safetensors.index.json: tensor -> file beside it; the CRC-32 are of our own copies."""

    class Metadata(Limits):
        crc32: dict[str, Annotated[int, Field(ge=0, lt=1 << 32)]] = {}

    metadata: Metadata | None = Metadata()
    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w.-]{1,200}$")]] = Field(min_length=1)


class PipelineIndex(Limits):
    """model_index.json."""

    class_name: str | None = Field(None, alias="_class_name", max_length=200)


class NextDiT(Limits):
    """transformer/config.json of NewBie-image; that sizes fit together, the model's class says."""

    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    in_channels: Size = 16
    dim: Size = 2304
    n_layers: Layers = 36
    n_refiner_layers: Annotated[int, Field(ge=0, le=1000)] = 2
    n_heads: Size = 24
    n_kv_heads: Size = 8
    multiple_of: Size = 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=100)] | None = None
    norm_eps: Epsilon = 1e-5
    qk_norm: bool = True
    cap_feat_dim: Size = 2560
    clip_text_dim: Size = 1024
    axes_dims: Annotated[list[Size], Field(min_length=3, max_length=3)] = [32, 32, 32]
    axes_lens: Annotated[list[Size], Field(min_length=3, max_length=3)] = [1024, 512, 512]


class RopeScaling(Limits):
    """Of Gemma 3, flat or for one type of layers."""

    rope_type: str = "default"
    type: str = "default"
    factor: Annotated[float, Field(ge=1, le=1000)] = 1.0
    rope_theta: Base | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if "linear" in (self.rope_type, self.type) and "factor" not in self.model_fields_set:
            raise ValueError("linear scaling wants a factor")
        return self


class Gemma3Text(Limits):
    """text_encoder/config.json of NewBie-image, or its text_config."""

    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Annotated[int, Field(ge=2, le=1000)] | None = None
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)] | None = None
    query_pre_attn_scalar: Annotated[float, Field(gt=0, le=1e6)] | None = None
    rms_norm_eps: Epsilon | None = None
    sliding_window: Size | None = None
    sliding_window_pattern: Layers | None = None
    rope_theta: Base | None = None
    rope_local_base_freq: Base | None = None
    rope_scaling: RopeScaling | None = None
    rope_parameters: dict[str, RopeScaling] | None = None
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        heads, of_keys = self.num_attention_heads, self.num_key_value_heads
        if heads % of_keys:
            raise ValueError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads, {of_keys}"
            )
        types, layers = self.layer_types, self.num_hidden_layers or 34
        if types is not None and len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers is {layers}")
        return self


class Gemma3(Limits):
    """text_encoder/config.json of NewBie-image with a picture half, too."""

    text_config: Gemma3Text


class JinaSizes(Limits):
    """text_config.hf_model_config_kwargs of JinaClip."""

    vocab_size: Size = 250002
    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 16
    type_vocab_size: Size = 1
    layer_norm_eps: Epsilon = 1e-5
    rotary_emb_base: Base = 20000.0
    lora_rank: Size | None = None
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads or width // heads % 2:
            raise ValueError(f"hidden_size {width} must be an even multiple of num_attention_heads {heads}")
        return self


class JinaText(Limits):
    """text_config of JinaClip."""

    hf_model_config_kwargs: JinaSizes = JinaSizes()
    hf_model_name_or_path: str | None = None


class JinaClip(Limits):
    """clip_model/config.json of NewBie-image."""

    text_config: JinaText = JinaText()


LIMITS: dict[str, type[Limits]] = {
    "transformer": FluxTransformer,
    "vae": Autoencoder,
    "text_encoder": ClipText,
    "text_encoder_2": T5Text,
    "scheduler": Scheduler,
    "nextdit": NextDiT,
    "jina_clip": JinaClip,
}


# pydantic speaks of Python's types
_WANTED = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_pattern_mismatch": "a name of no other letters",
}


def limits_of(part: str, config: Mapping[str, Any]) -> type[Limits]:
    """The limits of a part's config.json; part: of FLUX.1 by its folder, "nextdit", "gemma3", "jina_clip"."""
    if part == "gemma3":
        return Gemma3 if "text_config" in config else Gemma3Text
    return LIMITS[part]


def within(limits: type[Limits], config: Mapping[str, Any], file: object) -> Limits:
    """config as an object of `limits`, its keys that are known. Raises ConfigError that names the file, the
    key, what came and what was wanted."""
    try:
        return limits.model_validate(config)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key = ".".join(shown(str(each)) for each in problem["loc"])
    advice = "take the file from the original model"
    if problem["type"] == "value_error":
        said = str(problem["ctx"]["error"])
    elif problem["type"] == "missing":
        said = "is missing"
    else:
        wanted = _WANTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
        said = f"came {shown(problem['input'])}, wanted {wanted}"
    raise ConfigError(f"{file}: {key + ': ' if key else ''}{said}: {advice}")
