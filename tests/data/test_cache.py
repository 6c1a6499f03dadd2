import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from hamlet import paths
from hamlet.data import cache
from hamlet.errors import HamletError

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
    with pytest.raises(cache.DataError, match=r"2 image.*1\.jpg \(Truncated.*2\.jpg \(not an image") as error:
        list(cache.decode_all("x", tmp_path, ["0.jpg", "1.jpg", "2.jpg"], 8))
    assert "0.jpg" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_cached_returns_the_rows_read_only_and_builds_once():
    images, pixels = cache.cached("x", KEY, 4, 8, _rows())
    assert isinstance(images, np.memmap) and np.array_equal(images, np.stack(_rows()))
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 1
    again, same = cache.cached("x", KEY, 4, 8, (pytest.fail("built twice") for _ in range(1)))
    assert np.array_equal(images, again) and pixels == same


def test_failed_builds_leave_nothing_visible():
    def fails():
        yield from _rows(2)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        cache.cached("x", KEY, 4, 8, fails())
    with pytest.raises(cache.DataError, match="3 images made, 4 expected"):
        cache.cached("x", KEY, 4, 8, _rows(3))
    with pytest.raises(cache.DataError, match="image 0"):
        cache.cached("x", KEY, 4, 8, _rows(4, 9))
    assert not [p for p in _folder().iterdir() if p.suffix != ".lock"]


def _build_slowly(home: str, log: str) -> None:
    os.environ["HAMLET_CACHE"] = home

    def rows():
        with open(log, "a") as out:
            out.write("built\n")
        for row in _rows():
            time.sleep(0.1)
            yield row

    images, _ = cache.cached("x", KEY, 4, 8, rows())
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

    cache.cached("x", KEY, 4, 8, rows())


def _remains() -> list[Path]:
    return list(_folder().glob(".*.partial.npy"))


def test_kill_leaves_nothing_visible_and_its_remains_are_swept():
    worker = multiprocessing.get_context("fork").Process(target=_build_until_killed, args=(str(paths.cache_dir()),))
    worker.start()
    deadline = time.monotonic() + 20
    while not _remains() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _remains() and not list(_folder().glob("x*.npy"))
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(20)
    assert _remains()
    other, _ = cache.cached("y", KEY, 4, 8, _rows())  # a build of something else sweeps too
    assert not _remains() and np.array_equal(other, np.stack(_rows()))
    assert np.array_equal(cache.cached("x", KEY, 4, 8, _rows())[0], other)


def test_sweep_spares_a_living_writer():
    _folder().mkdir(parents=True)
    partial = _folder() / ".alive-1.2-8-aa.99.partial.npy"
    partial.write_bytes(b"in work")
    with FileLock(_folder() / "alive-1.2-8-aa.lock"):
        cache.cached("x", KEY, 4, 8, _rows())
        assert partial.exists()
    cache.cached("y", KEY, 4, 8, _rows())
    assert not partial.exists()


def test_a_folder_in_the_place_of_an_array_is_named():
    (_folder() / f"x-8-{KEY[:24]}.npy").mkdir(parents=True)
    with pytest.raises(HamletError, match=r"\.npy is a folder where a file is to be written"):
        cache.cached("x", KEY, 4, 8, _rows())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "record", "no record", "another shape"])
def test_damaged_arrays_are_made_again(damage, monkeypatch):
    images, pixels = cache.cached("x", KEY, 4, 8, _rows())
    array, wanted = next(_folder().glob("*.npy")), np.array(images)
    raw, record = array.read_bytes(), array.with_suffix(".json")
    if damage == "flipped":
        array.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    elif damage in ("truncated", "empty"):
        array.write_bytes(raw[:-5] if damage == "truncated" else b"")
    elif damage == "record":
        record.write_text("[")
    elif damage == "no record":
        record.unlink()
    else:
        np.save(array, np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.warns(UserWarning, match="was damaged; its images are made again"):
        again, same = cache.cached("x", KEY, 4, 8, _rows())
    assert np.array_equal(again, wanted) and same == pixels


def test_an_array_is_hashed_once_per_process(monkeypatch):
    cache.cached("x", KEY, 4, 8, _rows())
    hashed = []
    monkeypatch.setattr(cache.hashlib, "sha256", lambda *a: hashed.append(1))
    cache.cached("x", KEY, 4, 8, _rows())
    assert not hashed


def test_record_reads_unchanged_files_once_and_changed_ones_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RACY_NS", -(10**12))  # remember at once
    (tmp_path / "a").write_bytes(b"one")
    record = cache.FileRecord(tmp_path)
    first = record.hashes(["a"])
    assert first == ["7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"]  # sha256 of "one"
    stored = json.loads(record.path.read_text())
    stored["files"]["a"][-1] = "remembered"
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


def test_record_sees_a_file_put_in_the_place_of_another(tmp_path, monkeypatch):
    """Size and times alike, as after a restore from a backup: another inode tells."""
    monkeypatch.setattr(cache, "RACY_NS", -(10**12))
    (tmp_path / "a").write_bytes(b"one")
    record = cache.FileRecord(tmp_path)
    first = record.hashes(["a"])
    stored = json.loads(record.path.read_text())
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "b").replace(tmp_path / "a")
    info = (tmp_path / "a").stat()
    stored["files"]["a"][1:3] = [info.st_mtime_ns, info.st_ctime_ns]
    record.path.write_text(json.dumps(stored))
    assert record.hashes(["a"]) != first


def test_a_content_that_decoded_once_is_not_tried_again(tmp_path, picture, monkeypatch):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    record = cache.FileRecord(tmp_path)
    files = ["a.png", "b.png"]
    assert record.faults(files, record.hashes(files)) == {"b.png": "not an image of a known format"}
    tried = []
    monkeypatch.setattr(cache, "decode_many", lambda sources, size: tried.extend(sources) or [])
    with pytest.raises(ValueError, match="zip"):
        record.faults(files, record.hashes(files))
    assert [path.name for path in tried] == ["b.png"]


def _build_on_a_full_disk(home: str, told) -> None:
    os.environ["HAMLET_CACHE"] = home
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # what writes more fails, as on a full disk
    try:
        cache.cached("x", KEY, 4, 8, iter(_rows()))
    except OSError as error:
        told.put(error.strerror)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing():
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    worker = context.Process(target=_build_on_a_full_disk, args=(str(paths.cache_dir()), told))
    worker.start()
    assert told.get(timeout=20) == "File too large"
    worker.join(20)
    assert not [p for p in _folder().iterdir() if p.suffix != ".lock"]
