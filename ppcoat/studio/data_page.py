"""The page Data."""

from __future__ import annotations

from nicegui import ui

from ppcoat.studio.frame import Studio, page_frame


def data_page(studio: Studio) -> None:
    @ui.page("/data")
    def page() -> None:
        with page_frame(studio, "data") as say:
            ui.label(say("data"))
