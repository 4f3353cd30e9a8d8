"""Files are whole or absent, and two writers do not take the same name."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import envs
from tdmpc2_support.files import new_file, write_atomically


def test_a_file_is_replaced_whole_with_the_permissions_of_any_new_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "α")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.json", "plain"]


def test_what_an_exception_stops_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_appears_meanwhile_is_not_overwritten_if_that_was_asked(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileExistsError), new_file(path, overwrite=False) as temporary:
        temporary.write_text("mine")
        path.write_text("another's")
    assert path.read_text() == "another's"
    assert os.listdir(tmp_path) == ["a.json"]


def test_writers_at_the_same_time_take_numbers_of_their_own(tmp_path):
    def write(number):
        writer = envs.EpisodeWriter(tmp_path, "mw-reach", 1)
        for step in range(101):
            writer.add(np.full((1, 39), number), np.zeros((1, 4)), np.ones(1), np.array([step == 0]))
        writer.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(32)))
    names = {path.name for path in (tmp_path / "mw-reach").iterdir()}
    assert names == {f"chunk_{i}.pt" for i in range(32)}
    data = envs.load_dataset(["mw-reach"], tmp_path)
    data.check_files()
    written = data.read(0, data.num_entries)["obs"][::101, 0]
    assert sorted(written.tolist()) == list(range(32)), "no episodes are lost or written twice"
