"""What all pages share: header, language, the box with the command, choosing a file, running a command.

Texts of users and of files get into a page as labels, which the browser never reads as HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nicegui import events, ui

from ppcoat.errors import ConfigError, printable
from ppcoat.studio.access import Roots
from ppcoat.studio.commands import RunningCommand, shell_command
from ppcoat.studio.words import COOKIE, LANGUAGES, NAMES, Language, Words, language_of

PAGES = ("data", "train", "draw", "files")
# Endings of the files that a field for paths offers.
MODEL_FILES, PICTURE_FILES = (".safetensors", ".gguf"), (".png", ".jpg", ".jpeg", ".webp")
_ACCENT, _INK = "#0f766e", "#1f2937"
_STYLE = """
body { background: #f8fafc; color: #1f2937; }
.nicegui-content { padding: 0; }
.studio { width: 100%; max-width: 1200px; margin: 0 auto; padding: 20px 16px 48px; gap: 16px; }
.studio-card { width: 100%; background: #fff; border: 1px solid #e2e8f0; border-radius: 10px;
  padding: 14px 16px; }
.studio-nav { color: #475569; text-decoration: none; padding: 6px 10px; border-radius: 6px; }
.studio-nav:hover { background: #f1f5f9; }
.studio-nav.here { color: #0f766e; font-weight: 600; background: #f0fdfa; }
.studio-code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.studio-upload .q-uploader__list, .studio-upload .q-uploader__subtitle { display: none; }
.studio-upload .q-uploader__title { font-size: 13px; font-weight: 400; }
.studio-upload .q-uploader__header { background: #f1f5f9; color: #475569; border: 1px dashed #cbd5e1; }
.studio-error { color: #b91c1c; overflow-wrap: anywhere; }
body:not(.studio-ready) .studio { visibility: hidden; }
.studio-ready .studio-connecting { display: none; }
.studio-connecting { position: absolute; padding: 20px 16px; opacity: 0;
  animation: studio-late 0.3s 1s forwards; }
@keyframes studio-late { to { opacity: 1; } }
"""
# Until the page is connected, what NiceGUI still has to say of the fields would take back what is typed into
# them, and clicks may overtake it. Messages keep their order, so this one comes last of a new page's.
_READY = 'document.body.classList.add("studio-ready")'
_ERROR_MILLISECONDS = 15_000


@dataclass(frozen=True)
class Studio:
    """What every page knows. language: of who has chosen none; None: the browser's."""

    roots: Roots
    language: Language | None = None
    most_bytes: int = 4 << 30  # of an upload


@contextmanager
def page_frame(studio: Studio, here: str) -> Iterator[Words]:
    """Context manager: a page with its header, whose body is filled inside -> the texts in its language. It
    is shown, and takes input, once the page is connected. here: its name in PAGES."""
    request = ui.context.client.request
    language = language_of(
        request.cookies.get(COOKIE), request.headers.get("accept-language"), studio.language
    )
    say = Words(language)
    ui.colors(primary=_ACCENT)
    ui.add_css(_STYLE)
    ui.page_title(f"{say(here)} · ppcoat")
    with (
        ui.header()
        .classes("items-center no-wrap gap-1 px-3 py-2 bg-white")
        .style(f"border-bottom: 1px solid #e2e8f0; color: {_INK}")
    ):
        ui.label("ppcoat").classes("text-weight-bold q-mr-sm gt-xs")
        for name in PAGES:
            ui.link(say(name), f"/{name}").classes("studio-nav" + (" here" if name == here else ""))
        ui.space()
        back = quote(request.url.path + (f"?{request.url.query}" if request.url.query else ""), safe="")
        for code in LANGUAGES:
            if code != language:
                link = ui.link(NAMES[code], f"/language/{code}?back={back}").classes("studio-nav")
                link.props(f"lang={code}")
    ui.label(say("connecting")).classes("studio-connecting text-grey-7")
    with ui.column().classes("studio"):
        yield say
    ui.run_javascript(_READY)


class CommandBox:
    """The command that does the same as the page, with a button that copies it. It starts in the first
    root, as the page's own do."""

    def __init__(self, studio: Studio, say: Words, arguments: Sequence[str] = ()) -> None:
        self._say, self._text, self._folder = say, "", studio.roots.folders[0]
        with ui.row().classes("studio-card items-center no-wrap gap-2") as self._row:
            with ui.column().classes("col gap-1").style("min-width: 0"):
                ui.label(say("as_command")).classes("text-caption text-grey-7")
                self._label = ui.label().classes("studio-code")
            ui.button(icon="content_copy", on_click=self._copy).props(
                f'flat round dense aria-label="{say("copy")}"'
            )
        self.show(arguments)

    def show(self, arguments: Sequence[str]) -> None:
        """Show another command; nothing for none."""
        self._text = shell_command(arguments, self._folder) if arguments else ""
        self._label.set_text(self._text)
        self._row.set_visibility(bool(self._text))

    def _copy(self) -> None:
        ui.clipboard.write(self._text)
        ui.notify(self._say("copied"), type="positive", timeout=1200)


class CommandRun:
    """A place that runs commands, one at a time, and shows what they print."""

    def __init__(self, studio: Studio, say: Words) -> None:
        self._say, self._running, self._folder = say, None, studio.roots.folders[0]
        with ui.column().classes("studio-card gap-2") as self._card:
            with ui.row().classes("items-center gap-2 w-full"):
                self._spinner = ui.spinner(size="sm")
                self._state = ui.label()
                ui.space()
                self._stop = ui.button(say("stop"), on_click=lambda: self._running.stop()).props("flat dense")
            self._log = ui.log(max_lines=2000).classes("studio-code w-full").style("height: 320px")
        self._card.set_visibility(False)

    async def run(self, arguments: Sequence[str]) -> int | None:
        """Run `python -m ppcoat <arguments>` -> its exit status; None where one is running already."""
        if self._running is not None:
            return None
        self._running = RunningCommand(arguments, self._tell, self._folder)
        self._log.clear()
        self._show(True, self._say("running"))
        try:
            status = await self._running.run()
        finally:
            self._running = None
        if not self._log.is_deleted:
            self._show(False, self._say("done") if status == 0 else self._say("failed", status=status))
        return status

    def _tell(self, line: str) -> None:
        if not self._log.is_deleted:  # a command goes on when its page is closed
            self._log.push(line)

    def _show(self, busy: bool, text: str) -> None:
        self._card.set_visibility(True)
        self._spinner.set_visibility(busy)
        self._stop.set_visibility(busy)
        self._state.set_text(text)


class PathField:
    """A field for a path, with a button that browses. endings: of the files to choose; folders: whether a
    folder may be chosen. changed: is called when its text is another."""

    def __init__(
        self,
        studio: Studio,
        label: str,
        say: Words,
        endings: Sequence[str] = (),
        folders: bool = True,
        changed: Callable[[], object] | None = None,
    ) -> None:
        self.input = ui.input(label, on_change=changed).props("dense outlined debounce=200")
        self.input.classes("col-grow").style("min-width: 220px")
        add_browse(self.input, studio, say, endings, folders)

    @property
    def text(self) -> str:
        """What stands in the field."""
        return (self.input.value or "").strip()


def add_browse(
    field: ui.input | ui.textarea,
    studio: Studio,
    say: Words,
    endings: Sequence[str] = (),
    folders: bool = True,
    between: str = "",
) -> None:
    """A button in a field that chooses a path as choose_path does. between: what stands between the paths of
    a field for several, to which another is added."""

    async def browse() -> None:
        text = (field.value or "").strip()
        before = [path.strip() for path in text.split(between.strip(" ")) if path.strip()] if between else []
        chosen = await choose_path(studio, say, before[-1] if before else text, endings, folders)
        if chosen is not None:
            field.set_value(between.join([*before, chosen]))

    with field.add_slot("append"):
        button = ui.button(icon="folder_open", on_click=browse).props("flat round dense")
        button.props["aria-label"] = say("browse")


def upload_place(
    label: str, endings: Sequence[str], most_bytes: int, refused: str, uploaded: Callable
) -> None:
    """A place to send a file to, which is given to `uploaded` at once. refused: what is said of one that is
    too large or has another ending."""

    async def take(event: events.UploadEventArguments) -> None:
        await uploaded(event.file)
        event.sender.reset()

    upload = ui.upload(
        label=label,
        auto_upload=True,
        max_file_size=most_bytes,
        on_upload=take,
        on_rejected=lambda: ui.notify(refused, type="negative"),
    )
    upload.props(f"flat bordered accept={','.join(endings)}").classes("w-full studio-upload")


def say_error(error: Exception) -> None:
    """An error in the page, as one line."""
    ui.label(printable(str(error))).classes("studio-error studio-card")


def notify_error(error: Exception) -> None:
    """An error of what was just asked, for a moment."""
    ui.notify(printable(str(error)), type="negative", multi_line=True, timeout=_ERROR_MILLISECONDS)


async def choose_path(
    studio: Studio, say: Words, start: str = "", endings: Sequence[str] = (), folders: bool = True
) -> str | None:
    """Let the user choose a folder (`folders`), or a file of these endings, below the roots -> the path as
    Roots.inside takes it; None: cancelled."""
    roots = studio.roots
    try:
        folder = roots.inside(start) if start.strip() else roots.folders[0]
    except ConfigError:
        folder = roots.folders[0]
    while not folder.is_dir():
        folder = folder.parent
    folder = folder if roots.holds(folder) else roots.folders[0]
    current = [folder]
    with ui.dialog() as dialog, ui.card().classes("w-full gap-1").style("max-width: 560px"):
        where = ui.label().classes("studio-code text-grey-8")
        entries = ui.column().classes("w-full gap-0").style("height: 50vh; overflow: auto; flex-wrap: nowrap")
        with ui.row().classes("w-full justify-end gap-2"):
            ui.button(say("cancel"), on_click=lambda: dialog.submit(None)).props("flat")
            if folders:
                ui.button(say("this_folder"), on_click=lambda: dialog.submit(roots.shown(current[0])))

    def entry(icon: str, text: str, on_click: Callable[[], None]) -> None:
        with (
            ui.row()
            .classes("w-full items-center no-wrap gap-2 q-pa-sm cursor-pointer rounded-borders")
            .classes("hover:bg-slate-100")
            .on("click", on_click)
        ):
            ui.icon(icon).classes("text-grey-7")
            ui.label(text).classes("ellipsis")

    def show(folder: Path) -> None:
        current[0] = folder
        where.set_text(printable(roots.shown(folder)))
        entries.clear()
        with entries:
            if folder in roots.folders:
                for root in roots.folders:
                    if root != folder:
                        entry("dns", printable(root), lambda root=root: show(root))
            else:
                entry("arrow_upward", say("up"), lambda: show(folder.parent))
            try:
                inner, files = roots.listing(folder, endings)
            except ConfigError as error:
                ui.label(str(error)).classes("studio-error")
                return
            for path in inner:
                entry("folder", printable(path.name), lambda path=path: show(path.resolve()))
            for path in files:
                entry("description", printable(path.name), lambda path=path: dialog.submit(roots.shown(path)))
            if not inner and not files:
                ui.label(say("no_entries")).classes("text-grey-7 q-pa-sm")

    show(folder)
    chosen = await dialog
    dialog.delete()
    return chosen
