import os

import pytest

from llama_bidir.utils.outputs import check_apart, check_free, whole_folder, write_whole


def make_folder(path, during=lambda: None, **options):
    """Makes `path` with one file, and calls `during` before the block ends."""
    with whole_folder(path, **options) as folder:
        (folder / "new").write_text("new")
        during()


def make_old(folder):
    folder.mkdir()
    (folder / "old").write_text("old")


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failed_block_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("the disk is full")

    make_old(tmp_path / "out")
    with pytest.raises(RuntimeError, match="the disk is full"):
        make_folder(tmp_path / "out", fail, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_a_folder_that_appears_during_the_block_is_kept(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        make_folder(tmp_path / "out", lambda: make_old(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


def test_a_folder_is_replaced_only_with_overwrite(tmp_path):
    make_old(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"exists: pass overwrite \(--overwrite\) to replace it"):
        make_folder(tmp_path / "out", lambda: pytest.fail("the block must not run"))
    make_folder(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_a_folder_that_is_read_or_holds_something_else_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    (out / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="lies in the output"):
        whole_folder(out, overwrite=True, keep=str(out / "adapter")).__enter__()
    with pytest.raises(FileExistsError, match=r"it has no config\.json"):
        whole_folder(out, overwrite=True, marker="config.json").__enter__()
    (out / "config.json").write_text("{}")
    make_folder(out, overwrite=True, marker="config.json")
    assert os.listdir(out) == ["new"]


def test_a_file_never_replaces_a_folder(tmp_path):
    with pytest.raises(FileExistsError, match="is a folder: name a file"):
        check_free(tmp_path, overwrite=True, is_file=True)
    check_free(tmp_path / "run.trec", overwrite=False, is_file=True)


def test_an_output_is_neither_an_input_nor_another_output(tmp_path):
    (tmp_path / "a").write_text("")
    check_apart({"corpus": tmp_path / "a", "run": None}, {"output": tmp_path / "b", "write_run": None})
    with pytest.raises(ValueError, match=r"output and corpus must be two files, got '.*a' for both"):
        check_apart({"corpus": tmp_path / "a"}, {"output": f"{tmp_path}/x/../a"})
    with pytest.raises(ValueError, match="output and write_run must be two files"):
        check_apart({}, {"write_run": "b", "output": "./b"})


def test_a_file_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "former")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "former"
