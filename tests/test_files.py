"""Files are whole or not there."""

import pytest

from nbtune import _files


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    _files.write_text(path, "old")
    with pytest.raises(TypeError):
        _files.write_bytes(path, 3)  # pyright: ignore[reportArgumentType]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "made"
    with pytest.raises(ZeroDivisionError), _files.atomic_folder(path) as folder:
        (folder / "x").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with _files.atomic_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError), _files.atomic_folder(tmp_path / "there"):
        pass
