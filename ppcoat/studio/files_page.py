"""The page Files: a LoRA file inspected, converted, made smaller, or merged into a model.

Each tool is a command of ppcoat, which runs as a child process; the page only puts its arguments together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from nicegui import run, ui

from ppcoat.config.training_sections import LoRAFormat, SaveConfig
from ppcoat.errors import ConfigError, printable
from ppcoat.studio.frame import (
    MODEL_FILES,
    CommandBox,
    CommandRun,
    PathField,
    Studio,
    notify_error,
    page_frame,
    upload_place,
)
from ppcoat.studio.words import Words

LORA_ENDINGS = (".safetensors",)
_DTYPES = get_args(SaveConfig.model_fields["dtype"].annotation)
_TOOLS = ("inspect", "convert", "resize", "merge")


def files_page(studio: Studio) -> None:
    """Register the page."""

    @ui.page("/files")
    def page(tool: str = "inspect") -> None:
        with page_frame(studio, "files") as say:
            with ui.tabs().classes("w-full").props("dense no-caps align=left inline-label") as tabs:
                for name in _TOOLS:
                    ui.tab(name, label=say(name))
            panels = ui.tab_panels(tabs, value=tool if tool in _TOOLS else "inspect", animated=False)
            with panels.classes("w-full bg-transparent"):
                for name, make in zip(_TOOLS, (_Inspect, _Convert, _Resize, _Merge), strict=True):
                    with ui.tab_panel(name).style("padding: 0"):
                        make(studio, say, name).build()


class _Tool:
    """A form for one command. `arguments` are those of its fields."""

    def __init__(self, studio: Studio, say: Words, name: str) -> None:
        self.studio, self.say, self.name = studio, say, name

    def build(self) -> None:
        """Fill the panel: what it does, fields, the command, and where it runs."""
        with ui.column().classes("w-full gap-4"):
            with ui.column().classes("studio-card gap-3"):
                ui.label(self.say(f"about_{self.name}")).classes("text-grey-8")
                self.fields()
                with ui.row().classes("items-center gap-3 w-full"):
                    self._start = ui.button(self.say("run"), on_click=self._run).props("unelevated no-caps")
                    self._error = ui.label().classes("studio-error col")
            self._command = CommandBox(self.studio, self.say)
            self._runs = CommandRun(self.studio, self.say)
        self.refresh()

    def fields(self) -> None:
        """Add the fields of the form."""
        raise NotImplementedError

    def arguments(self) -> list[str]:
        """Of the command, from the fields. Raises ConfigError for what is missing or outside of the roots."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Show the command, or what is wrong with a field that is filled."""
        try:
            arguments, wrong = self.arguments(), ""
        except ConfigError as error:
            arguments, wrong = [], printable(str(error))
        self._command.show(arguments)
        self._error.set_text(wrong)
        self._start.set_enabled(bool(arguments))

    async def _run(self) -> None:
        self._start.disable()
        try:
            await self._runs.run(self.arguments())
        except ConfigError as error:
            notify_error(error)
        self._start.enable()

    def lora_field(self) -> PathField:
        """A field for a LoRA, and a place to send one to."""
        field = PathField(self.studio, self.say("lora"), self.say, LORA_ENDINGS, changed=self._chosen)
        field.input.classes("w-full").mark(f"{self.name}-lora")
        _upload(self.studio, self.say, field.input.set_value)
        return field

    def _chosen(self) -> None:
        self.refresh()

    def path(self, text: str) -> str:
        """A path for the command, inside the roots."""
        return self.studio.roots.argument(text)


class _Inspect(_Tool):
    def fields(self) -> None:
        self.lora = self.lora_field()

    def arguments(self) -> list[str]:
        return ["inspect", self.path(self.lora.text)] if self.lora.text else []


class _Written(_Tool):
    """A tool that writes a file, whose name follows the LoRA's until somebody changes it."""

    def output_field(self) -> None:
        self._proposed = ""
        self.output = ui.input(self.say("output"), on_change=self.refresh).classes("w-full")
        self.output.props("dense outlined debounce=200").mark(f"{self.name}-output")

    def propose(self, suffix: str) -> None:
        """Name the output after the LoRA."""
        if (self.output.value or "") != self._proposed or not self.lora.text:
            return
        try:
            path = self.studio.roots.inside(self.lora.text)
        except ConfigError:
            return
        goal = path.with_name(f"{path.name.removesuffix('.safetensors')}_{suffix}.safetensors")
        self._proposed = self.studio.roots.shown(goal)
        self.output.set_value(self._proposed)

    def in_and_out(self) -> list[str]:
        return [self.path(self.lora.text), self.path(self.output.value or "")]


class _Convert(_Written):
    def fields(self) -> None:
        self.lora = self.lora_field()
        with ui.row().classes("w-full gap-3"):
            formats = list(get_args(LoRAFormat))
            self.format = ui.select(formats, value="kohya", label=self.say("format"), on_change=self._chosen)
            dtypes = {"": self.say("as_in_file"), **{name: name for name in _DTYPES}}
            self.dtype = ui.select(dtypes, value="", label=self.say("dtype"), on_change=self.refresh)
            for field in (self.format, self.dtype):
                field.props("dense outlined").style("min-width: 180px")
        self.output_field()

    def arguments(self) -> list[str]:
        if not self.lora.text:
            return []
        dtype = [f"--dtype={self.dtype.value}"] if self.dtype.value else []
        return ["convert", *self.in_and_out(), f"--format={self.format.value}", *dtype]

    def _chosen(self) -> None:
        self.propose(self.format.value)
        self.refresh()


class _Resize(_Written):
    def fields(self) -> None:
        self.lora = self.lora_field()
        with ui.row().classes("w-full gap-3"):
            self.rank = ui.number(self.say("rank"), value=16, min=1, precision=0, on_change=self._chosen)
            self.energy = ui.number(self.say("energy"), min=0, max=1, step=0.01, on_change=self.refresh)
            for field in (self.rank, self.energy):
                field.props("dense outlined").style("min-width: 220px")
        self.output_field()

    def arguments(self) -> list[str]:
        if not self.lora.text:
            return []
        rank = [f"--rank={int(self.rank.value)}"] if self.rank.value else []
        energy = [f"--energy={self.energy.value:g}"] if self.energy.value else []
        return ["lora", "resize", *self.in_and_out(), *rank, *energy]

    def _chosen(self) -> None:
        self.propose(f"rank{int(self.rank.value)}" if self.rank.value else "small")
        self.refresh()


class _Merge(_Tool):
    def fields(self) -> None:
        say = self.say
        self.model = PathField(self.studio, say("model"), say, MODEL_FILES, changed=self.refresh)
        self.model.input.classes("w-full").mark("merge-model")
        self.rows: dict[ui.row, tuple[PathField, ui.number]] = {}
        self._list = ui.column().classes("w-full gap-3")
        self._add()
        _upload(self.studio, say, lambda path: self._add(path))
        ui.button(say("add_lora"), icon="add", on_click=lambda: self._add()).props("flat dense no-caps")
        self.output = ui.input(say("output"), value="merged", on_change=self.refresh).classes("w-full")
        self.output.props("dense outlined debounce=200").mark("merge-output")

    def arguments(self) -> list[str]:
        given = [(field, strength) for field, strength in self.rows.values() if field.text]
        if not given or not self.model.text:
            return []
        strengths = [1.0 if each.value is None else each.value for _, each in given]
        scale = [] if set(strengths) == {1.0} else ["--scale", *(f"{each:g}" for each in strengths)]
        return [
            "merge",
            f"--model={self.studio.roots.model_argument(self.model.text)}",
            *("--lora", *(self.path(field.text) for field, _ in given)),
            *scale,
            f"--output_dir={self.path(self.output.value or '')}",
        ]

    def _add(self, path: str = "") -> None:
        empty = next((field for field, _ in self.rows.values() if not field.text), None)
        if path and empty is not None:
            empty.input.set_value(path)
            return
        with self._list, ui.row().classes("w-full items-center no-wrap gap-2") as row:
            changed = self.refresh if self.rows else self._chosen
            field = PathField(self.studio, self.say("lora"), self.say, LORA_ENDINGS, changed=changed)
            field.input.mark(f"merge-lora-{len(self.rows)}").style("min-width: 0")
            strength = ui.number(self.say("strength"), value=1.0, step=0.1, on_change=self.refresh)
            strength.props("dense outlined").style("width: 96px")
            if self.rows:
                remove = ui.button(icon="close", on_click=lambda: self._remove(row)).props("flat round dense")
                remove.props["aria-label"] = self.say("remove")
        self.rows[row] = field, strength
        field.input.set_value(path)

    def _remove(self, row: ui.row) -> None:
        del self.rows[row]
        row.delete()
        self.refresh()


def _upload(studio: Studio, say: Words, stored: Callable[[str], object]) -> None:
    """A place to send a LoRA file to; `stored` gets its path as it stands in a field."""

    async def keep(file: Any) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                content = Path(folder, "upload")
                await file.save(content)
                path = await run.io_bound(studio.roots.store, file.name, content, "lora")
        except (ConfigError, OSError) as error:
            notify_error(error)
        else:
            stored(studio.roots.shown(path))
            ui.notify(say("uploaded", path=printable(studio.roots.shown(path))), type="positive")

    refused = say("too_large", most=studio.most_bytes >> 20)
    upload_place(say("lora_or_upload"), LORA_ENDINGS, studio.most_bytes, refused, keep)
