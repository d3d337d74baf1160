"""A file is there whole or not at all; what is in LoRA files is in test_files.py and test_formats.py."""

import pytest

from ppcoat.lora.writing import whole_file


def test_a_file_takes_its_name_when_it_is_complete_and_all_may_read_it(tmp_path):
    path = tmp_path / "new" / "lora.safetensors"
    with whole_file(path) as draft:
        draft.write_bytes(b"all of it")
        draft.chmod(0o600)
        assert not path.exists() and draft.parent == path.parent and draft.name.startswith(".")
    assert path.read_bytes() == b"all of it" and path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_file_that_was_there(tmp_path, error):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), whole_file(path) as draft:
        draft.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
