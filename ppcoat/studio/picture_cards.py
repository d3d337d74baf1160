"""Cards of pictures on the page Data: thumbnail with its crop, what is odd, the caption, edited in place.

Cards are added as they are scrolled to: the browser loads a thumbnail only when it comes near, and one in the
middle of the cards that are there asks for the next. A caption becomes a field when it is clicked, so that
500 cards stay light.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nicegui import run, ui

from ppcoat.data.captions import trigger_parts
from ppcoat.errors import ConfigError, printable
from ppcoat.studio.data_folder import OpenFolder, Picture
from ppcoat.studio.frame import notify_error
from ppcoat.studio.pictures import LARGE, SMALL, picture_url
from ppcoat.studio.words import Words

_AT_ONCE = 40  # cards
_NO_CROP = 0.995  # of both sides: nothing to show
CARD_STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 14px;
  width: 100%; }
.pictures.wide { grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); }
.picture { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; overflow: hidden; min-width: 0;
  content-visibility: auto; contain-intrinsic-size: auto 400px; }
.picture-views { display: flex; gap: 2px; background: #e2e8f0; cursor: zoom-in; }
.picture-view { flex: 1 1 0; min-width: 0; aspect-ratio: 1; background: #f1f5f9; display: flex;
  align-items: center; justify-content: center; }
.picture-whole { position: relative; overflow: hidden; max-width: 100%; max-height: 100%; }
.picture-whole img { display: block; width: 100%; height: 100%; object-fit: contain; }
.picture-crop { position: absolute; outline: 1.5px solid #fff; box-shadow: 0 0 0 9999px rgba(15, 23, 42, .6);
  pointer-events: none; }
.picture-text { padding: 10px 12px 12px; display: flex; flex-direction: column; gap: 6px; }
.picture-caption { white-space: pre-wrap; overflow-wrap: anywhere; cursor: text; border-radius: 6px;
  padding: 4px 6px; margin: 0 -6px; max-height: 180px; overflow: auto; unicode-bidi: plaintext; }
.picture-caption:hover { background: #f1f5f9; }
.picture-caption div { display: inline; }
.picture-caption .word { background: #ccfbf1; color: #0f766e; border-radius: 3px; padding: 0 2px; }
.picture-caption .added { color: #0f766e; border-bottom: 1px dashed #0f766e; margin-right: 4px; }
.picture-note { background: #fef3c7; color: #92400e; border-radius: 4px; padding: 1px 6px; font-size: 12px;
  overflow-wrap: anywhere; }
@media (max-width: 460px) { .pictures, .pictures.wide { grid-template-columns: 1fr; } }
"""


class PictureCards:
    """A grid of cards, of which only those that were scrolled to are there."""

    def __init__(self, say: Words, folder: OpenFolder) -> None:
        self._say, self._folder = say, folder
        self._found: list[Picture] = []
        self._cards: list[_Card] = []
        self._nothing = ui.label(say("nothing_found")).classes("text-grey-7")
        self._grid = ui.element("div").classes("pictures")

    def show(self, found: Sequence[Picture]) -> None:
        """These pictures. Where they are the same as before, only captions and notes that changed are
        shown anew, so that the page stays where it is scrolled to."""
        if list(found) == self._found and self._cards:
            for card in self._cards:
                card.follow()
            return
        self._found, self._cards = list(found), []
        self._nothing.set_visibility(not found)
        self._grid.clear()
        wide = any(each.references or each.mask for each in found)
        self._grid.classes(add="wide" if wide else "", remove="" if wide else "wide")
        self._more()

    def _more(self) -> None:
        """The next cards. One in their middle asks for those behind them when its thumbnail is loaded: the
        last would do so when there is nothing left to scroll to."""
        start = len(self._cards)
        with self._grid:
            for picture in self._found[start : start + _AT_ONCE]:
                self._cards.append(_Card(self._say, self._folder, picture))
        count = len(self._cards)
        if start < count < len(self._found):
            middle = self._cards[(start + count) // 2].image
            middle.on("load", lambda: self._more() if len(self._cards) == count else None, args=[])


class _Card:
    """One picture."""

    def __init__(self, say: Words, folder: OpenFolder, picture: Picture) -> None:
        self._say, self._folder, self._picture = say, folder, picture
        self._shown: tuple | None = None
        self._field: ui.textarea | None = None
        with ui.element("div").classes("picture"):
            with ui.element("div").classes("picture-views").on("click", self._enlarge):
                self.image = _view(picture, picture.path, SMALL)
                for path in _beside(picture):
                    _view(None, path, SMALL)
            with ui.element("div").classes("picture-text"):
                with ui.row().classes("w-full no-wrap items-baseline gap-2"):
                    ui.label(printable(picture.name)).classes("ellipsis text-weight-medium col")
                    bucket = "×".join(map(str, picture.bucket))
                    ui.label(bucket).classes("text-caption text-grey-7 no-wrap")
                self._notes = ui.row().classes("gap-1")
                self._caption = ui.element("div")
        self.follow()

    def follow(self) -> None:
        """Show caption and notes as they are now, unless the caption is being edited."""
        now = self._folder.caption(self._picture), tuple(self._folder.notes(self._picture))
        if now == self._shown or self._field is not None:
            return
        self._shown = now
        self._notes.clear()
        with self._notes:
            for note in now[1]:
                ui.label(self._say(note.kind, detail=printable(note.detail))).classes("picture-note")
        self._notes.set_visibility(bool(now[1]))
        self._show_caption(now[0])

    def _show_caption(self, caption: str) -> None:
        self._caption.clear()
        with self._caption:
            text = ui.element("div").classes("picture-caption").props("role=button tabindex=0")
            text.on("click", self._edit).on("keydown.enter", self._edit)
            with text:
                if not caption:
                    ui.label(self._say("write_caption")).classes("text-grey-6")
                    return
                for part, kind in trigger_parts(caption, self._folder.flags.trigger_word):
                    ui.label(part).classes(kind)

    def _edit(self) -> None:
        if self._field is not None:
            return
        self._caption.clear()
        with self._caption:
            self._field = ui.textarea(value=self._folder.caption(self._picture)).classes("w-full")
            self._field.props("outlined dense autogrow autofocus")
            self._field.on("keydown.ctrl.enter", self._save).on("keydown.meta.enter", self._save)
            self._field.on("keydown.esc", self._close)
            with ui.row().classes("w-full justify-end gap-1 q-mt-xs"):
                ui.button(self._say("cancel"), on_click=self._close).props("flat dense no-caps")
                ui.button(self._say("save"), on_click=self._save).props("unelevated dense no-caps")

    async def _save(self) -> None:
        if self._field is None:
            return
        caption = self._field.value or ""
        if caption.strip() != self._folder.caption(self._picture):
            try:
                await run.io_bound(self._folder.write, {self._picture.path: caption})
            except (ConfigError, OSError) as error:
                notify_error(error)
            else:
                ui.notify(self._say("saved"), type="positive", timeout=1000)
        self._close()

    def _close(self) -> None:
        self._field, self._shown = None, None
        self.follow()

    async def _enlarge(self) -> None:
        picture, say = self._picture, self._say
        wide = "×".join(map(str, picture.bucket))
        with ui.dialog() as dialog, ui.card().classes("w-full").style("max-width: 1100px"):
            with ui.row().classes("w-full items-center no-wrap"):
                with ui.column().classes("gap-0 col").style("min-width: 0"):
                    ui.label(printable(picture.name)).classes("text-weight-medium ellipsis w-full")
                    width, height = picture.size
                    text = say("trained_at", width=width, height=height, bucket=wide)
                    ui.label(text).classes("text-caption text-grey-7")
                ui.button(icon="close", on_click=dialog.close).props("flat round dense")
            with ui.element("div").classes("picture-views w-full").style("cursor: default"):
                _view(picture, picture.path, LARGE)
                for path in _beside(picture):
                    _view(None, path, LARGE)
        await dialog
        dialog.delete()


def _beside(picture: Picture) -> list[Path]:
    return [*picture.references, *([picture.mask] if picture.mask else [])]


def _view(picture: Picture | None, path: Path, side: int) -> ui.element:
    """A file as an <img>, which comes back; of a picture that is trained with what is cropped darkened."""
    with ui.element("div").classes("picture-view"):
        whole = ui.element("div").classes("picture-whole")
        if picture is not None:
            width, height = picture.size
            fill = "width: 100%" if width >= height else "height: 100%"
            whole.style(f"aspect-ratio: {width} / {height}; {fill}")
        with whole:
            image = ui.element("img").props("loading=lazy decoding=async alt=")
            image.props["src"] = picture_url(path, side)
            if picture is not None and min(picture.crop[2:]) < _NO_CROP:
                left, top, wide, high = (f"{100 * part:.2f}%" for part in picture.crop)
                crop = ui.element("div").classes("picture-crop")
                crop.style(f"left: {left}; top: {top}; width: {wide}; height: {high}")
    return image
