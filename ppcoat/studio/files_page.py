"""The page Files."""

from __future__ import annotations

from nicegui import ui

from ppcoat.studio.frame import Studio, page_frame


def files_page(studio: Studio) -> None:
    @ui.page("/files")
    def page() -> None:
        with page_frame(studio, "files") as say:
            ui.label(say("files"))
