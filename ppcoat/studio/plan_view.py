"""The memory plan beside the form: bars by phase and component for a chosen card, whether it fits, what to
change where it does not, and how long it may take. All of it is calculated by `plan`, nothing is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nicegui import ui

from ppcoat.errors import ConfigError
from ppcoat.plan import COMPONENTS, GB
from ppcoat.studio.form import Values
from ppcoat.studio.planner import Planner
from ppcoat.studio.words import Words

CARDS = (8, 10, 12, 16, 20, 24, 32, 40, 48, 80)  # GB
_COLOURS = ("#94a3b8", "#f59e0b", "#0f766e", "#22c55e", "#a3e635", "#3b82f6", "#8b5cf6", "#f43f5e", "#64748b")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class PlanView:
    """apply: takes the changes that a plan advises. changed: another card was chosen."""

    def __init__(
        self, planner: Planner, say: Words, apply: Callable[[Values], None], changed: Callable[[], None]
    ) -> None:
        self._planner, self._say, self._apply = planner, say, apply
        self._asked, self._turn = 0, asyncio.Lock()
        with ui.column().classes("studio-card gap-2"):
            with ui.row().classes("w-full items-center no-wrap"):
                ui.label(say("plan")).classes("text-weight-bold")
                ui.space()
                cards = {0: say("as_config_says")} | {card: f"{card} GB" for card in CARDS}
                self._card = ui.select(cards, value=24, label=say("card"), on_change=lambda _: changed())
                self._card.props("outlined dense options-dense").style("min-width: 150px")
            self._state = ui.label(say("plan_waits")).classes("text-caption text-grey-7")
            self._chart = ui.echart(_options(say, [], None)).style("height: 230px; width: 100%")
            self._chart.set_visibility(False)
            self._verdict = ui.label().classes("text-weight-medium").style("overflow-wrap: anywhere")
            self._advice = ui.column().classes("w-full gap-1")
            self._time = ui.label().classes("text-caption text-grey-8")
            self._facts = ui.label().classes("text-caption text-grey-7").style("white-space: pre-line")

    @property
    def card(self) -> float | None:
        """GB of the chosen card; None: the device of the config."""
        return float(self._card.value) or None

    def clear(self, why: str) -> None:
        """No plan: the form has mistakes."""
        self._asked += 1
        self._state.set_text(why)
        self._show(None, 0)

    async def ask(self, values: Values, steps: int) -> None:
        """Plan a form without mistakes. An answer that comes after another question is dropped."""
        self._asked += 1
        mine, card = self._asked, self.card
        self._state.set_text(self._say("planning"))
        async with self._turn:
            if mine != self._asked:
                return
            try:
                found = await self._planner.plan(values, card)
            except ConfigError as error:
                if mine == self._asked:
                    self.clear(str(error))
                return
        if mine == self._asked and not self._card.is_deleted:
            self._state.set_text(self._say("plan_source"))
            self._show(found, steps)

    def _show(self, found: dict[str, Any] | None, steps: int) -> None:
        say = self._say
        self._advice.clear()
        self._chart.set_visibility(found is not None)
        for label in (self._verdict, self._time, self._facts):
            label.set_visibility(found is not None)
        if found is None:
            return
        card, total = self.card, found["total"] / GB
        self._chart.options.clear()
        self._chart.options.update(_options(say, found["phases"], card))
        self._chart.style(f"height: {90 + 30 * len(found['phases'])}px")
        fits = found["fits"]
        key = "peak" if fits is None else "fits" if fits else "fits_not"
        self._verdict.set_text(say(key, total=f"{total:.2f}", card=f"{card or 0:g}"))
        self._verdict.style(f"color: {'#b91c1c' if fits is False else '#0f766e'}")
        self._facts.set_text("\n".join(found["facts"]))
        self._time.set_text(self._told_time(found["seconds"], steps))
        with self._advice:
            if "nothing" in found:
                ui.label(found["nothing"]).classes("text-caption studio-error")
            if "best" in found:
                self._advise(found["best"], steps)

    def _advise(self, best: dict[str, Any], steps: int) -> None:
        say = self._say
        ui.label(say("change_this", total=f"{best['total'] / GB:.2f}"))
        for key, value in best["changes"].items():
            text = "none" if value in (False, None) and key == "model.quantize" else value
            text = {True: "true", False: "false", None: say("unset")}.get(text, text)
            ui.label(f"{key}: {text}").classes("studio-code")
        ui.label(self._told_time(best["seconds"], steps)).classes("text-caption text-grey-8")
        ui.button(say("use_these"), on_click=lambda: self._apply(best["changes"])).props(
            "outline dense no-caps"
        )

    def _told_time(self, seconds: float | None, steps: int) -> str:
        if seconds is None:
            return self._say("no_estimate")
        return self._say("estimate", time=duration(seconds * steps), one=duration(seconds), steps=steps)


def duration(seconds: float) -> str:
    """12 s, 3.4 min, 5.6 h, 2.1 d."""
    for size, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _options(say: Words, phases: list[dict], card: float | None) -> dict[str, Any]:
    """echarts' settings: a bar for each phase, in parts; a line at the card's memory."""
    names = [name for name in COMPONENTS if any(phase["parts"].get(name) for phase in phases)]
    line = {
        "silent": True, "symbol": "none", "lineStyle": {"color": "#b91c1c", "type": "dashed", "width": 1.5},
        "label": {"formatter": f"{card or 0:g} GB", "position": "start", "color": "#b91c1c"},
        "data": [{"xAxis": card}],
    }  # fmt: skip
    series = [
        {
            "type": "bar", "stack": "memory", "name": say(f"part_{name}"), "barWidth": 14,
            "itemStyle": {"color": _COLOURS[number % len(_COLOURS)]},
            "data": [round(phase["parts"].get(name, 0) / GB, 3) for phase in phases],
        }
        for number, name in enumerate(names)
    ]  # fmt: skip
    if card and series:
        series[0]["markLine"] = line
    most = max([sum(phase["parts"].values()) / GB for phase in phases] + [card or 0.0, 0.1])
    return {
        "animation": False,
        "grid": {"left": 8, "right": 16, "top": 20, "bottom": 56, "containLabel": True},
        "legend": {"bottom": 0, "type": "scroll", "itemWidth": 10, "itemHeight": 10,
                   "textStyle": {"fontSize": 11}},
        "tooltip": {"trigger": "axis", "axisPointer": {"type": "shadow"}, "confine": True},
        "xAxis": {"type": "value", "max": round(1.05 * most, 2),
                  "axisLabel": {"formatter": "{value} GB", "hideOverlap": True}},
        "yAxis": {"type": "category", "inverse": True,
                  "data": [say(f"phase_{phase['name']}") for phase in phases]},
        "series": series,
    }  # fmt: skip
