"""The page Train: a form with its memory plan, and the runs. It writes a config file, and `train` does the
rest, as the command below the form says."""

from __future__ import annotations

import time
from pathlib import Path

from nicegui import app, background_tasks, run, ui

from ppcoat.atomic import write_text
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.studio.form import (
    Values,
    errors_by_field,
    form_config,
    form_text,
    paths_in,
    template_values,
    templates,
    text_values,
    training_argv,
    with_changes,
)
from ppcoat.studio.form_view import FormView
from ppcoat.studio.frame import CommandBox, Studio, notify_error, page_frame
from ppcoat.studio.plan_view import PlanView
from ppcoat.studio.planner import Planner
from ppcoat.studio.run_log import CONFIG, RunLog
from ppcoat.studio.runs import ChildRun, Queue
from ppcoat.studio.runs_view import RunsView
from ppcoat.studio.words import Words

_QUIET_SECONDS = 0.4  # without a key, before the form is looked at
_WRITTEN = ("output_dir", "cache_dir")  # paths that need not be there


def train_page(studio: Studio, queue: Queue) -> None:
    """Register the page. queue: of the runs; it starts them as long as the studio is there."""
    planner, logs = Planner(studio.roots.folders[0]), {}
    app.timer(1.0, queue.tick)
    app.on_shutdown(planner.close)

    @ui.page("/train")
    def page() -> None:
        with page_frame(studio, "train") as say:
            TrainPage(studio, queue, planner, logs, say)
            background_tasks.create(planner.start())


class TrainPage:
    """One page of one user. logs: of the runs, shared by all pages."""

    def __init__(
        self, studio: Studio, queue: Queue, planner: Planner, logs: dict[Path, RunLog], say: Words
    ) -> None:
        self._studio, self._queue, self._say = studio, queue, say
        self._changed_at: float | None = 0.0
        self._config: RunConfig | None = None
        with ui.tabs().props("dense no-caps align=left") as self._tabs:
            ui.tab("form", label=say("new_run"))
            ui.tab("runs", label=say("runs"))
        busy = queue.current is not None or queue.waiting
        with ui.column().classes("w-full gap-4") as form_side:
            self._form_panel(planner)
        with ui.column().classes("w-full gap-4") as runs_side:
            self._runs = RunsView(studio, queue, logs, say, self._reuse, lambda: self._tabs.value == "runs")
        form_side.bind_visibility_from(self._tabs, "value", value="form")
        runs_side.bind_visibility_from(self._tabs, "value", value="runs")
        self._tabs.set_value("runs" if busy else "form")
        self._form.show({})
        ui.timer(0.2, self._look)

    def _form_panel(self, planner: Planner) -> None:
        say = self._say
        with ui.row().classes("w-full items-start gap-4"):
            with ui.column().classes("col-12 col-md gap-3").style("min-width: min(100%, 420px)"):
                with ui.row().classes("studio-card items-center gap-3"):
                    names = {"": say("no_template")} | {name: name for name in templates()}
                    ui.select(names, value="", label=say("template"), on_change=self._begin).props(
                        "outlined dense"
                    ).style("min-width: 220px")
                    ui.toggle(
                        {False: say("basic"), True: say("all_settings")}, value=False, on_change=self._whole
                    ).props('dense no-caps unelevated padding="6px 12px"')
                    ui.input(label=say("search_settings"), on_change=self._search).props(
                        "outlined dense clearable"
                    )
                    ui.button(say("as_yaml"), icon="code", on_click=self._yaml).props("flat dense no-caps")
                self._lines = ui.label().classes("studio-card studio-error").style("white-space: pre-line")
                self._lines.set_visibility(False)
                self._form = FormView(self._studio, say, self._note_change)
            with (
                ui.column()
                .classes("col-12 col-md-auto gap-3")
                .style("width: min(100%, 420px); position: sticky; top: 64px")
            ):
                self._plan = PlanView(planner, say, self._take, self._note_change)
                self._box = CommandBox(self._studio, say)
                self._start = ui.button(say("start"), icon="play_arrow", on_click=self._begin_run)
                self._start.classes("w-full").props("no-caps unelevated")

    def _note_change(self) -> None:
        self._changed_at = time.monotonic()

    async def _look(self) -> None:
        """Once nobody has typed for a moment: check the form, then ask for its plan."""
        if self._changed_at is None or time.monotonic() - self._changed_at < _QUIET_SECONDS:
            return
        self._changed_at = None
        values = dict(self._form.values)
        config = await self._check()
        if self._lines.is_deleted:
            return
        if config is None:
            self._plan.clear(self._say("plan_mistakes"))
        else:
            # the form goes on being looked at while the plan is made
            background_tasks.create(self._plan.ask(values, config.train.steps))

    async def _check(self) -> RunConfig | None:
        """The config of the form, for a plan; None where it cannot be one. Mistakes are shown; without any
        it can be trained, too."""
        try:
            config, errors = form_config(self._form.values), {}
        except ConfigError as error:
            config, errors = None, errors_by_field(error)
        missing: dict[str, str] = {}
        if config is not None:
            errors, missing = await run.io_bound(self._wrong_paths, config)
        if self._lines.is_deleted:
            return None
        blank = not self._form.values
        left = self._form.mark({} if blank else errors | missing)
        self._lines.set_text("\n".join(left))
        self._lines.set_visibility(bool(left))
        self._config = None if errors or missing else config
        self._box.show([] if self._config is None else training_argv(config, self._file_of(config)))
        self._start.set_enabled(self._config is not None)
        return None if errors else config

    def _wrong_paths(self, config: RunConfig) -> tuple[dict[str, str], dict[str, str]]:
        """By key: what is outside of the studio's folders, and what is not there, which is planned by the
        settings and the published model's shapes."""
        errors, missing = {}, {}
        for key, paths in paths_in(config).items():
            for path in paths:
                try:
                    found = self._studio.roots.model(path)
                except ConfigError as error:
                    errors[key] = str(error)
                    continue
                name = key.rpartition(".")[2]
                if name not in _WRITTEN and not found.exists():
                    missing[key] = self._say("not_there")
        try:
            self._studio.roots.inside(config.run_dir)
        except ConfigError as error:
            errors["name"] = str(error)
        return errors, missing

    def _file_of(self, config: RunConfig) -> str:
        """Where the config of a run is written, as its command names it."""
        return self._studio.roots.shown(self._studio.roots.inside(config.run_dir) / CONFIG)

    def _begin(self, event: object) -> None:
        self._form.show(template_values(event.value) if event.value else {})
        self._note_change()

    def _whole(self, event: object) -> None:
        self._form.whole = event.value
        self._form.show()
        self._note_change()

    def _search(self, event: object) -> None:
        self._form.sought = (event.value or "").strip()
        self._form.show()
        self._note_change()

    def _take(self, changes: Values) -> None:
        self._form.show(with_changes(self._form.values, changes))
        self._note_change()

    def _reuse(self, values: Values) -> None:
        self._form.show(values)
        self._note_change()
        self._tabs.set_value("form")

    async def _yaml(self) -> None:
        """The form as text, to copy or to change."""
        say = self._say
        with ui.dialog() as dialog, ui.card().classes("w-full gap-2").style("max-width: 760px"):
            ui.label(say("yaml_hint")).classes("text-caption text-grey-7")
            area = ui.textarea(value=form_text(self._form.values)).classes("w-full studio-code")
            area.props('outlined input-style="height: 52vh" spellcheck=false')
            wrong = ui.label().classes("studio-error")

            def apply() -> None:
                try:
                    values = text_values(area.value)
                except ConfigError as error:
                    return wrong.set_text(str(error))
                dialog.submit(values)

            with ui.row().classes("w-full justify-end gap-2"):
                ui.button(say("cancel"), on_click=lambda: dialog.submit(None)).props("flat no-caps")
                ui.button(say("apply_yaml"), on_click=apply).props("no-caps unelevated")
        values = await dialog
        dialog.delete()
        if values is not None:
            self._form.show(values)
            self._note_change()

    async def _begin_run(self) -> None:
        """Write the config and put the run in the queue."""
        await self._check()
        config = self._config
        if config is None:
            return ui.notify(self._say("mistakes"), type="warning")
        folder = self._studio.roots.inside(config.run_dir)
        job, log = ChildRun(folder), RunLog(folder)
        log.read()
        if log.step and not job.is_alive and not await self._may_go_on(folder, log.step):
            return
        file, root = self._file_of(config), self._studio.roots.folders[0]
        try:
            self._queue.check_free(job)
            job.prepare(training_argv(config, file), root)
            write_text(folder / CONFIG, form_text(self._form.values))
            self._queue.add(job)
            self._queue.tick()
        except (ConfigError, OSError) as error:
            return notify_error(error)
        waits = folder in self._queue.waiting
        ui.notify(self._say("queued" if waits else "started", name=config.name), type="positive")
        self._tabs.set_value("runs")
        self._runs.choose(folder)

    async def _may_go_on(self, folder: Path, step: int) -> bool:
        say = self._say
        with ui.dialog() as dialog, ui.card().classes("gap-3").style("max-width: 520px"):
            ui.label(say("goes_on", folder=self._studio.roots.shown(folder), step=step))
            with ui.row().classes("w-full justify-end gap-2"):
                ui.button(say("cancel"), on_click=lambda: dialog.submit(False)).props("flat no-caps")
                ui.button(say("go_on"), on_click=lambda: dialog.submit(True)).props("no-caps unelevated")
        answer = bool(await dialog)
        dialog.delete()
        return answer
