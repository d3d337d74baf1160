"""What a key of an adapter file says: the module of the model, what the tensor is to it, and whose key it is.

    <prefixes><module>.<suffix>     transformer.transformer_blocks.0.attn.to_q.lora_A.weight
                                    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight
                                    lora_te1_text_model_encoder_layers_0_mlp_fc1.lokr_w1

Modules are FLUX's under the names of flux_names.py, the Linears of its CLIP and T5 encoders, or those of a
model whose paths are given; dotted or with underscores. Knows no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Set
from typing import NamedTuple

from . import flux_names

TRANSFORMER, CLIP, T5 = (
    "transformer",
    "text_encoder",
    "text_encoder_2",
)  # parts of a pipeline, by their folders
PART_NAMES = {TRANSFORMER: "the transformer", CLIP: "CLIP", T5: "T5"}

# What may stand before a module's name, stripped again and again, -> the program that is known by it.
PREFIXES = {
    "base_model.model.": "PEFT",
    "text_encoder.": "diffusers",
    "text_encoder_2.": "diffusers",
    "transformer.": "diffusers",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "text_encoders.clip_l.transformer.": "ComfyUI",
    "text_encoders.t5xxl.transformer.": "ComfyUI",
    "module.": "diffusers",
    "model.": "diffusers",
    "unet.": "diffusers",
    "lora_unet_": "kohya",
    "oft_unet_": "kohya",
    "lora_te1_": "kohya",
    "lora_te3_": "kohya",
    "lora_te2_": "OneTrainer",
    "lora_te_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
# Prefixes that say the part of the pipeline; SDXL's second CLIP, lora_te2_text_model, is none of FLUX's.
_PART_OF = {
    "text_encoder.": CLIP,
    "text_encoder_2.": T5,
    "text_encoders.clip_l.transformer.": CLIP,
    "text_encoders.t5xxl.transformer.": T5,
    "lora_te1_": CLIP,
    "lora_te_": CLIP,
    "lora_te2_": T5,
    "lora_te3_": T5,
}
# What stands after the module -> role of the tensor. A file may have the adapter's own name after lora_A.
_NAMED = r"(?:\.(?!weight$|bias$|down\.|up\.)[^.]+)?"
_SUFFIXES = [
    (
        rf"\.lora_A{_NAMED}\.weight|\.lora(?:_linear_layer)?\.down\.weight|\.(?:lora_)?down\.weight|\.lora_A",
        "A",
    ),
    (rf"\.lora_B{_NAMED}\.weight|\.lora(?:_linear_layer)?\.up\.weight|\.(?:lora_)?up\.weight|\.lora_B", "B"),
    (rf"\.lora_B{_NAMED}\.bias|\.lora_up\.bias", "B.bias"),
    (rf"\.lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
    (r"\.base_layer\.(weight|bias)|\.modules_to_save\.[^.]+\.(weight|bias)", "={}"),
    (r"\.([ab][12])\.weight", "{}"),
    (rf"\.oft_R{_NAMED}\.weight", "oft_R"),
    (rf"\.(oft_r|oft_s|boft_R|boft_s){_NAMED}", "{}"),
    (r"\.(alpha|dora_scale|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|oft_blocks|rescale|on_input)", "{}"),
    (r"(?:\.weight|\.scale)?\.diff|\.w_norm", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
    (r"\.(?:set_weight|weight|scale)", "=weight"),
    (r"\.bias", "=bias"),
    (r"\.reshape_weight", "shape"),
]
_SUFFIX = [(re.compile(f"(.+?)(?:{suffix})$"), role) for suffix, role in _SUFFIXES]
_CLIP_LINEAR = re.compile(
    r"(?:text_model[._])?encoder[._]layers[._](\d+)[._](self_attn|mlp)[._]([qkv]_proj|out_proj|fc[12])"
)
_T5_LINEAR = re.compile(
    r"encoder[._]block[._](\d+)[._]layer[._](\d+)[._](SelfAttention|DenseReluDense)[._]([qkvo]|wi_[01]|w[io])"
)


_SD = r"(?:lora_)?unet[._](?:down|up|input|output|mid|middle)_blocks?|(?:lora_)?unet[._]mid_block"
# Whose keys these are -> the model. The first that is found counts.
_MODELS = [
    (r"lora_te2_text_model_|text_encoder_2\.text_model\.|(?:down_blocks[._]2|input_blocks_[78]_1|middle_block_1)"
     r".*transformer_blocks[._][1-9]", "a LoRA of SDXL"),
    (_SD, "a LoRA of Stable Diffusion 1 or 2, or of SDXL"),
    (r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj|ff(?:_context)?[._]linear_(?:in|out)",
     "a LoRA of FLUX.2"),
    (r"distilled_guidance_layer", "a LoRA of Chroma"),
    (r"joint_blocks[._]|^(?:transformer\.)?pos_embed\.", "a LoRA of Stable Diffusion 3"),
    (r"transformer_blocks[._]\d+[._](?:(?:img|txt)_mlp[._]net|(?:img|txt)_mod[._]1)", "a LoRA of Qwen-Image"),
    (r"layers[._]\d+[._](?:attention[._]to_[qkv]|adaLN_modulation[._]0)", "a LoRA of Z-Image"),
    (r"layers[._]\d+[._](?:attention|feed_forward)[._]|(?:noise|context)_refiner[._]",
     "a LoRA of Z-Image, Lumina or NewBie"),
    (r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn|ffn)[._]", "a LoRA of Wan"),
    (r"(?:double|single)_blocks[._]\d+[._](?:img_attn_qkv|txt_attn_qkv|img_mlp[._]fc\d|linear\d?_qkv)|individual_token_refiner",
     "a LoRA of HunyuanVideo"),
    (r"transformer_blocks[._]\d+[._]attn[12][._]", "a LoRA of LTX-Video, PixArt, Sana or CogVideoX"),
    (r"ip_adapter", "an IP-Adapter"),
    (r"controlnet_", "a ControlNet"),
    (r"^(?:clip_l|clip_g|t5xxl|emb_params|string_to_param.*)$", "a textual inversion (an embedding)"),
    (r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|mid|down|up)", "an autoencoder (VAE)"),
]  # fmt: skip
# BFL's modules as HunyuanVideo names them, an underscore among the dots, and as wide as FLUX.1's.
_HUNYUANS = re.compile(r"double_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|proj)\.")
_SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".input_scale")  # of FP8 weights
_MOST_KNOWN = 4  # keys that FLUX has too, for each that says another model: Qwen-Image and FLUX.2 share many
_OF_ADAPTER = re.compile(r"lora|lokr|loha|hada|oft_|dora|\.(?:alpha|diff|diff_b|on_input|[ab][12]\.weight)$")
_ARCHITECTURES = {  # what modelspec.architecture or ss_base_model_version begin with
    "stable-diffusion-xl": "a LoRA of SDXL",
    "sdxl": "a LoRA of SDXL",
    "stable-diffusion-v": "a LoRA of Stable Diffusion 1 or 2",
    "sd_v": "a LoRA of Stable Diffusion 1 or 2",
    "flux.2": "a LoRA of FLUX.2",
    "flux2": "a LoRA of FLUX.2",
    "flux-2": "a LoRA of FLUX.2",
    "zimage": "a LoRA of Z-Image",
    "z-image": "a LoRA of Z-Image",
    "wan": "a LoRA of Wan",
    "qwen": "a LoRA of Qwen-Image",
    "hunyuan": "a LoRA of HunyuanVideo",
}


class Key(NamedTuple):
    """part: of the pipeline. name: the module in the file, without prefixes. target: the module's paths.
    program: whose spelling it is. role: of the tensor. stem: what stands before the role."""

    part: str
    name: str
    target: flux_names.FluxName
    program: str
    role: str
    stem: str


class KeyReader:
    """Keys -> Key. paths: the modules of one model, whose names count first; None: FLUX's. FLUX's own names
    are known for every model that has its blocks, also those of modules that it lacks."""

    def __init__(self, paths: Set[str] | None = None) -> None:
        self._paths = paths
        self.is_flux = paths is None or any("transformer_blocks" in path for path in paths)
        self._by_name: Mapping[str, str] = {path.replace(".", "_"): path for path in paths or ()}
        self._found: dict[str, tuple | None] = {}

    def read(self, key: str) -> Key | None:
        """None for a key that names no module or has no role."""
        for suffix, role in _SUFFIX:
            match = suffix.match(key)
            if match:
                stem, *variable = (group for group in match.groups() if group is not None)
                if stem not in self._found:
                    self._found[stem] = self._module(stem)
                if self._found[stem] is None:
                    return None
                part, name, target, program = self._found[stem]
                return Key(part, name, target, program, role.format(*variable), stem)
        return None

    def _module(self, stem: str) -> tuple | None:
        """Part, name, target and program, once so many prefixes are gone that the rest is a name."""
        for name, program, part in _without_prefixes(stem):
            found = self._find(name if "." in name else name.rstrip("_"), part)
            if found is not None:
                part, name, target = found
                bare = "XLabs" if ".processor." in name else "BFL" if target.of_bfl else "diffusers"
                return part, name, target, program or bare
        return None

    def _find(self, name: str, part: str | None) -> tuple[str, str, flux_names.FluxName] | None:
        if part in (None, TRANSFORMER):
            if self._paths is not None and (name in self._paths or name in self._by_name):
                path = name if name in self._paths else self._by_name[name]
                return TRANSFORMER, path, flux_names.FluxName((path,), False)
            module = flux_names.find(name)
            if module is not None and self.is_flux:
                return TRANSFORMER, name, module
        for encoder, path in ((CLIP, _clip_path(name)), (T5, _t5_path(name))):
            if path is not None and part in (None, encoder):
                return encoder, path, flux_names.FluxName((path,), False)
        return None


def _without_prefixes(name: str) -> Iterator[tuple[str, str, str | None]]:
    """`name`, then what is left of it as one of PREFIXES after the other goes; with each the program by whose
    prefix it began ("" for none), and the part that a prefix named."""
    program, part = "", None
    while True:
        yield name, program, part
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return
        program, part = program or PREFIXES[prefix], part or _PART_OF.get(prefix)
        name = name.removeprefix(prefix)


def _clip_path(name: str) -> str | None:
    match = _CLIP_LINEAR.fullmatch(name)
    return match and "text_model.encoder.layers.{}.{}.{}".format(*match.groups())


def _t5_path(name: str) -> str | None:
    match = _T5_LINEAR.fullmatch(name)
    return match and "encoder.block.{}.layer.{}.{}.{}".format(*match.groups())


def foreign_model(
    every: Collection[str],
    unknown: Collection[str],
    widths: Mapping[str, tuple[int, int]],
    header: Mapping[str, str],
) -> str | None:
    """Of which other model a file is, or that it is no adapter; None where nothing says so.

    every: its keys; unknown: those that mean nothing here; widths: [in, out] of its LoRAs by BFL's name. A
    key of a module of FLUX is no other model's, whatever its ending, nor is a file of FLUX's keys with a few
    strange ones.
    """
    if any(_is_flux_2(re.sub(r"^(?:double|single)_blocks[._]\d+[._]", "", name), *width)
           for name, width in widths.items()):  # fmt: skip
        return "a LoRA of FLUX.2"
    if any(_HUNYUANS.search(key) for key in every):
        return "a LoRA of HunyuanVideo"
    said = [header.get(field, "").lower() for field in ("modelspec.architecture", "ss_base_model_version")]
    for beginning, what in _ARCHITECTURES.items() if unknown else ():
        if any(text.startswith(beginning) for text in said):
            return what
    strange, known = [key for key in unknown if not _names_flux(key)], len(every) - len(unknown)
    for pattern, what in _MODELS:
        found = sum(re.search(pattern, key) is not None for key in strange)
        if found and known <= _MOST_KNOWN * found:
            return what
    return whole_model(every)


def whole_model(every: Collection[str]) -> str | None:
    """What a file is, by all its keys, that is no adapter at all; None where nothing says so."""
    if len(every) < 4 or any(_OF_ADAPTER.search(key) for key in every):
        return None
    if any("ip_adapter" in key for key in every):
        return "an IP-Adapter"
    plain = [key for key in every if key.endswith((".weight", ".bias", ".scale", *_SCALES))]
    return "a whole model, not a LoRA" if 2 * len(plain) > len(every) else None


def clean(text: str, longest: int = 300) -> str:
    """One line without control characters: a header comes from anywhere, and goes to a terminal."""
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def _names_flux(key: str) -> bool:
    """Whether a key begins with the name of a module of FLUX, whatever stands after it."""
    stems = (key[: dot.start()] for dot in re.finditer(r"\.", key))
    return any(
        part in (None, TRANSFORMER) and flux_names.find(name) is not None
        for stem in stems
        for name, _, part in _without_prefixes(stem)
    )


def _is_flux_2(name: str, width_in: int, width_out: int) -> bool:
    """FLUX.2 has BFL's names of FLUX.1, but is 6144 wide, or has another feed-forward: six times as wide
    inside, gated."""
    ratio = {"img_mlp_0": (1, 6), "txt_mlp_0": (1, 6), "img_mlp_2": (3, 1), "txt_mlp_2": (3, 1),
             "linear1": (1, 9), "linear2": (4, 1)}.get(name.replace(".", "_"), (0, 1))  # fmt: skip
    return width_in * ratio[1] == width_out * ratio[0] or (name.endswith("qkv") and width_in == 6144)
