"""What `tune` tries, in which rounds, and what it remembers: numbers and a journal, no model.

Successive halving (arXiv 1502.07943): many settings train a little, the better half goes on from where it
is for twice as many updates, and so on until two are left. The settings are spread over learning rate (evenly
in its logarithm), rank and policy by a lattice, so that no two share a learning rate and every rank meets
small and large ones. All of it follows from costs that were measured once; the journal keeps those and the
results, so a search that goes on takes the decisions of one that never stopped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ppcoat.atomic import write_text
from ppcoat.config.flags import flag, set_flag
from ppcoat.errors import ConfigError
from ppcoat.reading import json_value, regular_bytes

MOST_SETTINGS = 32
_MOST_BYTES = 64 << 20  # of a journal
LEAST_UPDATES = 20  # of the first round: fewer do not tell settings apart
WANTED_UPDATES = 40  # of the first round, for more settings rather than fewer
BEYOND = (1 / 3, 2 / 3, 1)  # powers of the span, beyond a learning rate at the edge that was the best
EXTENSIONS = 2  # how often the edge may move
WANTED_LOSSES = 256  # of a validation; how far they tell settings apart: docs/accuracy.md
RESERVE = 0.1  # of the budget, for steps that are slower than those that were measured
FORMAT = "ppcoat-tune-1"
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class TuneFlags:
    """Settings of the command `tune`."""

    config: str = flag(
        "file of a run, e.g. configs/flux_lora_24gb.yaml, with train.validation; or TOML for NewBie-image",
        positional=True,
    )
    budget: str = flag("wall time of the search, encoding included: 90s, 60m, 2h", "60m", metavar="TIME")
    lr_span: float = flag(
        "learning rates from 1/N to N times the config's; 1: only its own", 10.0, metavar="N"
    )
    ranks: list[int] = flag("ranks to try beside the config's", [4, 8, 16, 32, 64])
    policies: list[str] = flag("saving policies to try (default: the config's alone)", [])
    hold_out: int = flag(
        "keep so many of the training pictures for validation, where the config names no others",
        0,
        shows_default=False,
        metavar="N",
    )
    overrides: list[str] = set_flag()

    def command(self) -> str:
        """As it was called, without flags that say the default."""
        said = ["python -m ppcoat tune", self.config, "--budget", self.budget]
        for each in fields(self)[2:-1]:
            value, default = getattr(self, each.name), getattr(type(self)(config=""), each.name)
            if value != default:
                said += [f"--{each.name}", *map(str, value if isinstance(value, list) else [value])]
        return " ".join([*said, *(f"--set {each}" for each in self.overrides)])


@dataclass(frozen=True, order=True)
class Candidate:
    """Settings to try: learning rate, rank, saving policy."""

    lr: float
    rank: int
    policy: str

    @property
    def name(self) -> str:
        """That of its folder and of its results."""
        return f"lr{self.lr:.4g}_r{self.rank}_{self.policy}"


@dataclass(frozen=True)
class Space:
    """own: as in the config, always tried. ranks, policies: to choose from. span: learning rates go from
    own.lr / span to own.lr * span; 1: only its own."""

    own: Candidate
    ranks: tuple[int, ...]
    policies: tuple[str, ...]
    span: float = 10.0

    def counts(self) -> list[int]:
        """How many settings a search may begin with, the most first."""
        pairs = len({(self.own.rank, self.own.policy), *self._pairs()})
        if self.span == 1:
            return [pairs]
        return [count for count in (MOST_SETTINGS, 16, 8) if count >= pairs] or [pairs]

    def candidates(self, count: int) -> list[Candidate]:
        """So many different settings, the config's own first."""
        pairs, lrs = self._pairs(), [self.own.lr]
        if self.span > 1:
            places = [2 * i / (count - 2) - 1 for i in range(count - 1)]  # -1 to 1
            lrs = [rounded(min(1.0, self.own.lr * self.span**place)) for place in places]
        stride = next(n for n in range(max(1, round(0.618 * len(pairs))), 2 * len(pairs) + 1)
                      if math.gcd(n, len(pairs)) == 1)  # fmt: skip
        found = [self.own]
        for i in range(max(len(lrs), len(pairs))):
            one, other = (
                Candidate(lrs[i % len(lrs)], *pairs[place * stride % len(pairs)]) for place in (i, i + 1)
            )
            found.append(other if one == self.own else one)
        by_name: dict[str, Candidate] = {}  # a rate of more digits than a name shows is that of the lattice
        for each in found:
            by_name.setdefault(each.name, each)
        return list(by_name.values())[:count]

    def _pairs(self) -> list[tuple[int, str]]:
        return [(rank, policy) for rank in self.ranks for policy in self.policies]

    def beyond(self, losses: Mapping[Candidate, float]) -> list[Candidate]:
        """More settings where the best of these has the smallest or largest learning rate of all: others
        like it, up to a span beyond."""
        best = min(losses, key=lambda each: (losses[each], each))
        lrs = {each.lr for each in losses}
        if self.span == 1 or not math.isfinite(losses[best]) or min(lrs) < best.lr < max(lrs):
            return []
        sign = 1 if best.lr == max(lrs) else -1
        more = [rounded(best.lr * self.span ** (sign * power)) for power in BEYOND]
        return [Candidate(lr, best.rank, best.policy) for lr in more if lr <= 1]


def rounded(lr: float) -> float:
    """To four digits, which is what names and tables show."""
    return float(f"{lr:.4g}")


@dataclass(frozen=True)
class Costs:
    """Seconds, measured: of an update, of a validation loss, and of putting in an adapter and saving it."""

    step: float
    evaluation: float
    start: float

    def of(self, updates: int) -> float:
        """Of one adapter in one round."""
        return updates * self.step + self.evaluation + self.start


@dataclass(frozen=True)
class Rounds:
    """keep: settings that enter each round; steps: updates that each of them has done at its end."""

    keep: tuple[int, ...]
    steps: tuple[int, ...]

    def seconds(self, costs: Costs, more: int = 0) -> float:
        """Of all rounds, `more` settings added to the first."""
        new = [steps - before for steps, before in zip(self.steps, (0, *self.steps), strict=False)]
        keep = (self.keep[0] + more, *self.keep[1:])
        return sum(count * costs.of(updates) for count, updates in zip(keep, new, strict=True))


def halving(count: int, steps: int) -> Rounds:
    """Rounds that begin with `count` settings and end with two, which do `steps` updates in all."""
    keep = [count]
    while keep[-1] > 2:
        keep.append(-(-keep[-1] // 2))
    return Rounds(tuple(keep), tuple(-(-steps // 2**left) for left in reversed(range(len(keep)))))


def plan_rounds(space: Space, costs: Costs, seconds: float, steps: int, least: int = LEAST_UPDATES) -> Rounds:
    """The rounds that fit into so many seconds: as many settings as have WANTED_UPDATES in the first round,
    or else as few as there may be; of at most `steps` updates.

    least: updates that the first round must have. Raises TooShort where it cannot.
    """
    more = 0 if space.span == 1 else len(BEYOND)
    found = [_longest(count, costs, seconds * (1 - RESERVE), steps, more) for count in space.counts()]
    good = [each for each in found if each.steps[0] >= max(least, WANTED_UPDATES)]
    rounds = good[0] if good else found[-1]
    shortest = halving(space.counts()[-1], steps)
    if shortest.steps[0] > least:
        shortest = halving(shortest.keep[0], ((least - 1) << (len(shortest.keep) - 1)) + 1)
    if rounds.steps[-1] < shortest.steps[-1]:
        raise TooShort(shortest.seconds(costs, more) / (1 - RESERVE))
    return rounds


class TooShort(Exception):
    """There is no time for the rounds of a search, which want so many seconds."""

    def __init__(self, wanted: float) -> None:
        super().__init__()
        self.wanted = wanted


def _longest(count: int, costs: Costs, seconds: float, steps: int, more: int) -> Rounds:
    """Of the halvings of `count` settings the one with the most updates that fits; with 1 where none does."""
    low, high = 1, steps
    while low < high:
        middle = -(-(low + high) // 2)
        fits = halving(count, middle).seconds(costs, more) <= seconds
        low, high = (middle, high) if fits else (low, middle - 1)
    return halving(count, low)


def draws_of(losses: int, costs: Costs, seconds: float) -> int:
    """Noises for each picture of a validation which with one has so many losses and these costs: enough for
    WANTED_LOSSES, but no more than take as long as WANTED_UPDATES or a hundredth of all seconds."""
    affordable = int(min(WANTED_UPDATES * costs.step, seconds / 100) / costs.evaluation)
    return max(1, min(math.ceil(WANTED_LOSSES / losses), affordable))


def seconds_of(budget: str) -> float:
    """ "90s", "60m" or "2h" in seconds. Raises ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", budget.strip())
    if match is None or match[2].lower() not in _UNITS or not float(match[1]):
        raise ConfigError(f"--budget: came {budget!r}, wanted a time with its unit, such as 90s, 60m or 2h")
    return float(match[1]) * _UNITS[match[2].lower()]


def told_seconds(seconds: float) -> str:
    """Seconds as --budget takes them, rounded up."""
    return f"{math.ceil(seconds)}s" if seconds < 300 else f"{math.ceil(seconds / 60)}m"


@dataclass(frozen=True)
class Result:
    """loss: of validation after so many updates, inf where training or the loss was not finite; seconds: of
    this round."""

    steps: int
    loss: float
    seconds: float

    def as_json(self) -> list[float | None]:
        """JSON knows no inf."""
        return [self.steps, None if self.loss == math.inf else self.loss, self.seconds]


@dataclass
class Journal:
    """What a search has done, in a file that is always whole. settings: which search it is, as JSON. costs,
    rounds, draws: its plan. results: one for each round. seconds: used by all calls so far. winner: when it
    is over."""

    file: Path
    settings: dict
    costs: Costs | None = None
    rounds: Rounds | None = None
    draws: int = 1
    results: dict[Candidate, list[Result]] = field(default_factory=dict)
    seconds: float = 0.0
    winner: Candidate | None = None

    @classmethod
    def of(cls, file: Path, settings: dict) -> Journal:
        """That in the file, or a new one. Raises ConfigError for a damaged file and one of another search."""
        settings = json.loads(json.dumps(settings))
        way = f"remove {file.parent} to start over"
        try:
            found = json_value(regular_bytes(file, _MOST_BYTES))
            saved = found["settings"] if found["format"] == FORMAT else {}
            journal = cls(
                file,
                saved,
                Costs(**found["costs"]),
                Rounds(*map(tuple, found["rounds"])),
                found["draws"],
                {
                    Candidate(*of): [
                        Result(count, math.inf if loss is None else loss, seconds)
                        for count, loss, seconds in rows
                    ]
                    for of, rows in found["results"]
                },
                found["seconds"],
                Candidate(*found["winner"]) if found["winner"] else None,
            )
        except FileNotFoundError:
            return cls(file, settings)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ConfigError(f"{file} cannot be read ({type(error).__name__}: {error}); {way}") from None
        other = [key for key, value in settings.items() if saved.get(key) != value]
        if other:
            raise ConfigError(
                f"{file} is of a search with another {', '.join(other)}: set it back, {way}, or give "
                "this one another name with --set name=..."
            )
        return journal

    def save(self) -> None:
        """Raises OSError for a full disk."""
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "costs": asdict(self.costs),
            "rounds": list(asdict(self.rounds).values()),
            "draws": self.draws,
            "seconds": self.seconds,
            "winner": self.winner and list(asdict(self.winner).values()),
            "results": [[list(asdict(each).values()), [row.as_json() for row in rows]]
                        for each, rows in self.results.items()],
        }  # fmt: skip
        write_text(self.file, json.dumps(content, indent=1) + "\n")

    def loss(self, candidate: Candidate, steps: int) -> float | None:
        """Of a candidate after so many updates, inf also where fewer diverged; None: not known yet."""
        rows = self.results.get(candidate, [])
        return next((row.loss for row in rows if row.steps == steps or row.loss == math.inf), None)

    def steps(self, candidate: Candidate) -> int:
        """Updates after which its last loss was measured."""
        return max((row.steps for row in self.results.get(candidate, ())), default=0)


def ranked(losses: Mapping[Candidate, float]) -> list[Candidate]:
    """The best first; of equals, the smaller."""
    return sorted(losses, key=lambda each: (losses[each], each.rank, each.lr, each.policy))


def table(own: Candidate, best: Candidate, journal: Journal) -> list[str]:
    """One line a candidate, those that came furthest first: its losses round by round."""
    steps = journal.rounds.steps
    shows_policy = len({each.policy for each in journal.results}) > 1
    head = f"{'lr':>10s}{'rank':>6s}" + (f"  {'policy':26s}" if shows_policy else "")
    lines = [head + "".join(f"{f'{count} steps':>13s}" for count in steps)]
    order = sorted(journal.results.items(), key=lambda each: (-len(each[1]), each[1][-1].loss))
    for each, rows in order:
        known = {row.steps: "diverged" if row.loss == math.inf else f"{row.loss:.5f}" for row in rows}
        policy = f"  {each.policy:26s}" if shows_policy else ""
        cells = "".join(f"{known.get(count, '-'):>13s}" for count in steps)
        note = "  <- best" if each == best else ""
        note += "  (as in the config)" if each == own else ""
        lines.append(f"{each.lr:10.4g}{each.rank:6d}{policy}{cells}{note}")
    return lines
