"""A folder that is written aside goes with its call, or with the next one after a kill, and never while another process uses it."""

from mhc_jax.data.aside import aside


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_is_moved_stays_and_one_that_is_not_goes(tmp_path):
    with aside(tmp_path, "a") as folder:
        (folder / "x").touch()
        folder.rename(tmp_path / "a")
    with aside(tmp_path, "b"):
        pass
    assert left(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").exists()


def test_what_a_kill_leaves_goes_at_the_next_call_and_nothing_else(tmp_path):
    for name in (".a.backup", ".a.12345678", ".ab.12345678.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.abcd_123.tmp").mkdir()  # a kill leaves such a folder, and its lock ends with the process
    (tmp_path / ".a.abcd_123.tmp" / "half").touch()
    with aside(tmp_path, "a") as first:
        with aside(tmp_path, "a") as second:
            assert first.exists()
            assert first != second
        assert first.exists()
        assert ".a.abcd_123.tmp" not in left(tmp_path)
    assert left(tmp_path) == [".a.12345678", ".a.backup", ".ab.12345678.tmp"]
