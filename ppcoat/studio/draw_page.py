"""The page Draw: pictures of a prompt with a model and LoRAs, beside those without, over the checkpoints of a
run, or in a grid. It writes a list, and one `generate` draws all of it, as the command says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nicegui import run, ui

from ppcoat.config.flags import TINY_FLUX
from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError, printable
from ppcoat.studio.draw_list import (
    Asked,
    asked_of_picture,
    numbers_of,
    one_number,
    read_drawing,
    write_drawing,
)
from ppcoat.studio.frame import (
    MODEL_FILES,
    PICTURE_FILES,
    CommandBox,
    Studio,
    add_browse,
    notify_error,
    page_frame,
    upload_place,
)
from ppcoat.studio.pictures import LARGE, SMALL, picture_url
from ppcoat.studio.run_log import find_runs, lora_files
from ppcoat.studio.runs import ChildRun, Queue
from ppcoat.studio.words import Words

DRAWINGS = "output/drawings"  # below the first root
_LORA_FILES = (".safetensors",)
_MOST_UPLOAD = 64 << 20
_EARLIER = 24
_NUMBERS = (("seed", int), ("steps", int), ("width", int), ("height", int), ("guidance_scale", float),
            ("vram", float))  # fmt: skip
_FROM_PICTURES = ("image", "mask", "reference")
_COMPARE = ("one", "off", "checkpoints", "grid", "steps")


def draw_page(studio: Studio, queue: Queue) -> None:
    """Register the page. queue: starts the drawings, beside what is trained."""

    @ui.page("/draw")
    def page(run: str = "") -> None:
        with page_frame(studio, "draw") as say:
            DrawPage(studio, queue, say, run)


class DrawPage:
    """One page of one user. run: a run's folder to draw with, "" for none."""

    def __init__(self, studio: Studio, queue: Queue, say: Words, run: str) -> None:
        self._studio, self._queue, self._say = studio, queue, say
        self._loras: list[list[Any]] = []  # [path, strength], as typed
        self._widgets: dict[str, Any] = {}
        self._job: ChildRun | None = None
        self._there: tuple[int, bool] | None = None
        self._cells: list[tuple[Path, Any]] = []
        with ui.row().classes("w-full items-start gap-4"):
            with ui.column().classes("col-12 col-md-auto gap-3").style("width: min(100%, 400px)"):
                self._form_card()
                self._compare_card()
                self._button = ui.button(say("draw_it"), icon="brush", on_click=self._draw)
                self._button.classes("w-full").props("no-caps unelevated")
                self._drop_card()
            with ui.column().classes("col-12 col-md gap-3").style("min-width: 0"):
                self._box = CommandBox(studio, say)
                self._result = ui.column().classes("studio-card gap-2")
                with ui.column().classes("studio-card gap-2"):
                    ui.label(say("earlier")).classes("text-weight-bold")
                    self._earlier = ui.row().classes("w-full gap-2")
        self._result.set_visibility(False)
        self._fill(self._begin_with(run) if run else Asked(), run)
        self._show_earlier()
        ui.timer(1.0, self._look)
        ui.timer(0.1, self._find_runs, once=True)

    def _form_card(self) -> None:
        say, widgets = self._say, self._widgets
        with ui.column().classes("studio-card gap-3"):
            widgets["model"] = self._path_input("model", MODEL_FILES, folders=True)
            widgets["prompt"] = ui.textarea(say("prompt")).classes("w-full").props("outlined dense autogrow")
            with ui.element("div").style(
                "display: grid; width: 100%; gap: 8px; grid-template-columns: repeat(3, minmax(0, 1fr))"
            ):
                for name, _ in _NUMBERS:
                    widgets[name] = ui.input(say(f"draw_{name}")).props(
                        "outlined dense inputmode=decimal stack-label"
                    )
                    widgets[name].props["placeholder"] = say("auto") if name not in ("seed", "steps") else ""
            ui.label(say("loras")).classes("text-weight-medium")
            self._lora_rows = ui.column().classes("w-full gap-2")
            ui.button(say("one_more_lora"), icon="add", on_click=lambda: self._add_lora()).props(
                "flat dense no-caps"
            )
            with ui.expansion(say("from_pictures")).classes("w-full").props("dense header-class=q-px-none"):
                ui.label(say("from_pictures_hint")).classes("text-caption text-grey-7")
                for name in _FROM_PICTURES:
                    between = ", " if name == "reference" else ""
                    widgets[name] = self._path_input(name, PICTURE_FILES, between=between)
                widgets["strength"] = (
                    ui.input(say("draw_strength")).classes("w-full").props("outlined dense inputmode=decimal")
                )

    def _compare_card(self) -> None:
        say, widgets = self._say, self._widgets
        with ui.column().classes("studio-card gap-3"):
            widgets["compare"] = ui.select(
                {name: say(f"compare_{name}") for name in _COMPARE}, label=say("compare"), value="one",
            ).classes("w-full").props("outlined dense")  # fmt: skip
            widgets["run"] = ui.select({"": say("no_run")}, label=say("run_of"), value="").classes("w-full")
            widgets["strengths"] = ui.input(say("strengths"), value="0, 0.5, 1").classes("w-full")
            widgets["step_counts"] = ui.input(say("step_counts"), value="8, 16, 28").classes("w-full")
            shown_for = {
                "run": ("checkpoints", "grid"),
                "strengths": ("grid", "steps"),
                "step_counts": ("steps",),
            }
            for name, modes in shown_for.items():
                widgets[name].props("outlined dense")
                widgets[name].bind_visibility_from(
                    widgets["compare"], "value", backward=lambda mode, modes=modes: mode in modes
                )

    def _drop_card(self) -> None:
        refused = self._say("picture_too_large")
        upload_place(self._say("drop"), (".png",), _MOST_UPLOAD, refused, self._dropped)

    def _path_input(self, name: str, endings: Sequence[str], folders: bool = False, between: str = "") -> Any:
        field = ui.input(self._say(f"draw_{name}")).classes("w-full").props("outlined dense")
        add_browse(field, self._studio, self._say, endings, folders, between)
        return field

    def _add_lora(self, path: str = "", strength: float = 1.0) -> None:
        row = [path, f"{strength:g}"]
        self._loras.append(row)
        with self._lora_rows, ui.row().classes("w-full items-center no-wrap gap-1") as place:
            field = ui.input(self._say("lora_file"), value=path).classes("col").props("outlined dense")
            field.on_value_change(lambda event: row.__setitem__(0, event.value))
            add_browse(field, self._studio, self._say, _LORA_FILES)
            by = ui.input(self._say("draw_strength_of"), value=row[1]).style("width: 84px")
            by.props("outlined dense inputmode=decimal").on_value_change(
                lambda event: row.__setitem__(1, event.value)
            )

            def remove() -> None:
                self._loras[:] = [each for each in self._loras if each is not row]
                place.delete()

            ui.button(icon="close", on_click=remove).props(
                f'flat round dense size=sm aria-label="{self._say("take_out")}"'
            )

    def _fill(self, asked: Asked, run: str = "") -> None:
        """Put what was asked for into the widgets."""
        for name in ("model", "prompt", "image", "mask", "compare"):
            self._widgets[name].set_value(getattr(asked, name) or "")
        for name in [name for name, _ in _NUMBERS] + ["strength"]:
            value = getattr(asked, name)
            self._widgets[name].set_value(
                "" if value is None else f"{value:g}" if name != "seed" else str(value)
            )
        self._widgets["reference"].set_value(", ".join(asked.reference))
        for name in ("strengths", "step_counts"):
            self._widgets[name].set_value(", ".join(f"{each:g}" for each in getattr(asked, name)))
        self._loras.clear()
        self._lora_rows.clear()
        for path, strength in asked.loras:
            self._add_lora(path, strength)
        if run:
            self._widgets["run"].set_options({run: run}, value=run)

    def _begin_with(self, run: str) -> Asked:
        """What a run is drawn with: its model, prompts and size, and the LoRA at its end."""
        try:
            folder = self._studio.roots.inside(run)
            config = load_config(self._studio.roots.inside(folder / "config.yaml"))
        except ConfigError as error:
            notify_error(error)
            return Asked()
        files, previews = lora_files(folder), config.sample.previews
        loras = [(self._studio.roots.shown(file), 1.0) for file in list(files.values())[-1:]]
        model = "tiny_flux" if config.model.name_or_path == TINY_FLUX else config.model.name_or_path
        asked = Asked(model=model, loras=tuple(loras))
        if previews:
            first = previews[0]
            prompt = first.prompt.replace("[trigger]", config.trigger_word or "").strip()
            asked = replace(asked, prompt=prompt, width=first.width, height=first.height,
                            steps=first.sample_steps, guidance_scale=first.guidance_scale)  # fmt: skip
        return asked

    async def _find_runs(self) -> None:
        found = await run.io_bound(find_runs, self._studio.roots)
        select = self._widgets["run"]
        if select.is_deleted:
            return
        names = [self._studio.roots.shown(folder) for folder in found if lora_files(folder)]
        chosen = select.value or (names[0] if names else "")
        options = {"": self._say("no_run")} | {name: printable(name) for name in [*names, chosen] if name}
        select.set_options(options, value=chosen)

    def _asked(self) -> Asked:
        """What the widgets say, every path inside the roots. Raises ConfigError."""
        text = {name: str(widget.value or "").strip() for name, widget in self._widgets.items()}
        found: dict[str, Any] = {"prompt": text["prompt"], "compare": text["compare"]}
        found["model"] = self._studio.roots.model_argument(text["model"])
        for name, kind in [*_NUMBERS, ("strength", float)]:
            if text[name]:
                found[name] = one_number(text[name], whole=kind is int)
        for name in ("image", "mask"):
            found[name] = self._inside(text[name]) if text[name] else None
        references = [each.strip() for each in text["reference"].split(",") if each.strip()]
        found["reference"] = tuple(map(self._inside, references))
        loras = [(str(path).strip(), by) for path, by in self._loras if str(path).strip()]
        found["loras"] = tuple((self._inside(path), one_number(by)) for path, by in loras)
        if found["compare"] in ("grid", "steps"):
            found["strengths"] = numbers_of(text["strengths"])
        if found["compare"] == "steps":
            found["step_counts"] = numbers_of(text["step_counts"], whole=True)
        if found["compare"] in ("checkpoints", "grid") and text["run"]:
            files = lora_files(self._studio.roots.inside(text["run"]))
            shown = tuple((step, self._studio.roots.shown(file)) for step, file in files.items())
            found["checkpoints"] = shown
            of_run = {path for _, path in shown}  # one of them is drawn with once, where it is its turn
            found["loras"] = tuple(pair for pair in found["loras"] if pair[0] not in of_run)
        return Asked(**found)

    def _inside(self, text: str) -> str:
        if not self._studio.roots.inside(text).exists():
            raise ConfigError(f"{printable(text)}: {self._say('not_there')}")
        return self._studio.roots.argument(text)

    def _draw(self) -> None:
        roots = self._studio.roots
        try:
            asked = self._asked()
            folder = roots.inside(f"{DRAWINGS}/{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() % 1000:03d}")
            job = ChildRun(folder)
            job.prepare(write_drawing(asked, folder, roots.shown(folder)), roots.folders[0])
            self._queue.start_beside(job)
        except (ConfigError, OSError) as error:
            return notify_error(error)
        self._show(folder)

    def _show(self, folder: Path) -> None:
        """Show a drawing, as far as it is."""
        found = read_drawing(folder)
        if found is None:
            return
        _, rows, columns, names = found
        self._job, self._there = ChildRun(folder), None
        note = self._job.note
        self._box.show(note.argv if note is not None else [])
        self._result.set_visibility(True)
        self._result.clear()
        self._cells = []
        with self._result:
            with ui.row().classes("w-full items-center gap-2"):
                self._spinner = ui.spinner(size="sm")
                self._state = ui.label()
                ui.space()
                self._stop = ui.button(self._say("stop"), on_click=self._job.stop).props("flat dense no-caps")
                ui.button(self._say("take_settings"), on_click=lambda: self._take(folder)).props(
                    "flat dense no-caps"
                )
            self._wrong = ui.label().classes("studio-error").style("white-space: pre-line")
            side = 512 if len(names[0]) == 1 else 320 if len(names[0]) == 2 else 180
            with ui.element("div").style("overflow-x: auto; width: 100%"):
                heads = "max-content " if any(rows) else ""
                with ui.element("div").style(
                    f"display: grid; gap: 6px; align-items: center; "
                    f"grid-template-columns: {heads}repeat({len(columns)}, minmax(90px, {side}px))"
                ):
                    if heads:
                        ui.element("div")
                    for name in columns if any(columns) else ():
                        ui.label(name).classes("text-caption text-grey-8 text-center")
                    for row, of_row in zip(rows, names, strict=True):
                        if heads:
                            ui.label(row).classes("text-caption text-grey-8")
                        for name in of_row:
                            self._cells.append(self._cell(folder / f"{name}.png"))

    def _cell(self, file: Path) -> tuple[Path, Any]:
        with ui.element("div").style(
            "aspect-ratio: 1; background: #f1f5f9; border-radius: 6px; overflow: hidden"
        ) as place:
            pass
        return file, place

    def _take(self, folder: Path) -> None:
        found = read_drawing(folder)
        if found is not None:
            self._fill(found[0])

    def _look(self) -> None:
        """Show the pictures that have come, and whether it is done."""
        if self._job is None:
            return
        files = [file for file, _ in self._cells]
        there = sum(file.exists() for file in files)
        running = self._job.status in ("running", "stopping")
        if (there, running) == self._there:
            return
        self._there = (there, running)
        for number, (file, place) in enumerate(self._cells):
            if place is not None and file.exists():
                place.clear()
                with place:
                    ui.image(picture_url(file, LARGE)).classes("cursor-pointer").on(
                        "click", lambda file=file: self._enlarge(file)
                    )
                place.style("aspect-ratio: auto; background: none")
                self._cells[number] = (file, None)
        self._spinner.set_visibility(running)
        self._stop.set_visibility(running)
        whole = there == len(files)
        key = "drawn_all" if whole else "drawing" if running else "drawn_part"
        self._state.set_text(self._say(key, there=there, all=len(files)))
        failed = not running and not whole
        self._wrong.set_text("\n".join(self._job.tail(6)) if failed else "")
        if not running:
            self._show_earlier()

    async def _enlarge(self, file: Path) -> None:
        """One picture, what it was drawn with, and its file."""
        try:
            content = await run.io_bound(self._studio.roots.inside(file).read_bytes)
            asked = asked_of_picture(content)
        except (OSError, ConfigError) as error:
            return notify_error(error)
        loras = ", ".join(f"{path} × {by:g}" for path, by in asked.loras)
        lines = [asked.prompt, f"seed {asked.seed} · {asked.steps} steps · {asked.width}x{asked.height}"]
        with (
            ui.dialog() as dialog,
            ui.card().classes("gap-2").style("width: min(92vw, 760px); max-width: 92vw"),
        ):
            ui.image(picture_url(file, LARGE)).style("width: 100%; max-height: 70vh").props("fit=contain")
            ui.label(printable("\n".join([*lines, loras])).replace("\\n", "\n")).classes(
                "text-caption"
            ).style("white-space: pre-line; overflow-wrap: anywhere")
            with ui.row().classes("w-full justify-end gap-2"):
                ui.button(
                    self._say("download"), on_click=lambda: ui.download.content(content, file.name)
                ).props("flat no-caps")
                ui.button(self._say("take_settings"), on_click=lambda: dialog.submit(True)).props(
                    "flat no-caps"
                )
                ui.button(self._say("close"), on_click=lambda: dialog.submit(False)).props(
                    "no-caps unelevated"
                )
        if await dialog:
            self._fill(asked)
        dialog.delete()

    async def _dropped(self, file: Any) -> None:
        """Take the settings of a picture that was dropped."""
        try:
            asked = asked_of_picture(await file.read())
        except ConfigError as error:
            return notify_error(error)
        self._fill(asked)
        ui.notify(self._say("taken"), type="positive")

    def _show_earlier(self) -> None:
        folder = self._studio.roots.folders[0] / DRAWINGS
        found = sorted(folder.glob("*/drawing.json"), reverse=True)[:_EARLIER] if folder.is_dir() else []
        self._earlier.clear()
        with self._earlier:
            if not found:
                ui.label(self._say("no_drawings")).classes("text-grey-7")
            for file in found:
                picture = next(iter(sorted(file.parent.glob("r*_c*.png"))), None)
                if picture is not None:
                    ui.image(picture_url(picture, SMALL)).style(
                        "width: 76px; border-radius: 6px; cursor: pointer"
                    ).on("click", lambda folder=file.parent: self._show(folder))
