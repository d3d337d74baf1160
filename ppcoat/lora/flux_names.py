"""FLUX's modules under two sets of names: Black Forest Labs' (kohya, ComfyUI) and diffusers' (ours).

BFL keeps q, k, v in one matrix, and in single blocks the MLP's first matrix too. Its LoRA is one A and one B
for all of them, so a LoRA changes its rank on the way:

    fuse    A = the parts' A one above the other, B = block-diagonal, rank = sum of the parts' ranks;
            parts that share one A keep it, and the rank
    split   the blocks of a block-diagonal B; any other B is cut by rows, and every part gets all of A

Source: black-forest-labs/flux model.py and modules/layers.py; sd-scripts' FLUX conversion for the row order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.models.flux import ATTENTION_AND_MLP, MODULATION

from .delta import LoRAModule

# Name in BFL's code, inside a block -> diffusers' names of its rows, from the top.
DOUBLE, SINGLE = (
    ATTENTION_AND_MLP[blocks] | MODULATION[blocks]
    for blocks in ("transformer_blocks", "single_transformer_blocks")
)
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
# Names that XLabs' trainer gives: 1 is the picture, 2 the text. In single blocks it leaves linear1's MLP
# rows out.
XLABS = {
    "processor.qkv_lora1": DOUBLE["img_attn.qkv"],
    "processor.qkv_lora2": DOUBLE["txt_attn.qkv"],
    "processor.proj_lora1": DOUBLE["img_attn.proj"],
    "processor.proj_lora2": DOUBLE["txt_attn.proj"],
}
XLABS_SINGLE = {"processor.qkv_lora": SINGLE["linear1"][:3], "processor.proj_lora": SINGLE["linear2"]}
# Norms that have weights: of queries and keys, head by head.
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
SINGLE_NORMS = {"norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}
BLOCKS = {  # BFL's block list -> diffusers', and what is inside
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
}
# diffusers' last modulation has scale before shift, BFL's shift before scale
HALVES_SWAPPED = "norm_out.linear"
MLP_RATIO = 4  # rows of linear1's MLP part per column, wanted where no LoRA is on it


class FluxName(NamedTuple):
    """paths: diffusers' paths of the module's rows, from the top. of_bfl: the name was one of BFL's."""

    paths: tuple[str, ...]
    of_bfl: bool


def find(name: str) -> FluxName | None:
    """A module's name by either set, dotted or with underscores -> FluxName; None if FLUX has no such module.

    "double_blocks_3_img_attn_qkv" -> transformer_blocks.3.attn.to_q, .to_k, .to_v
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _INSIDE[""].get(name.replace(".", "_"))
    blocks, index, inside = match.groups()
    found = _INSIDE[blocks].get(inside.replace(".", "_"))
    if found is None:
        return None
    block = f"{BLOCKS[blocks][0] if blocks in BLOCKS else blocks}.{index}"
    return FluxName(tuple(f"{block}.{part}" for part in found.paths), found.of_bfl)


def split_fused(name: FluxName, module: LoRAModule) -> dict[str, LoRAModule]:
    """One module of a file -> {diffusers path: LoRAModule}, the delta-W of each being its rows of the whole.

    A part whose rows are zero is left out where others are blocks of their own. Raises ConfigError if the
    rows cannot be divided so.
    """
    if name.of_bfl and name.paths == (HALVES_SWAPPED,):
        return {HALVES_SWAPPED: _halves_swapped(module)}
    if len(name.paths) == 1:
        return {name.paths[0]: module}
    out, width_in = module.b.shape[0], module.a.shape[1]
    widths = [out // 3] * 3 if len(name.paths) == 3 else [width_in] * 3 + [out - 3 * width_in]
    if sum(widths) != out or min(widths) < 1:
        raise ConfigError(
            f"a LoRA of {', '.join(name.paths)} together has B of {out} rows, which cannot be divided so"
        )
    rows = np.split(module.b, np.cumsum(widths)[:-1])
    columns = _block_columns(rows)
    if columns is None:
        columns = [np.arange(module.rank)] * len(rows)
    return {
        path: LoRAModule(module.a[own], b[:, own], module.scale * len(own))
        for path, b, own in zip(name.paths, rows, columns, strict=True)
        if len(own)
    }


def is_norm(path: str) -> bool:
    """Whether a path of diffusers is that of a norm's weight, which has no columns."""
    return path.rpartition(".")[2].startswith(("norm_q", "norm_k", "norm_added_"))


def fuse(modules: Mapping[str, LoRAModule]) -> dict[str, LoRAModule]:
    """{diffusers path: LoRAModule} -> {BFL name, dotted: LoRAModule}, alpha folded into B.

    Parts that have no LoRA get zeros. Raises ConfigError for a path that FLUX does not have and for shapes
    that are not FLUX's.
    """
    groups: dict[str, dict[str, LoRAModule]] = {}
    paths_of: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        name, paths = bfl_name(path)
        paths_of[name] = paths
        groups.setdefault(name, {})[path] = module.folded()
    return {name: _fuse_parts(paths_of[name], parts) for name, parts in groups.items()}


def is_module(path: str) -> bool:
    """Whether FLUX has this path of diffusers, for a module that has a name of BFL's, too."""
    found = find(path)
    return found is not None and not found.of_bfl and not is_norm(path)


def bfl_name(path: str) -> tuple[str, tuple[str, ...]]:
    """diffusers path -> BFL's dotted name of the module that holds it, and all diffusers paths of that one.

    Raises ConfigError if FLUX has no such path.
    """
    blocks, _, rest = path.partition(".")
    index, _, inside = rest.partition(".")
    for bfl_blocks, (diffusers_blocks, table) in BLOCKS.items():
        for name, parts in table.items():
            if blocks == diffusers_blocks and inside in parts:
                return f"{bfl_blocks}.{index}.{name}", tuple(f"{blocks}.{index}.{part}" for part in parts)
    for name, parts in OUTSIDE.items():
        if path in parts:
            return name, parts
    raise ConfigError(f"{path} is no module of FLUX: kohya's format has no name for it, choose diffusers")


def _fuse_parts(paths: tuple[str, ...], parts: Mapping[str, LoRAModule]) -> LoRAModule:
    """Parts of one BFL module, folded and at least one of them there -> one LoRA with alpha = rank."""
    present = [parts[path] for path in paths if path in parts]
    if len(paths) == 1:
        return _halves_swapped(present[0]) if paths[0] == HALVES_SWAPPED else present[0]
    width_in = present[0].a.shape[1]
    widths = [width_in if i < 3 else MLP_RATIO * width_in for i in range(len(paths))]
    for i, path in enumerate(paths):
        if path in parts:
            module = parts[path]
            if module.a.shape[1] != width_in or (i < 3 and module.b.shape[0] != width_in):
                raise ConfigError(
                    f"LoRA of {path}: A {list(module.a.shape)} and B {list(module.b.shape)} do not stand "
                    f"beside the others of their block, wanted {width_in} -> {width_in}"
                )
            widths[i] = module.b.shape[0]
    shared = all(np.array_equal(module.a, present[0].a) for module in present)
    a = present[0].a if shared else np.concatenate([module.a for module in present])
    b = np.zeros([sum(widths), len(a)], present[0].b.dtype)
    row = column = 0
    for path, width in zip(paths, widths, strict=True):
        if path in parts:
            rank = parts[path].rank
            b[row : row + width, column : column + rank] = parts[path].b
            column += 0 if shared else rank
        row += width
    return LoRAModule(a, b, len(a))


def _block_columns(rows: list[np.ndarray]) -> list[np.ndarray] | None:
    """B cut by rows -> for each part the columns that are its own; None where a column serves several parts.

    Equal blocks are tried first, so that a part whose B is still zero keeps its rank.
    """
    used = np.stack([np.any(b != 0, axis=0) for b in rows])  # [parts, rank]; NaN counts as used
    parts, rank = used.shape
    if not used.any() or (used.sum(axis=0) > 1).any():
        return None
    if rank % parts == 0:
        equal = np.repeat(np.eye(parts, dtype=bool), rank // parts, axis=1)
        if not (used & ~equal).any():
            return [np.flatnonzero(own) for own in equal]
    return [np.flatnonzero(own) for own in used]


def _halves_swapped(module: LoRAModule) -> LoRAModule:
    if len(module.b) % 2:
        raise ConfigError(f"LoRA of {HALVES_SWAPPED}: B has {len(module.b)} rows, wanted two equal halves")
    return LoRAModule(module.a, np.concatenate(np.split(module.b, 2)[::-1]), module.alpha)


def _names(table: Mapping[str, tuple[str, ...]]) -> dict[str, FluxName]:
    """Names with underscores, BFL's and diffusers', of one table."""
    return _bfl_names(table) | _diffusers_names(table)


def _bfl_names(table: Mapping[str, tuple[str, ...]]) -> dict[str, FluxName]:
    return {name.replace(".", "_"): FluxName(parts, True) for name, parts in table.items()}


def _diffusers_names(table: Mapping[str, tuple[str, ...]]) -> dict[str, FluxName]:
    parts = [part for row in table.values() for part in row]
    return {part.replace(".", "_"): FluxName((part,), False) for part in parts}


_INSIDE = {
    "": _names(OUTSIDE),
    "double_blocks": _bfl_names(DOUBLE | DOUBLE_NORMS | XLABS),
    "single_blocks": _bfl_names(SINGLE | SINGLE_NORMS | XLABS_SINGLE),
    "transformer_blocks": _diffusers_names(DOUBLE | DOUBLE_NORMS),
    "single_transformer_blocks": _diffusers_names(SINGLE | SINGLE_NORMS),
}
_BLOCK = re.compile(rf"({'|'.join(name for name in _INSIDE if name)})[._](0|[1-9][0-9]*)[._](.+)")
