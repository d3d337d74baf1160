"""ai-toolkit's and kohya's keys of references and masks, and what each says in the terms of our schema.
Readers are as in ai_toolkit_values.py; what depends on the other keys of a dataset is settled at the end, in
`fit_pairs`.
"""

from __future__ import annotations

from typing import Any

from ppcoat.config.ai_toolkit_values import Document, Honour, Read, Reader, Reading, Refuse, Treatment

ARCHITECTURES = ("flux", "flux_kontext")
_MORE_CONTROLS = ("control_path_1", "control_path_2", "control_path_3")
_OF_CONTROLS = ("full_size_control_images", "control_transparent_color")
_OF_MASKS = ("invert_mask", "mask_min_value")
_MASKS = ("mask_path", "alpha_mask", "conditioning_data_dir")


def read_arch(value: Any, document: Document) -> Reading:
    """flux, flux:<tag> or flux_kontext; auto is our own."""
    name = value.partition(":")[0] if isinstance(value, str) else value
    if name in (None, "flux", "auto"):
        return Reading()
    if name not in ARCHITECTURES:
        raise ValueError(f"only FLUX.1 is trained here; wanted {' or '.join(ARCHITECTURES)}")
    return Reading({"model.arch": name})


def further_control(name: str) -> Reader:
    """The reader of one of ai-toolkit's numbered folders of references."""
    return lambda value, document: Reading({f"datasets[].{name}": value} if value else {})


def read_full_size(value: Any, document: Document) -> Reading:
    """As in our schema; ai-toolkit's false is another size."""
    note = "references are shown whole at their own size; ai-toolkit squeezes them to 512 x 512"
    notes = (note,) if value is False and document.nested and _any_has(document, "control_path") else ()
    return Reading({} if value is None else {"datasets[].full_size_control_images": value}, notes)


def read_conditioning(value: Any, document: Document) -> Reading:
    """kohya's folder of masks, where masked_loss is on; without it, it is for a ControlNet."""
    if not value:
        return Reading()
    if document.get("train", "masked_loss") is not True:
        raise ValueError(
            "for kohya that trains a ControlNet, which is not done here: for a loss by masks set "
            "train.masked_loss: true, for references to look at use control_path"
        )
    return Reading({"datasets[].mask_path": value})


def read_masked_loss(value: Any, document: Document) -> Reading:
    """kohya's switch: true needs masks, false forbids them."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("wanted true or false")
    masks = any(_any_has(document, key) for key in _MASKS)
    if value and not masks:
        raise ValueError("no dataset has masks: give mask_path (conditioning_data_dir) or alpha_mask")
    if value is False and masks:
        raise ValueError("masks are given, and they weigh the loss: leave out the one or the other")
    note = "weights are divided by their mean over the picture, so that small masks count as large ones do"
    return Reading({}, (note,) if value else ())


def fit_pairs(ours: dict[str, Any], nested: bool) -> None:
    """Numbered folders of references join control_path. In a nested file, what tunes references or masks that
    are not there is left out, for ai-toolkit's web interface always writes it."""
    datasets = ours.get("datasets")
    for entry in datasets if isinstance(datasets, list) else ():
        if not isinstance(entry, dict):
            continue
        more = [entry.pop(key) for key in _MORE_CONTROLS if key in entry]
        first = entry.get("control_path") or []
        if more:
            entry["control_path"] = [*([first] if isinstance(first, str) else first), *more]
        for keys, tuned in ((("control_path",), _OF_CONTROLS), (("mask_path", "alpha_mask"), _OF_MASKS)):
            if nested and not any(entry.get(key) for key in keys):
                for key in tuned:
                    entry.pop(key, None)


def _any_has(document: Document, key: str) -> bool:
    """Whether any dataset says something under this key."""
    datasets = document.data.get("datasets")
    datasets = datasets if isinstance(datasets, list) else ()
    return any(isinstance(each, dict) and bool(each.get(key)) for each in datasets)


EDITING: dict[str, Treatment] = {
    **dict.fromkeys(
        (
            "datasets[].control_path",
            "datasets[].control_transparent_color",
            "datasets[].mask_path",
            "datasets[].alpha_mask",
            "datasets[].invert_mask",
            "datasets[].mask_min_value",
        ),
        Honour(null=True),
    ),
    **{f"datasets[].{name}": Read(further_control(name)) for name in _MORE_CONTROLS},
    "datasets[].full_size_control_images": Read(read_full_size, "datasets[].full_size_control_images"),
    "datasets[].conditioning_data_dir": Read(read_conditioning, "datasets[].mask_path"),
    "train.masked_loss": Read(read_masked_loss),
    "train.inverted_mask_prior": Refuse(
        "datasets[].mask_min_value keeps some weight on what masks leave out; leave it out"
    ),
}
