"""What `tune` tries and in which rounds: counted by hand. What its journal remembers: everything."""

import math
from dataclasses import replace

import pytest

from ppcoat.errors import ConfigError
from ppcoat.train.search import (
    Candidate,
    Costs,
    Journal,
    Result,
    Rounds,
    Space,
    TooShort,
    draws_of,
    halving,
    plan_rounds,
    ranked,
    seconds_of,
    table,
    told_seconds,
)

OWN = Candidate(1e-3, 16, "coat")
RANKS = (4, 8, 16, 32, 64)
SPACE = Space(OWN, RANKS, ("coat",))
COSTS = Costs(step=0.5, evaluation=2.0, start=1.0)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("60m", 3600), ("2h", 7200), ("1.5H", 5400)])
def test_a_budget_has_a_unit(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(told_seconds(seconds)) == seconds


@pytest.mark.parametrize("text", ["60", "", "m", "0m", "-5m", "1d", "10 minutes", "1h30m", "nan s"])
def test_any_other_budget_is_answered(text):
    with pytest.raises(ConfigError, match="wanted a time with its unit, such as 90s, 60m or 2h"):
        seconds_of(text)


def test_rounds_halve_settings_and_double_updates():
    assert halving(8, 100) == Rounds((8, 4, 2), (25, 50, 100))
    assert halving(5, 10) == Rounds((5, 3, 2), (3, 5, 10))
    assert halving(2, 7) == Rounds((2,), (7,))
    # 8 and 3 more do 25 updates, 4 go on for 25, 2 for 50, each with a validation and a start
    assert halving(8, 100).seconds(COSTS, more=3) == 11 * 15.5 + 4 * 15.5 + 2 * 28


@pytest.mark.parametrize("seconds", [300, 500, 1000, 2000])
def test_rounds_are_the_longest_that_fit(seconds):
    rounds = plan_rounds(SPACE, COSTS, seconds, steps=10**6)
    longer = halving(rounds.keep[0], rounds.steps[-1] + 1)
    assert rounds.seconds(COSTS, more=3) <= 0.9 * seconds < longer.seconds(COSTS, more=3)


def test_time_makes_settings_many_and_their_rounds_long():
    few, more, most = (plan_rounds(SPACE, COSTS, seconds, steps=10**6) for seconds in (300, 2000, 10**5))
    assert (few.keep[0], more.keep[0], most.keep[0]) == (8, 16, 32)
    assert few.steps[0] < 40 <= more.steps[0]
    assert plan_rounds(SPACE, COSTS, 10**9, steps=640).steps == (40, 80, 160, 320, 640)
    assert plan_rounds(SPACE, COSTS, 10**9, steps=600).steps == (
        75,
        150,
        300,
        600,
    )  # 38 would be too few for 32


def test_too_short_a_budget_is_told_what_would_do():
    with pytest.raises(TooShort) as error:
        plan_rounds(SPACE, COSTS, 100, steps=600)
    assert plan_rounds(SPACE, COSTS, error.value.wanted, steps=600).steps[0] == 20
    with pytest.raises(TooShort):
        plan_rounds(SPACE, COSTS, error.value.wanted - 2, steps=600)


def test_a_short_run_has_short_rounds():
    assert plan_rounds(SPACE, COSTS, 100, steps=8).steps == (2, 4, 8)
    with pytest.raises(TooShort):
        plan_rounds(SPACE, COSTS, 60, steps=8)


def test_a_validation_has_enough_losses_and_takes_no_longer_than_a_round():
    assert draws_of(96, COSTS, 3600) == 3 and draws_of(300, COSTS, 3600) == 1  # for 256
    assert draws_of(8, COSTS, 3600) == 10  # 40 updates take 20 s
    assert draws_of(8, COSTS, 600) == 3
    assert draws_of(8, Costs(0.01, 2.0, 0.0), 60) == 1


@pytest.mark.parametrize("count", [8, 16, 32])
def test_settings_cover_the_space(count):
    found = SPACE.candidates(count)
    assert len(set(found)) == count and found[0] == OWN
    lrs = sorted({each.lr for each in found[1:]})
    assert lrs[0] == 1e-4 and lrs[-1] == 1e-2
    steps = [math.log(b / a) for a, b in zip(lrs, lrs[1:], strict=False)]
    assert max(steps) == pytest.approx(math.log(100) / (count - 2), rel=0.02)
    assert {each.rank for each in found} == set(RANKS)
    if count > 8:  # every rank meets small and large rates
        assert all({each.rank for each in found if wanted(each.lr)} == set(RANKS)
                   for wanted in (lambda lr: lr < 1e-3, lambda lr: lr > 1e-3))  # fmt: skip


def test_rates_stay_in_what_a_config_takes():
    assert max(each.lr for each in replace(SPACE, own=replace(OWN, lr=0.5)).candidates(16)) == 1.0


def test_settings_of_one_name_are_tried_once():
    """A folder is named by four digits of the rate: two settings must not share one."""
    for lr in (1.23456e-4, 0.99996e-3):
        for ranks in (RANKS, (16,)):
            space = replace(SPACE, own=replace(OWN, lr=lr), ranks=ranks)
            found = space.candidates(8)
            assert len({each.name for each in found}) == len(found) and found[0] == space.own


def test_with_one_rate_ranks_and_policies_are_all_that_is_tried():
    space = Space(OWN, (8, 16), ("coat", "coat+recompute"), span=1)
    assert space.counts() == [4]
    assert set(space.candidates(4)) == {
        Candidate(1e-3, rank, policy) for rank in (8, 16) for policy in ("coat", "coat+recompute")
    }
    assert space.beyond({OWN: 1.0}) == []
    assert Space(OWN, (16,), ("coat",), span=1).candidates(1) == [OWN]


def test_the_edge_moves_while_the_best_stands_there():
    losses = {Candidate(lr, 8, "coat"): loss for lr, loss in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.0))}
    more = SPACE.beyond(losses)
    assert [each.lr for each in more] == [0.02154, 0.04642, 0.1] and {each.rank for each in more} == {8}
    assert SPACE.beyond(losses | {more[0]: 0.5}) == [
        Candidate(lr, 8, "coat") for lr in (0.04641, 0.09998, 0.2154)
    ]
    assert SPACE.beyond(losses | {more[0]: 1.5}) == []
    assert SPACE.beyond(losses | {more[0]: math.inf}) == []
    falling = {each: -loss for each, loss in losses.items()}
    assert [each.lr for each in SPACE.beyond(falling)] == [4.642e-5, 2.154e-5, 1e-5]
    assert [each.lr for each in replace(SPACE, span=8.0).beyond(losses)] == [0.02, 0.04, 0.08]
    assert SPACE.beyond({each: math.inf for each in losses}) == []
    assert SPACE.beyond({Candidate(0.5, 8, "coat"): 1.0, OWN: 2.0}) == []  # none up to 1


def test_the_smaller_of_equals_is_better():
    small, large = Candidate(1e-3, 4, "coat"), Candidate(1e-4, 64, "coat")
    assert ranked({large: 1.0, OWN: math.inf, small: 1.0}) == [small, large, OWN]


def journal(folder, **settings):
    return Journal.of(folder / "journal.json", {"config": "name: x", "ranks": [4], **settings})


def filled(folder):
    found = journal(folder)
    found.costs, found.rounds, found.draws, found.seconds = COSTS, halving(4, 40), 3, 12.5
    found.results = {
        OWN: [Result(20, 1 / 3, 1.5), Result(40, 0.25, 2.0)],
        Candidate(1e-2, 8, "coat"): [Result(20, math.inf, 1.0)],
        Candidate(1e-4, 4, "coat"): [Result(20, 0.5, 1.0)],
    }
    return found


def test_a_journal_comes_back(tmp_path):
    first = filled(tmp_path)
    first.save()
    assert journal(tmp_path) == first
    assert "Infinity" not in first.file.read_text()
    first.winner = OWN
    first.save()
    again = journal(tmp_path)
    assert again == first and again.loss(OWN, 40) == 0.25 and again.steps(OWN) == 40
    assert again.loss(Candidate(1e-2, 8, "coat"), 40) == math.inf  # which diverged before
    assert again.loss(Candidate(1e-4, 4, "coat"), 40) is None and again.steps(Candidate(1, 1, "none")) == 0


def test_a_journal_of_another_search_is_refused_by_name(tmp_path):
    filled(tmp_path).save()
    with pytest.raises(
        ConfigError, match="another ranks: set it back, remove .* or give this one another name"
    ):
        journal(tmp_path, ranks=[4, 8])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "x"}', '{"format": "ppcoat-tune-1", "settings": {}}']
)
def test_a_damaged_journal_is_named(tmp_path, text):
    (tmp_path / "journal.json").write_text(text)
    with pytest.raises(ConfigError, match=r"journal.json cannot be read .*remove .* to start over"):
        journal(tmp_path)


def test_the_table_shows_who_came_how_far(tmp_path):
    assert table(OWN, OWN, filled(tmp_path)) == [
        "        lr  rank     20 steps     40 steps",
        "     0.001    16      0.33333      0.25000  <- best  (as in the config)",
        "    0.0001     4      0.50000            -",
        "      0.01     8     diverged            -",
    ]
