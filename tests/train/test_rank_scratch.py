"""The folder between ranks: the same for all, never an old one, gone afterwards."""

import pytest

from ppcoat.errors import ConfigError
from ppcoat.train.ranks import Ranks, rank_scratch

LEFT = "handover-0123456789abc"  # by a killed run


def hear(receivers):
    return [receiver.recv() for receiver in receivers if receiver.poll(20)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def hand_over(ranks, tell, parent):
    """Rank 0 writes, rank 1 reads, and looks again before rank 0 can have left."""
    with rank_scratch(parent, ranks) as folder, ranks.first_ahead():
        if ranks.is_first:
            folder.mkdir(parents=True)
            (folder / "a").write_text("of rank 0")
        found = sorted(path.read_text() for path in folder.glob("*"))
    tell((folder.name, found))
    ranks.close()


def test_all_ranks_see_one_new_folder_and_nothing_is_left(start, tmp_path):
    (tmp_path / LEFT / "deep").mkdir(parents=True)
    for stranger in ("handover-mine", "checkpoints"):
        (tmp_path / stranger).mkdir()
    _, heard = start(lambda ranks, tell: hand_over(ranks, tell, tmp_path))
    (first, of_first), (second, of_second) = hear(heard)
    assert first == second != LEFT
    assert of_first == of_second == ["of rank 0"]
    assert names(tmp_path) == ["checkpoints", "handover-mine"]


def test_machines_that_share_no_disk_see_nothing_of_each_other_and_are_cleaned_as_well(start, tmp_path):
    for rank in "01":
        (tmp_path / rank / LEFT).mkdir(parents=True)

    def work(ranks, tell):
        with rank_scratch(tmp_path / str(ranks.rank), ranks) as folder:
            before = folder.exists()
            folder.mkdir()
        tell(before)
        ranks.close()

    _, heard = start(work)
    assert hear(heard) == [False, False]
    assert names(tmp_path / "0") == names(tmp_path / "1") == []


def test_one_rank_needs_none_but_removes_what_was_left(tmp_path):
    (tmp_path / LEFT).mkdir()
    with rank_scratch(tmp_path, Ranks()) as folder:
        assert folder is None and names(tmp_path) == []
    with rank_scratch(tmp_path / "not_there", Ranks()):
        assert not (tmp_path / "not_there").exists()


def test_an_error_within_it_leaves_nothing(start, tmp_path):
    def work(ranks, tell):
        with pytest.raises(ConfigError), rank_scratch(tmp_path, ranks) as folder:
            folder.mkdir(exist_ok=True)
            raise ConfigError("a picture cannot be read")
        tell("left")
        ranks.close()

    _, heard = start(work)
    assert hear(heard) == ["left", "left"]
    assert names(tmp_path) == []
