"""The page Data: the pictures of a folder as they will be trained, their captions to be edited, and what is
odd about them.

The address holds the folder and its settings, so a page can be opened again, or in the other language.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlencode

from nicegui import run, ui

from ppcoat.config.flags import arguments_of
from ppcoat.data.caption_edits import CaptionFlags
from ppcoat.data.folder import FolderFlags, NoteKind
from ppcoat.errors import ConfigError
from ppcoat.studio.data_folder import OpenFolder, OpenFolders
from ppcoat.studio.frame import CommandBox, PathField, Studio, notify_error, page_frame, say_error
from ppcoat.studio.picture_cards import CARD_STYLE, PictureCards
from ppcoat.studio.words import Words

_LOOK_SECONDS = 1.0  # between looks for what another page changed
_KINDS: tuple[NoteKind, ...] = ("no_caption", "duplicate", "small", "cropped", "guessed", "other")


def data_page(studio: Studio) -> None:
    """Register the page."""
    folders = OpenFolders(studio.roots)

    @ui.page("/data")
    def page(
        folder: str = "",
        resolution: str = "",
        trigger_word: str = "",
        caption_ext: str = "",
        control_path: str = "",
        mask_path: str = "",
    ) -> None:
        given = {
            "resolution": int(resolution) if resolution.isdecimal() and len(resolution) < 7 else resolution,
            "trigger_word": trigger_word,
            "caption_ext": caption_ext,
            "control_path": control_path,
            "mask_path": mask_path,
        }
        flags = FolderFlags(folder=folder, **{name: value for name, value in given.items() if value != ""})
        with page_frame(studio, "data") as say:
            ui.add_css(CARD_STYLE)
            _Form(studio, say, flags)
            if not flags.folder:
                ui.label(say("welcome")).classes("text-grey-8")
                return
            try:
                opened = folders.of(flags)
            except ConfigError as error:
                say_error(error)
                return
            with ui.row().classes("items-center gap-3") as waiting:
                ui.spinner()
                ui.label(say("checking"))
            body = ui.column().classes("w-full gap-4")
            shown = _Folder(studio, say, opened, body)
            ui.timer(0.05, lambda: shown.read(waiting), once=True)
            ui.timer(_LOOK_SECONDS, shown.follow)


class _Form:
    """What to open and how it will be trained."""

    def __init__(self, studio: Studio, say: Words, flags: FolderFlags) -> None:
        self._studio, self._say = studio, say
        self._fields: dict[str, ui.input] = {}
        with ui.column().classes("studio-card gap-2"):
            with ui.row().classes("w-full items-center gap-3"):
                self._path("folder", flags.folder)
                self._field("resolution", str(flags.resolution)).style("width: 110px").props(
                    "inputmode=numeric"
                )
                self._field("trigger_word", flags.trigger_word or "").style("width: 150px")
                ui.button(say("open"), on_click=self._open).props("unelevated no-caps")
            beside = bool(flags.control_path or flags.mask_path or flags.caption_ext != "txt")
            with (
                ui.expansion(say("more"), value=beside)
                .classes("w-full")
                .props("dense header-class=q-px-none"),
                ui.row().classes("w-full items-center gap-3"),
            ):
                self._path("control_path", flags.control_path or "")
                self._path("mask_path", flags.mask_path or "")
                self._field("caption_ext", flags.caption_ext).style("width: 170px")

    def _field(self, name: str, value: str) -> ui.input:
        return self._known(name, ui.input(self._say(name)).props("dense outlined"), value)

    def _path(self, name: str, value: str) -> None:
        self._known(name, PathField(self._studio, self._say(name), self._say).input, value)

    def _known(self, name: str, field: ui.input, value: str) -> ui.input:
        self._fields[name] = field.mark(name).on("keydown.enter", self._open)
        field.set_value(value)
        return field

    def _open(self) -> None:
        values = {name: field.value.strip() for name, field in self._fields.items()}
        ui.navigate.to("/data?" + urlencode({name: value for name, value in values.items() if value}))


class _Folder:
    """An opened folder on the page: filters, changes of many captions, and the cards."""

    def __init__(self, studio: Studio, say: Words, folder: OpenFolder, body: ui.column) -> None:
        self._studio, self._say, self._folder, self._body = studio, say, folder, body
        self._version, self._kind, self._cards = -1, None, None

    async def read(self, waiting: ui.row | None = None, anew: bool = False) -> None:
        """Look at the folder and show it, or why it cannot be shown."""
        try:
            await run.io_bound(self._folder.read, anew)
        except (ConfigError, OSError) as error:
            with self._body:
                say_error(error)
            return
        finally:
            if waiting is not None:
                waiting.set_visibility(False)
        self._version = self._folder.version
        if self._cards is None:
            with self._body:
                self._build()
        self._refresh()

    def follow(self) -> None:
        """Show what another page, or this one, has changed."""
        if self._cards is not None and self._version != self._folder.version:
            self._version = self._folder.version
            self._refresh()

    def _build(self) -> None:
        say = self._say
        with ui.row().classes("w-full items-center gap-2"):
            self._chips = ui.row().classes("items-center gap-1")
            ui.space()
            with ui.row().classes("no-wrap gap-2"):
                self._undo = ui.button(say("undo"), icon="undo", on_click=self._take_back)
                again = ui.button(say("read_again"), icon="refresh", on_click=lambda: self.read(anew=True))
            for button in (self._undo, again):
                button.props("flat dense no-caps")
        self._remarks = ui.column().classes("w-full gap-1")
        with ui.row().classes("w-full items-center gap-3"):
            self._search = ui.input(say("search"), on_change=self._show_found).classes("col-grow")
            self._search.props("dense outlined clearable debounce=250 bg-color=white").mark("search")
            self._count = ui.label().classes("text-grey-7")
        self._bulk = _Bulk(self._studio, say, self._folder, self._after_change)
        self._cards = PictureCards(say, self._folder)
        CommandBox(self._studio, say, ["data", "report", *arguments_of(self._folder.shown_flags)])

    def _refresh(self) -> None:
        """Everything but the form."""
        folder, say = self._folder, self._say
        counts = folder.counts()
        self._chips.clear()
        with self._chips:
            self._chip(None, say("all", count=len(folder.pictures)))
            for kind in _KINDS:
                if counts[kind]:
                    self._chip(kind, say(f"{kind}_count", count=counts[kind]))
        self._remarks.set_visibility(bool(folder.remarks or folder.left_out))
        self._remarks.clear()
        with self._remarks:
            for remark in folder.remarks:
                ui.label(remark).classes("text-grey-8")
            if folder.left_out:
                title = say("left_out", count=len(folder.left_out))
                with (
                    ui.expansion(title).classes("w-full text-orange-9").props("dense header-class=q-px-none")
                ):
                    for line in folder.left_out:
                        ui.label(line).classes("studio-code text-grey-9")
        self._undo.set_enabled(folder.steps > 0)
        self._show_found()

    def _chip(self, kind: NoteKind | None, text: str) -> None:
        def choose() -> None:
            self._kind = kind
            self._refresh()

        chosen = "unelevated" if kind == self._kind else "outline"
        ui.button(text, on_click=choose).props(f"{chosen} rounded dense no-caps size=sm").classes("q-px-sm")

    def _show_found(self) -> None:
        search = self._search.value or ""
        found = self._folder.found(search, self._kind)
        self._count.set_text(self._say("found", count=len(found), all=len(self._folder.pictures)))
        self._bulk.show(search)
        self._cards.show(found)

    def _after_change(self) -> None:
        self._version = self._folder.version
        self._refresh()

    async def _take_back(self) -> None:
        try:
            count = await run.io_bound(self._folder.undo)
        except (ConfigError, OSError) as error:
            return notify_error(error)
        ui.notify(self._say("undone", count=count), type="info")
        self._after_change()


class _Bulk:
    """Changes of many captions, with how many before they are made, and the command that does the same."""

    def __init__(self, studio: Studio, say: Words, folder: OpenFolder, changed: Callable[[], None]) -> None:
        self._say, self._folder, self._changed = say, folder, changed
        self._search = ""
        with (
            ui.expansion(say("bulk")).classes("studio-card").props("dense header-class=q-px-none"),
            ui.column().classes("w-full gap-3 q-pb-sm"),
        ):
            ui.label(say("bulk_scope")).classes("text-caption text-grey-7")
            with ui.row().classes("w-full gap-3"):
                self._fields = {name: self._field(name) for name in ("prepend", "append", "replace", "by")}
            with ui.row().classes("items-center gap-3"):
                self._apply = ui.button(say("apply"), on_click=self._write).props("unelevated no-caps")
                self._count = ui.label().classes("text-grey-8")
            self._command = CommandBox(studio, say)

    def show(self, search: str) -> None:
        """Tell what would change of the captions that a search finds."""
        self._search = search
        change = self._change()
        count = self._folder.would_change(change)
        self._count.set_text(self._say("would_change", count=count))
        self._apply.set_enabled(count > 0)
        asked = change.prepend or change.append or change.replace
        self._command.show(["data", "captions", *arguments_of(change)] if asked else [])

    def _field(self, name: str) -> ui.input:
        field = ui.input(self._say(name), on_change=lambda: self.show(self._search)).classes("col-grow")
        return field.props("dense outlined debounce=250").style("min-width: 180px").mark(name)

    def _change(self) -> CaptionFlags:
        said = {name: field.value or "" for name, field in self._fields.items()}
        flags = self._folder.shown_flags
        return CaptionFlags(
            folder=flags.folder, caption_ext=flags.caption_ext, search=self._search, write=True, **said
        )

    async def _write(self) -> None:
        try:
            count = await run.io_bound(self._folder.write_all, self._change())
        except (ConfigError, OSError) as error:
            notify_error(error)
        else:
            ui.notify(self._say("changed", count=count), type="positive")
            for field in self._fields.values():
                field.set_value("")
        self._changed()
