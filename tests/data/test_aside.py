"""A folder that is written aside goes with its call, or with the next one after a kill, and never while another process uses it."""

from mhc_jax.files.aside import EXTRA, aside


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
    others = [
        ".a.000000.12345678.tmp",
        ".a.12345678",
        ".a.backup",
        ".ab.12345678.tmp",
    ]  # the first is that of another host
    for name in others:
        (tmp_path / name).mkdir()
    with aside(tmp_path, "a") as folder:
        assert len(folder.name) == len("a") + EXTRA
        ours = folder.name
    (tmp_path / ours).mkdir()  # a kill leaves such a folder, and its lock ends with the process
    (tmp_path / ours / "half").touch()
    with aside(tmp_path, "a") as first:
        with aside(tmp_path, "a") as second:
            assert first.exists()
            assert first != second
        assert first.exists()
        assert ours not in left(tmp_path)
    assert left(tmp_path) == others
