"""The runs on the page: which there are, and of the chosen one how far it is, its curve, its previews and
what it prints, all read from its folder every second. Buttons stop it, go on with it, or take it from the
queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from nicegui import run, ui
from PIL import Image

from ppcoat.config.load import load_config, read_config_text
from ppcoat.errors import ConfigError, printable
from ppcoat.plan import GB
from ppcoat.studio.form import Values, text_values, training_argv
from ppcoat.studio.frame import CommandBox, Studio, notify_error
from ppcoat.studio.pictures import LARGE, SMALL, picture_url
from ppcoat.studio.plan_view import duration
from ppcoat.studio.run_log import (
    CONFIG,
    RunLog,
    RunProgress,
    find_runs,
    previews_of,
    progress_of,
    smoothed,
    thinned,
)
from ppcoat.studio.runs import ChildRun, Queue, device_memory
from ppcoat.studio.words import Words

_COLOURS = {"running": "primary", "stopping": "orange", "waiting": "grey", "finished": "positive",
            "stopped": "blue-grey", "failed": "negative"}  # fmt: skip
_SCAN_EVERY, _LOG_LINES = 5, 200


class RunsView:
    """logs: of all runs that a page showed, read once for all pages. reuse: takes the settings of a run.
    is_shown: whether anybody sees this."""

    def __init__(
        self,
        studio: Studio,
        queue: Queue,
        logs: dict[Path, RunLog],
        say: Words,
        reuse: Callable[[Values], None],
        is_shown: Callable[[], bool],
    ) -> None:
        self._studio, self._queue, self._logs, self._say, self._reuse = studio, queue, logs, say, reuse
        self._is_shown = is_shown
        self._folders: list[Path] = []
        self._ticks, self._shown = 0, ()
        self.chosen: Path | None = None
        self._detail: RunDetail | None = None
        with ui.column().classes("studio-card gap-1"):
            ui.label(say("runs")).classes("text-weight-bold")
            self._list = ui.column().classes("w-full gap-0")
        self._place = ui.column().classes("w-full gap-4")
        self._timer = ui.timer(1.0, self.refresh)

    def choose(self, folder: Path) -> None:
        """Show one run."""
        self.chosen, self._shown = folder, ()
        self._place.clear()
        with self._place:
            self._detail = RunDetail(self, folder)
        if folder not in self._folders:
            self._folders.insert(0, folder)
        self._draw_list()

    async def refresh(self) -> None:
        """Look at the disk, and show what is new."""
        if not self._is_shown():
            return
        if self._ticks % _SCAN_EVERY == 0:
            found = await run.io_bound(find_runs, self._studio.roots)
            if self._list.is_deleted:
                return
            self._folders = found
        self._ticks += 1
        if self.chosen is None and self._folders:
            active = self._queue.current
            self.choose(active.folder if active is not None else self._folders[0])
        self._draw_list()
        if self._detail is not None:
            await self._detail.refresh()

    def progress(self, folder: Path) -> tuple[RunProgress, RunLog]:
        """How far a run is."""
        log = self._logs.setdefault(folder, RunLog(folder))
        log.read()
        found = progress_of(ChildRun(folder), log, folder in self._queue.waiting)
        refused = self._queue.refused.get(str(folder))
        return (RunProgress("failed", found.step, found.total, refused) if refused else found), log

    def act(self, action: Callable[[], None]) -> None:
        """Do what a button asks; a mistake becomes a note."""
        try:
            action()
        except (ConfigError, OSError) as error:
            notify_error(error)
        self._shown = ()

    def _draw_list(self) -> None:
        rows = []
        for folder in self._folders[:100]:
            found, _ = self.progress(folder)
            rows.append((folder, found.status, found.step, found.total))
        now = (self.chosen, tuple(rows))
        if now == self._shown:
            return
        self._shown = now
        self._list.clear()
        with self._list:
            if not rows:
                ui.label(self._say("no_runs")).classes("text-grey-7 q-py-sm")
            for folder, status, step, total in rows:
                with (
                    ui.row()
                    .classes(
                        "w-full items-center no-wrap gap-3 q-px-sm q-py-xs cursor-pointer rounded-borders"
                    )
                    .classes("bg-teal-1" if folder == self.chosen else "hover:bg-slate-100")
                    .on("click", lambda folder=folder: self.choose(folder))
                ):
                    ui.label(printable(self._studio.roots.shown(folder))).classes("col ellipsis").style(
                        "min-width: 0"
                    )
                    ui.label(f"{step}/{total}" if total else f"{step}").classes("text-caption text-grey-7")
                    ui.badge(self._say(f"status_{status}"), color=_COLOURS[status])


class RunDetail:
    """One run."""

    def __init__(self, runs: RunsView, folder: Path) -> None:
        say = runs._say
        self._runs, self._say, self._job = runs, say, ChildRun(folder)
        self._status, self._pictures, self._printed, self._points = "", {}, [], -1
        with ui.column().classes("studio-card gap-2"):
            with ui.row().classes("w-full items-center gap-2"):
                ui.label(printable(folder.name)).classes("text-weight-bold").style("overflow-wrap: anywhere")
                self._badge = ui.badge()
                ui.space()
                self._buttons = ui.row().classes("gap-2")
            self._bar = ui.linear_progress(0, show_value=False, size="8px").props("rounded instant-feedback")
            self._numbers = ui.row().classes("w-full gap-x-6 gap-y-1")
            self._error = ui.label().classes("studio-error")
        self._box = CommandBox(runs._studio, say)
        with ui.column().classes("studio-card gap-1"):
            with ui.row().classes("w-full items-center no-wrap gap-3"):
                ui.label(say("curve")).classes("text-weight-bold")
                ui.space()
                ui.label(say("smoothing")).classes("text-caption")
                self._smoothing = ui.slider(min=0, max=0.99, step=0.01, value=0.9, on_change=self._redraw)
                self._smoothing.style("width: 120px").props(f'aria-label="{say("smoothing")}"')
            self._chart = ui.echart(_curve(say, RunLog(folder), 0.9)).style("height: 280px; width: 100%")
        with ui.column().classes("studio-card gap-2") as self._previews:
            with ui.row().classes("w-full items-center no-wrap gap-3"):
                ui.label(say("previews")).classes("text-weight-bold")
                self._step_label = ui.label().classes("text-caption text-grey-7")
                ui.space()
                self._slider = ui.slider(min=0, max=1, step=1, value=0, on_change=lambda _: self._large())
                self._slider.style("width: 45%").props(f'aria-label="{say("preview_step")}"')
            self._at_step = ui.row().classes("w-full gap-3")
            self._grid = ui.element("div").style("overflow-x: auto; width: 100%")
        self._previews.set_visibility(False)
        with ui.column().classes("studio-card gap-1"):
            ui.label(say("log")).classes("text-weight-bold")
            with ui.scroll_area().style("height: 220px; width: 100%") as self._scroll:
                self._text = ui.label().classes("studio-code")

    async def refresh(self) -> None:
        """Show what has changed since the last call."""
        found, log = self._runs.progress(self._job.folder)
        if found.status != self._status:
            self._status = found.status
            self._badge.set_text(self._say(f"status_{found.status}"))
            self._badge.props(f"color={_COLOURS[found.status]}")
            self._draw_buttons(found)
        self._bar.set_value(found.step / found.total if found.total else 0.0)
        self._error.set_text(printable(found.error))
        self._error.set_visibility(bool(found.error))
        await self._draw_numbers(found, log)
        if len(log.steps) != self._points:
            self._points = len(log.steps)
            self._redraw()
        self._draw_previews()
        lines = self._job.tail(_LOG_LINES)
        if lines != self._printed:
            self._printed = lines
            self._text.set_text("\n".join(map(printable, lines)))
            self._scroll.scroll_to(percent=1.0)

    def _draw_buttons(self, found: RunProgress) -> None:
        queue, job, act, say = self._runs._queue, self._job, self._runs.act, self._say
        note = job.note
        self._box.show(note.argv if note is not None else [])
        self._buttons.clear()
        with self._buttons:
            if found.status in ("running", "stopping") and note is not None:
                word = "stop_save" if found.status == "running" else "stop_now"
                ui.button(say(word), icon="stop", on_click=lambda: act(job.stop)).props(
                    "outline dense no-caps"
                )
            elif found.status == "waiting":
                ui.button(say("leave_queue"), on_click=lambda: act(lambda: queue.remove(job))).props(
                    "outline dense no-caps"
                )
            elif found.status in ("stopped", "failed"):
                ui.button(say("resume"), icon="play_arrow", on_click=lambda: act(self._go_on)).props(
                    "dense no-caps"
                )
            if (job.folder / CONFIG).exists():
                ui.button(say("use_settings"), on_click=lambda: act(self._use)).props("flat dense no-caps")
            if found.step:
                shown = self._runs._studio.roots.shown(job.folder)
                ui.button(
                    say("draw_with"), on_click=lambda: ui.navigate.to("/draw?" + urlencode({"run": shown}))
                ).props("flat dense no-caps")

    def _go_on(self) -> None:
        """Put the run in the queue; one that a shell began is trained by its own config.yaml."""
        roots, job = self._runs._studio.roots, self._job
        if job.note is None:
            file = job.folder / "config.yaml"
            job.prepare(training_argv(load_config(file), roots.shown(file)), roots.folders[0])
        self._runs._queue.add(job)

    def _use(self) -> None:
        self._runs._reuse(text_values(read_config_text(self._job.folder / CONFIG, (".yaml",))))

    async def _draw_numbers(self, found: RunProgress, log: RunLog) -> None:
        say, last = self._say, log.last
        numbers = [(say("step"), f"{found.step} / {found.total or '?'}")]
        if log.losses:
            numbers.append((say("loss"), f"{smoothed(log.losses[-500:], self._smoothing.value)[-1]:.4f}"))
        if "lr" in last:
            numbers.append(("lr", f"{last['lr']:.2e}"))
        if found.status in ("running", "stopping"):
            if log.rate:
                numbers.append(("it/s", f"{log.rate:.2f}"))
                left = max(0, found.total - found.step) / log.rate
                numbers.append((say("eta"), duration(left)))
            held, on_card = self._job.memory, await run.io_bound(device_memory, self._job)
            numbers += [(say(word), f"{count / GB:.2f} GB") for word, count in
                        (("memory_host", held), ("memory_card", on_card)) if count]  # fmt: skip
        if last.get("kept_bytes"):
            numbers.append((say("kept"), f"{last['kept_bytes'] / 1e6:.1f} MB"))
        if last.get("skipped_steps"):
            numbers.append((say("skipped"), f"{last['skipped_steps']:g}"))
        if self._numbers.is_deleted:
            return
        self._numbers.clear()
        with self._numbers:
            for name, text in numbers:
                with ui.column().classes("gap-0"):
                    ui.label(name).classes("text-caption text-grey-7")
                    ui.label(text).classes("text-weight-medium")

    def _redraw(self, _: Any = None) -> None:
        log = self._runs._logs.get(self._job.folder)
        if log is not None:
            self._chart.options.clear()
            self._chart.options.update(_curve(self._say, log, self._smoothing.value))

    def _draw_previews(self) -> None:
        found = previews_of(self._job.folder)
        if found == self._pictures:
            return
        at_end = not self._pictures or self._slider.value >= len(self._pictures) - 1
        self._pictures = found
        steps = list(found)
        self._previews.set_visibility(bool(steps))
        self._slider.props(f"max={max(1, len(steps) - 1)}")
        self._slider.set_visibility(len(steps) > 1)
        prompts = sorted({number for row in found.values() for number in row})
        self._grid.clear()
        with (
            self._grid,
            ui.element("div").style(
                f"display: grid; gap: 4px; grid-template-columns: repeat({len(steps)}, 92px)"
            ),
        ):
            for step in steps:
                ui.label(str(step)).classes("text-caption text-grey-7 text-center")
            for number in prompts:
                for place, step in enumerate(steps):
                    file = found[step].get(number)
                    if file is None:
                        ui.element("div")
                        continue
                    ui.image(picture_url(file, SMALL)).style(
                        "width: 92px; border-radius: 4px; cursor: pointer"
                    ).on("click", lambda place=place: self._slider.set_value(place))
        if at_end:
            self._slider.set_value(len(steps) - 1)
        self._large()

    def _large(self) -> None:
        """The previews of the step that the slider is at."""
        steps = list(self._pictures)
        if not steps:
            return
        step = steps[min(int(self._slider.value), len(steps) - 1)]
        self._step_label.set_text(f"{self._say('step')} {step}")
        self._at_step.clear()
        with self._at_step:
            for file in self._pictures[step].values():
                with ui.column().classes("gap-1").style("width: min(46%, 260px)"):
                    ui.image(picture_url(file, LARGE)).style(
                        "width: 100%; border-radius: 6px; image-rendering: auto"
                    )
                    ui.label(printable(_prompt_of(file))).classes("text-caption text-grey-8").style(
                        "overflow-wrap: anywhere"
                    )


def _prompt_of(file: Path) -> str:
    try:
        with Image.open(file) as picture:
            return str(picture.info.get("prompt", ""))[:300]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


def _curve(say: Words, log: RunLog, weight: float) -> dict[str, Any]:
    """echarts' settings: the loss of each step, its running mean, the validation loss and the rate."""
    raw = thinned(list(zip(log.steps, log.losses, strict=True)))
    mean = thinned(list(zip(log.steps, smoothed(log.losses, weight), strict=True)))
    rates = thinned(list(zip(log.steps, log.rates, strict=True)))

    def line(name: str, points: list, colour: str, width: float, **more: Any) -> dict[str, Any]:
        data = [[x, None if y != y else float(f"{y:.6g}")] for x, y in points]
        return {"type": "line", "name": name, "data": data, "showSymbol": False,
                "lineStyle": {"width": width}, "color": colour, **more}  # fmt: skip

    series = [
        line(say("loss"), raw, "#cbd5e1", 1),
        line(say("loss_smoothed"), mean, "#0f766e", 2),
        line("lr", rates, "#f59e0b", 1, yAxisIndex=1),
    ]
    if log.validation:
        series.append(line(say("validation"), log.validation, "#8b5cf6", 2) | {"showSymbol": True})
    return {
        "animation": False,
        "grid": {"left": 8, "right": 8, "top": 34, "bottom": 8, "containLabel": True},
        "legend": {"top": 0, "textStyle": {"fontSize": 11}},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "splitLine": {"show": False}},
        "yAxis": [{"type": "value", "scale": True}, {"type": "value", "scale": True,
                  "splitLine": {"show": False}, "axisLabel": {"show": False}}],
        "series": series,
    }  # fmt: skip
