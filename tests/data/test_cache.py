import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from hamlet import paths
from hamlet.data import cache, decode

KEY = "ab" * 32


def _folder() -> Path:
    return paths.cache_dir() / "images"


def _rows(count=4, size=8):
    return [np.full((size, size, 3), i, np.uint8) for i in range(count)]


def test_decode_all_names_every_broken_file(tmp_path, picture):
    for i in range(3):
        picture(tmp_path / f"{i}.jpg", i, (64, 64))
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.jpg").write_bytes(b"")
    with pytest.raises(
        cache.BrokenImagesError, match=r"2 image.*1\.jpg \(Truncated.*2\.jpg \(not an image"
    ) as error:
        list(cache.decode_all("x", tmp_path, ["0.jpg", "1.jpg", "2.jpg"], 8))
    assert set(error.value.reasons) == {"1.jpg", "2.jpg"} and str(tmp_path) not in str(error.value)


def test_cached_returns_the_rows_read_only_and_builds_once():
    images, pixels = cache.cached("x", KEY, 4, 8, _rows)
    assert isinstance(images, np.memmap) and np.array_equal(images, np.stack(_rows()))
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 1
    again, same = cache.cached("x", KEY, 4, 8, lambda: pytest.fail("built twice"))
    assert np.array_equal(images, again) and pixels == same


def test_failed_builds_leave_nothing_visible():
    def fails():
        yield from _rows(2)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        cache.cached("x", KEY, 4, 8, fails)
    with pytest.raises(cache.DataError, match="3 images made, 4 expected"):
        cache.cached("x", KEY, 4, 8, lambda: _rows(3))
    with pytest.raises(cache.DataError, match="image 0"):
        cache.cached("x", KEY, 4, 8, lambda: _rows(4, 9))
    assert not [p for p in _folder().iterdir() if p.suffix != ".lock"]


def _build_slowly(home: str, log: str) -> None:
    os.environ["HAMLET_CACHE"] = home

    def rows():
        with open(log, "a") as out:
            out.write("built\n")
        for row in _rows():
            time.sleep(0.1)
            yield row

    images, _ = cache.cached("x", KEY, 4, 8, rows)
    assert np.array_equal(images, np.stack(_rows()))


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (str(paths.cache_dir()), str(tmp_path / "log"))
    workers = [context.Process(target=_build_slowly, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def _build_until_killed(home: str) -> None:
    os.environ["HAMLET_CACHE"] = home

    def rows():
        yield from _rows(2)
        time.sleep(60)

    cache.cached("x", KEY, 4, 8, rows)


def test_kill_leaves_nothing_visible_and_its_remains_are_swept():
    worker = multiprocessing.get_context("fork").Process(
        target=_build_until_killed, args=(str(paths.cache_dir()),)
    )
    worker.start()
    deadline = time.monotonic() + 20
    while not list(_folder().glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(_folder().glob("*.partial")) and not list(_folder().glob("*.npy"))
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    assert list(_folder().glob("*.partial"))
    other, _ = cache.cached("y", KEY, 4, 8, _rows)  # a build of something else sweeps too
    assert not list(_folder().glob("*.partial")) and np.array_equal(other, np.stack(_rows()))
    assert np.array_equal(cache.cached("x", KEY, 4, 8, _rows)[0], other)


def test_sweep_spares_a_living_writer():
    _folder().mkdir(parents=True)
    partial = _folder() / "alive-8-aa.partial"
    partial.write_bytes(b"in work")
    with FileLock(partial.with_suffix(".lock")):
        cache.cached("x", KEY, 4, 8, _rows)
        assert partial.exists()


def test_a_changed_file_and_another_order_and_another_size_have_their_own_cache(tmp_path, picture):
    files = ["a.png", "b.png"]
    for i, file in enumerate(files):
        picture(tmp_path / file, i)

    def load(order, size=8):
        return cache.decoded("x", tmp_path, order, cache.FileRecord(tmp_path).hashes(order), size)

    first = np.array(load(files))
    assert np.array_equal(load(files[::-1]), first[::-1])
    assert load(files, 12).shape == (2, 12, 12, 3)
    picture(tmp_path / "b.png", 7)
    changed = load(files)
    assert np.array_equal(changed[0], first[0]) and not np.array_equal(changed[1], first[1])
    assert np.array_equal(changed[1], decode.decode(tmp_path / "b.png", 8))


def test_record_reads_unchanged_files_once_and_changed_ones_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RACY_NS", -(10**12))  # remember at once
    (tmp_path / "a").write_bytes(b"one")
    record = cache.FileRecord(tmp_path)
    first = record.hashes(["a"])
    assert first == ["7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"]  # sha256 of "one"
    stored = json.loads(record.path.read_text())
    stored["files"]["a"][3] = "remembered"
    record.path.write_text(json.dumps(stored))
    assert record.hashes(["a"]) == ["remembered"]
    stamp = (tmp_path / "a").stat()
    (tmp_path / "a").write_bytes(b"two")
    os.utime(tmp_path / "a", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same mtime
    assert record.hashes(["a"]) != ["remembered"] and record.hashes(["a"]) != first
    record.path.write_text("{ damaged")
    assert len(record.hashes(["a"])[0]) == 64


def test_record_does_not_remember_a_file_touched_just_now(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    record = cache.FileRecord(tmp_path)
    record.hashes(["a"])
    assert not record.path.exists()
