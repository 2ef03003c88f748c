import os

import pytest

from llama_bidir.utils.outputs import check_apart, whole_folder


def test_appears_whole(tmp_path):
    with whole_folder(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_nothing_is_left_of_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    folder = whole_folder(tmp_path / "out", overwrite=True)
    (folder.__enter__() / "file").write_text("x")
    assert not folder.__exit__(RuntimeError, RuntimeError(), None)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_what_appears_meanwhile_is_kept(tmp_path):
    folder = whole_folder(tmp_path / "out")
    folder.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("other")
    with pytest.raises(FileExistsError, match="exists"):
        folder.__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "other").read_text() == "other"


def test_replaces_only_when_told(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="exists"), whole_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    with whole_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
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
    with whole_folder(out, overwrite=True, marker="config.json") as folder:
        (folder / "new").write_text("")
    assert os.listdir(out) == ["new"]


def test_an_output_is_no_input_and_no_other_output(tmp_path):
    (tmp_path / "a").write_text("")
    check_apart({"corpus": tmp_path / "a", "run": None}, {"output": tmp_path / "b", "write_run": None})
    with pytest.raises(ValueError, match=r"output and corpus must be two files, got '.*a' for both"):
        check_apart({"corpus": tmp_path / "a"}, {"output": f"{tmp_path}/x/../a"})
    with pytest.raises(ValueError, match="output and write_run must be two files"):
        check_apart({}, {"write_run": "b", "output": "./b"})
