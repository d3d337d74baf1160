"""The form of a run on the page: a widget for each setting, its description below it, and what is wrong with
it in the place of that. What it holds and means is in form.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nicegui import ui

from ppcoat.studio.field_words import field_text
from ppcoat.studio.form import (
    FormField,
    Values,
    entries_of,
    form_fields,
    numbered,
    with_entry,
    without_entry,
)
from ppcoat.studio.frame import MODEL_FILES, PICTURE_FILES, Studio, add_browse
from ppcoat.studio.words import Words

_GRID = (
    "width: 100%; display: grid; gap: 10px 18px; "
    "grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr))"
)


# Quasar keeps one line for what stands below a field, over which a longer description would run.
_STYLE = """
.studio-form .q-field--with-bottom { padding-bottom: 0; }
.studio-form .q-field__bottom { position: static; transform: none; padding: 4px 2px 0; line-height: 1.35;
  min-height: 0; color: #64748b; }
.studio-form .q-field--error .q-field__bottom { color: #b91c1c; overflow-wrap: anywhere; }
"""


class FormView:
    """values: what is set. changed: is called after each change by the user. whole: show all settings."""

    def __init__(self, studio: Studio, say: Words, changed: Callable[[], None]) -> None:
        self.values: Values = {}
        self.whole, self.sought = False, ""
        self._studio, self._say, self._changed = studio, say, changed
        self._widgets: dict[str, Any] = {}
        self._errors: dict[str, ui.label] = {}
        ui.add_css(_STYLE)
        self._place = ui.column().classes("w-full gap-3 studio-form")

    def show(self, values: Values | None = None) -> None:
        """Draw the form anew, with other values."""
        if values is not None:
            self.values = dict(values)
        self._widgets, self._errors = {}, {}
        self._place.clear()
        groups: dict[str, list[FormField]] = {}
        for field in form_fields():
            if self._is_shown(field):
                groups.setdefault(
                    field.group if field.kind != "entries" or "." in field.key else field.key, []
                ).append(field)
        with self._place:
            for group, fields in groups.items():
                with ui.column().classes("studio-card gap-3"):
                    ui.label(self._say(f"section_{group}")).classes("text-weight-bold")
                    self._fields(fields, [])
            if not groups:
                ui.label(self._say("no_such_setting")).classes("text-grey-7")

    def mark(self, errors: Mapping[str, str]) -> list[str]:
        """Show each error at its field -> the lines of those whose field is not there."""
        left = dict(errors)
        for key, widget in self._widgets.items():
            error = left.pop(key, None)
            if hasattr(widget, "error"):
                widget.error = error
            else:
                self._errors[key].set_text(error or "")
        return [f"{key}: {error}" if key else error for key, error in left.items()]

    def _is_shown(self, field: FormField) -> bool:
        if self.sought:
            texts = (field.key, field_text(field, self._say.language))
            inner = any(map(self._is_shown, field.entry))
            return inner or any(self.sought.lower() in text.lower() for text in texts)
        return self.whole or field.is_basic

    def _fields(self, fields: Sequence[FormField], numbers: list[int]) -> None:
        single = [field for field in fields if field.kind != "entries"]
        if single:
            with ui.element("div").style(_GRID):
                for field in single:
                    self._field(field, numbered(field.key, numbers))
        for field in fields:
            if field.kind == "entries":
                self._entries(field)

    def _entries(self, field: FormField) -> None:
        """A list of sections: one card each, and a button for another."""
        count = entries_of(self.values, field.key) or (1 if field.required else 0)
        for number in range(count):
            with (
                ui.column()
                .classes("w-full gap-2")
                .style("border: 1px solid #e2e8f0; border-radius: 8px; padding: 10px 12px")
            ):
                with ui.row().classes("w-full items-center"):
                    ui.label(f"{field.name} {number + 1}").classes("text-caption text-grey-7")
                    ui.space()
                    if count > 1 or not field.required:
                        ui.button(
                            icon="close",
                            on_click=lambda number=number: self._change(
                                without_entry(self.values, field.key, number)
                            ),
                        ).props(f'flat round dense size=sm aria-label="{self._say("take_out")}"')
                self._fields([each for each in field.entry if self._is_shown(each)], [number])
        with ui.row().classes("items-center gap-2"):
            ui.button(
                self._say("add_entry", name=field.name),
                icon="add",
                on_click=lambda: self._change(with_entry(self.values, field)),
            ).props("flat dense no-caps")
            if not count:
                ui.label(field_text(field, self._say.language)).classes("text-caption text-grey-7")

    def _change(self, values: Values) -> None:
        self.show(values)
        self._changed()

    def _field(self, field: FormField, key: str) -> None:
        """One setting."""
        value = self.values.get(key)
        shown = field.text_of(
            field.default if value is None and field.kind in ("switch", "choice", "choices") else value
        )
        text = field_text(field, self._say.language)
        hint = f"{text} ({field.limits})" if field.limits else text

        def keep(event: Any) -> None:
            value = field.value_of(event.value)
            if value is None or value == field.default:
                self.values.pop(key, None)
            else:
                self.values[key] = value
            if ".0" in field.key and not any(
                each.startswith(key.rpartition(".")[0] + ".") for each in self.values
            ):
                self.values[key] = None  # its entry stays
            self._changed()

        if field.kind == "switch":
            with ui.column().classes("gap-0"):
                widget = ui.switch(field.name, value=bool(shown), on_change=keep).props("dense")
                ui.label(hint).classes("q-field__bottom")
                self._errors[key] = ui.label().classes("q-field__bottom studio-error")
        elif field.kind in ("choice", "choices"):
            several = {"multiple": True} if field.kind == "choices" else {}
            widget = ui.select(dict(field.choices), label=field.name, value=shown, on_change=keep, **several)
        elif field.kind == "lines":
            widget = ui.textarea(field.name, value=shown, on_change=keep).props("autogrow")
        else:
            widget = ui.input(field.name, value=shown, on_change=keep)
            if field.kind == "number":
                widget.props("inputmode=decimal")
        self._widgets[key] = widget
        widget.props["data-key"] = key
        if field.kind == "switch":
            return
        widget.classes("w-full").props("outlined dense stack-label")
        widget.props["hint"] = hint
        if field.kind not in ("choice", "choices"):
            widget.props["placeholder"] = field.text_of(field.default).replace("\n", ", ")
        if field.required:
            widget.props["label"] = f"{field.name} *"
        if field.is_path:
            self._with_browse(field, widget)

    def _with_browse(self, field: FormField, widget: Any) -> None:
        endings = MODEL_FILES if field.group in ("model", "network") else PICTURE_FILES

        between = "\n" if field.kind == "lines" else ""
        add_browse(widget, self._studio, self._say, endings, between=between)
