"""Files that are written whole or not at all."""

import os
import threading

import pytest

from psbn_mmdet.errors import PsbnError, errors_in_one_line, written_whole


def test_a_link_stays_a_link_to_the_new_content(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with written_whole(tmp_path / "link") as part:
        part.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_a_pipe_is_written_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    with written_whole(pipe) as part:
        part.write_text("new")
    reader.join(10)
    assert got == ["new"] and pipe.is_fifo()


@pytest.mark.parametrize("name", ["file/a", "a" * 250, "none/a"])
def test_what_cannot_be_written_is_one_line(name, tmp_path):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(PsbnError, match="cannot be written"),
        written_whole(tmp_path / name) as part,
    ):
        part.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_writer_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), written_whole(tmp_path / "file") as part:
        part.write_text({}["half"])
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(mode, tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(mode)
    with written_whole(tmp_path / "file") as part:
        part.write_text("new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("said", ["", "Unable to allocate 9 TiB\nfor an array"])
def test_too_little_memory_is_one_line(said, capsys):
    with pytest.raises(SystemExit, match="2"), errors_in_one_line("tool.py"):
        raise MemoryError(said)
    expected = said.splitlines()[0] if said else "what is read does not fit"
    assert capsys.readouterr().err == f"tool.py: out of memory: {expected}\n"
