"""From a folder of photos to an index and back to date: what is new, changed, gone, broken, stopped."""

import multiprocessing
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hamlet.errors import HamletError
from hamlet.search import Index
from hamlet.search import index as index_module

from .conftest import Colours, photo


class Counting(Colours):
    """Keeps how many photos it described; stops after ``most``."""

    def __init__(self, most: int = 10**9):
        self.seen, self.most = 0, most

    def encode(self, images, batch_size=32, progress=True):
        if self.seen + len(images) > self.most:
            raise KeyboardInterrupt
        self.seen += len(images)
        return super().encode(images, batch_size, progress)


def numbers(index: Index) -> tuple[int, int, int, int]:
    done = index.changes
    return done.new, done.changed, done.gone, len(done.left_out)


def test_each_photo_finds_itself_and_the_index_is_kept(photos, colours, tmp_path):
    made = Index.from_folder(photos, tmp_path / "index", colours, progress=False)
    assert numbers(made) == (12, 0, 0, 0) and made.kind == "flat" and "few enough" in made.about["why"]
    again = Index.load(tmp_path / "index")
    for file in sorted(photos.rglob("*.png")):
        assert again.query(colours.encode([file]), 1)["path"].tolist() == [str(file)]


def test_photos_are_described_folders_mixed_and_in_the_same_order_each_time(photos, colours, tmp_path):
    """An approximate kind learns from the first ones, which must not be of one folder."""
    orders = [[*Index.from_folder(photos, tmp_path / name, colours, progress=False).items] for name in "xy"]
    assert orders[0] == orders[1] != sorted(orders[0])
    assert len({name.split("/")[0] for name in orders[0][:6]}) == 2


def test_only_what_is_new_changed_or_gone_is_looked_at(photos, tmp_path):
    Index.from_folder(photos, tmp_path / "index", Colours(), progress=False)
    photo(photos / "b" / "new.png", 100)
    photo(photos / "a" / "00.png", 101)
    (photos / "a" / "01.png").unlink()
    (photos / "a" / "02.png").write_bytes(b"no photo any more")
    model = Counting()
    made = Index.from_folder(photos, tmp_path / "index", model, progress=False)
    assert numbers(made) == (1, 1, 1, 1) and model.seen == 1 + 2  # the probe, the new, the changed
    assert made.changes.left_out == [("a/02.png", "not an image of a known format")]
    assert {"a/01.png", "a/02.png"}.isdisjoint(Index.load(tmp_path / "index").items)
    assert made.query(model.encode([photos / "a" / "00.png"]), 1)["score"][0] > 0.999
    made.remove(photos / "a" / "00.png")
    assert made.update(model, progress=False) == index_module.Changes(
        1, 0, 0, [("a/02.png", "not an image of a known format")]
    )


def test_an_index_among_its_photos_is_none_of_them(photos, colours):
    for done in ((12, 0, 0, 0), (0, 0, 0, 0)):
        assert numbers(Index.from_folder(photos, photos / "my index", colours, progress=False)) == done
    (photos / "other").mkdir()
    found = Index.from_folder(photos, photos / "my index", colours, progress=False).changes.left_out
    assert found == [("other", "empty folder")]


def _update_as_nobody(index, found) -> None:
    os.setgid(65534)
    os.setuid(65534)
    changes = index.update(Colours(), progress=False)
    found.put((sorted(index.items), changes.gone, changes.left_out))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not read")
def test_photos_of_a_folder_that_cannot_be_read_stay_and_the_folder_is_named(photos, tmp_path):
    index = Index.from_folder(photos, model=Colours(), progress=False)
    for part in (photos, *photos.parents):
        if part.is_relative_to(tempfile.gettempdir()) and part != Path(tempfile.gettempdir()):
            part.chmod(part.stat().st_mode | 0o055)
    before = sorted(index.items)
    (photos / "b" / os.path.basename(before[-1])).unlink()
    (photos / "a").chmod(0)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    worker = context.Process(target=_update_as_nobody, args=(index, found))
    worker.start()
    assert found.get(timeout=20) == (before[:-1], 1, [("a", "unreadable folder: Permission denied")])
    worker.join(20)


def test_a_photo_behind_a_link_that_was_replaced_is_described_anew(photos, tmp_path):
    old, new = photo(tmp_path / "old.png", 50), photo(tmp_path / "new.png", 51)
    for file in (old, new):
        os.utime(file, (1, 1))
    link = photos / "link.png"
    link.symlink_to(old)
    Index.from_folder(photos, tmp_path / "index", Colours(), progress=False)
    shutil.copy2(new, tmp_path / "copy.png")
    os.replace(tmp_path / "copy.png", old)  # same name, same times, same length of a path; another photo
    made = Index.from_folder(photos, tmp_path / "index", Colours(), progress=False)
    assert numbers(made) == (0, 1, 0, 0)
    assert made.query(Colours().encode([new]), 1)["path"].tolist() == [str(link)]


def test_a_stopped_build_goes_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PART", 4)
    monkeypatch.setattr(index_module, "CHECKPOINT", 0.0)
    monkeypatch.setattr(index_module, "SAVING", 1e9)
    with pytest.raises(KeyboardInterrupt):
        Index.from_folder(photos, tmp_path / "index", Counting(most=1 + 8), progress=False)
    assert len(Index.load(tmp_path / "index")) == 8  # what is there answers already
    model = Counting()
    made = Index.from_folder(photos, tmp_path / "index", model, progress=False)
    assert len(made) == 12 and model.seen == 1 + 4


def build(root, folder) -> None:
    Index.from_folder(root, folder, Colours(), progress=False)


def test_two_builds_into_one_index_wait_for_each_other(photos, tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=build, args=(photos, tmp_path / "index")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and len(Index.load(tmp_path / "index")) == 12


def test_whatever_a_folder_holds_is_read_or_named(photos, tmp_path, colours):
    picture = Image.open(photos / "a" / "03.png").convert("RGB").resize((64, 64))
    for name in ("h.heic", "v.avif", "j.jfif", "p.ppm", "k.jp2"):
        picture.save(photos / name, **({"format": "JPEG"} if name.endswith("jfif") else {}))
    picture.save(os.fsencode(photos) + b"/odd-\xff.png")
    for hidden in (".thumbs", "@eaDir"):
        photo(photos / hidden / "x.png", 70)
    os.mkfifo(photos / "pipe.jpg")
    (photos / "notes.txt").write_text("mine")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    made = Index.from_folder(photos, tmp_path / "index", colours, progress=False)
    assert len(made) == 12 + 6
    assert {name for name, _ in made.changes.left_out} == {"pipe.jpg", "notes.txt", "broken.jpg"}
    again = Index.load(tmp_path / "index")
    assert os.fsdecode(b"odd-\xff.png") in again.items and not any("eaDir" in p or "thumbs" in p for p in again.items)
    assert again.photo(again.items[os.fsdecode(b"odd-\xff.png")][0]).is_file()


def test_folders_that_cannot_be_indexed_are_named(photos, tmp_path, colours):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HamletError, match=r"no photo below .*empty; name a folder"):
        Index.from_folder(tmp_path / "empty", None, colours)
    with pytest.raises(HamletError, match="cannot be read"):
        Index.from_folder(tmp_path / "nowhere", None, colours)
    Index.from_folder(photos, tmp_path / "index", colours, progress=False)
    photo(tmp_path / "others" / "x.png", 1)
    with pytest.raises(HamletError, match=f"this is the index of {re.escape(str(photos))}; choose another"):
        Index.from_folder(tmp_path / "others", tmp_path / "index", colours)
    assert len(Index.load(tmp_path / "index")) == 12


def test_photos_that_have_moved_keep_their_descriptors(photos, tmp_path):
    Index.from_folder(photos, tmp_path / "index", Colours(), progress=False)
    model, place = Counting(), photos.rename(tmp_path / "elsewhere")
    made = Index.from_folder(place, tmp_path / "index", model, progress=False)
    assert numbers(made) == (0, 0, 0, 0) and model.seen == 1
    assert all(path.startswith(str(place)) for path in made.query(np.ones(48), 12)["path"])


def test_another_model_describes_all_anew(photos, tmp_path):
    Index.from_folder(photos, tmp_path / "index", Colours(), progress=False)
    made = Index.from_folder(photos, tmp_path / "index", Counting(), progress=False)
    assert made.changes.new == 0  # the same descriptors: the same model

    class Other(Colours):
        def encode(self, images, batch_size=32, progress=True):
            return super().encode(images)[:, ::-1].copy()

    made = Index.from_folder(photos, tmp_path / "index", Other(), progress=False)
    assert made.changes.new == 12 == len(Index.load(tmp_path / "index"))
    shutil.copy(made.changes.set_aside, tmp_path / "index" / "index.safetensors")  # the one before was kept
    assert Index.from_folder(photos, tmp_path / "index", Counting(), progress=False).changes.new == 0
