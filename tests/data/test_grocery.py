import hashlib
import http.server
import io
import shutil
import stat
import subprocess
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hamlet import paths
from hamlet.data import DataError, grocery, load_dataset
from hamlet.data.dataset import content_hash
from hamlet.data.decode import decode

CLASSES = [("Red-Apple", "Apple", 0), ("Green-Apple", "Apple", 0), ("Banana", "Banana", 1)]


@pytest.fixture
def miniature(tmp_path, picture):
    """A data set in the published layout: 3 classes, 3 training, 2 validation and 4 test images of each."""
    top = tmp_path / "made" / "dataset"
    lists = {"train": 3, "val": 2, "test": 4}
    table = ["Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic,Description"]
    for label, (name, coarse, coarse_label) in enumerate(CLASSES):
        inner = f"iconic-images-and-descriptions/Fruit/{coarse}/{name}/{name}"
        table.append(f"{name},{label},{coarse},{coarse_label},/{inner}_Iconic.jpg,/{inner}_Description.txt")
        picture(top / f"{inner}_Iconic.jpg", label)
        (top / f"{inner}_Description.txt").write_text(f"\ufeffA {name}\nto eat. ", encoding="utf-8")
        for split, count in lists.items():
            for i in range(count):
                path = f"{split}/Fruit/{coarse}/{name}/{name}_{i:03d}.jpg"
                picture(top / path, 100 * label + 10 * count + i)
                with (top / f"{split}.txt").open("a") as out:
                    out.write(f"{path}, {label}, {coarse_label}\n")
    (top / "classes.csv").write_text("\r\n".join(table) + "\r\n")
    return top


def load(root, **options):
    return load_dataset("grocery", root=root, size=8, **{"verify": False, "download": False, **options})


def pin(monkeypatch, folder: Path, tmp_path: Path) -> None:
    """Make ``folder`` the published content, by the definition in the docstrings and not by the code."""
    files = grocery.read_rows(folder)[3]
    digest = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
    lines = "\n".join(sorted(f"{file}\0{digest[file]}" for file in files))
    monkeypatch.setattr(grocery, "CONTENT_SHA256", hashlib.sha256(lines.encode()).hexdigest())
    (tmp_path / "digests.txt").write_text("\n".join(digest[file][:16] for file in files))
    monkeypatch.setattr(grocery, "DIGESTS", tmp_path / "digests.txt")


def test_miniature_is_read_as_published(miniature):
    data = load(miniature)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 9, "validation": 6, "query": 12, "iconic": 3}
    assert data.class_names == ["Red-Apple", "Green-Apple", "Banana"] and data.coarse_names == ["Apple", "Banana"]
    assert data.query.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.query.coarse_labels.tolist() == [0] * 8 + [1] * 4
    assert data.train.captions[8] == "A Banana to eat." and data.gallery is None
    for split in data.splits.values():
        expected = np.stack([decode(miniature / path, 8) for path in split.paths])
        assert np.array_equal(split.images, expected)
    iconic = data.protocols["iconic"]
    assert (iconic.query, iconic.gallery) == ("iconic", "query")
    assert [len(load(miniature, limit=2).splits[s]) for s in data.splits] == [6, 6, 6, 3]


@pytest.mark.parametrize("inner", ["dataset", "GroceryStoreDataset/dataset", "downloads/GroceryStoreDataset/dataset"])
def test_found_in_the_folder_its_parent_or_the_downloads(miniature, tmp_path, inner):
    home = tmp_path / "home"
    (home / inner).parent.mkdir(parents=True)
    miniature.rename(home / inner)
    assert grocery.find(home) == (home / inner).resolve()
    assert grocery.find(home / inner) == (home / inner).resolve()


def test_a_differing_file_is_named_and_verify_false_is_the_way_out(miniature, tmp_path, monkeypatch, picture):
    pin(monkeypatch, miniature, tmp_path)
    before = load(miniature, verify=True)
    changed = picture(miniature / before.query.paths[5], 12345).relative_to(miniature)
    with pytest.raises(DataError, match=rf"in 1 file\(s\): {changed}\. .*verify=False"):
        load(miniature, verify=True)
    assert load(miniature).content_hash != before.content_hash
    with (miniature / "train.txt").open("a") as out:
        out.write(f"{before.query.paths[0]}, 0, 0\n")
    with pytest.raises(DataError, match=r"in 1 file\(s\): train\.txt\. "):
        load(miniature, verify=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.txt", ", 0, 0", "; 0; 0", r"train\.txt, line 1: expected 'path, label, coarse label'"),
        ("val.txt", ", 2, 1", ", 3, 1", r"val\.txt, line 5: expected"),
        ("test.txt", ", 2, 1", ", 2, 0", r"test\.txt, line 9: coarse label 0 contradicts"),
        ("test.txt", "Banana_000", "Banana_900", r"1 listed file\(s\) are not below .*Banana_900"),
        ("classes.csv", "Banana,2", "Banana,7", r"classes\.csv: expected six columns and class ids"),
        ("classes.csv", "Banana,2,Banana,1", "Banana,2,Banana,4", r"coarse ids must be"),
    ],
)
def test_faults_in_the_lists_name_file_and_line(miniature, file, old, new, message):
    text = (miniature / file).read_text()
    assert old in text
    (miniature / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        load(miniature)


def test_a_broken_image_is_an_error_that_names_it(miniature):
    path = "test/Fruit/Banana/Banana/Banana_002.jpg"
    (miniature / path).write_bytes((miniature / path).read_bytes()[:200])
    with pytest.raises(DataError, match=f"1 image.*{path}"):
        load(miniature)


# --- fetching, from a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, served, *args):
        self.served = served
        super().__init__(*args)

    def do_GET(self):
        self.served["asked"].append(self.path)
        body, announced = self.served["body"], self.served["announced"]
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(announced if announced is not None else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    served = {"body": b"", "announced": None, "asked": []}
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, served))
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    yield served, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def zipped(folder: Path, extra: tuple[tuple[zipfile.ZipInfo, bytes], ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, f"GroceryStoreDataset-{grocery.COMMIT}/dataset/{path.relative_to(folder)}")
        out.writestr(f"GroceryStoreDataset-{grocery.COMMIT}/sample_images/x.jpg", b"not wanted")
        for info, content in extra:
            out.writestr(info, content)
    return buffer.getvalue()


def leftovers(home: Path) -> list[str]:
    return sorted(p.name for p in (home / "downloads").iterdir() if p.name != ".grocery.lock")


def fetch(home, source, **options):
    home.mkdir(exist_ok=True)
    return load(home, download=True, verify=True, source=source, **options)


def test_fetched_verified_and_not_fetched_again(miniature, tmp_path, monkeypatch, server):
    served, source = server
    pin(monkeypatch, miniature, tmp_path)
    served["body"] = zipped(miniature)
    data = fetch(tmp_path / "home", source)
    assert served["asked"] == [f"/marcusklasson/GroceryStoreDataset/archive/{grocery.COMMIT}.zip"]
    assert data.content_hash == load(miniature).content_hash
    assert leftovers(tmp_path / "home") == ["GroceryStoreDataset"]
    assert sorted(p.name for p in (tmp_path / "home/downloads/GroceryStoreDataset").iterdir()) == ["dataset"]
    fetch(tmp_path / "home", source)
    assert len(served["asked"]) == 1


def test_broken_off_download_leaves_nothing_and_the_next_one_succeeds(miniature, tmp_path, monkeypatch, server):
    served, source = server
    pin(monkeypatch, miniature, tmp_path)
    whole = zipped(miniature)
    served.update(body=whole[: len(whole) // 2], announced=len(whole))
    with pytest.raises(DataError, match=r"fetching failed .*git clone"):
        fetch(tmp_path / "home", source)
    assert leftovers(tmp_path / "home") == []
    served.update(body=whole[: len(whole) // 2], announced=None)  # cut, and the length does not tell
    with pytest.raises(DataError, match="no sound zip archive"):
        fetch(tmp_path / "home", source)
    assert leftovers(tmp_path / "home") == []
    served.update(body=whole)
    assert len(fetch(tmp_path / "home", source).train) == 9


def test_wrong_content_is_refused_and_removed(miniature, tmp_path, monkeypatch, server, picture):
    served, source = server
    pin(monkeypatch, miniature, tmp_path)
    picture(miniature / "train/Fruit/Banana/Banana/Banana_001.jpg", 4242)
    served["body"] = zipped(miniature)
    with pytest.raises(DataError, match=r"differs from the published one.*Banana_001"):
        fetch(tmp_path / "home", source)
    assert leftovers(tmp_path / "home") == []


def test_offline_says_how_to_place_the_data_by_hand(tmp_path, server):
    _, source = server
    for options in ({"download": True, "source": source}, {"download": False}):  # the server answers 404
        with pytest.raises(DataError, match=r"git checkout fc80ba90f803d79d.*HAMLET_DATA") as error:
            load(tmp_path, **options)
        assert str(tmp_path) in str(error.value)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("name", ["../evil", "dataset/../../../evil", "/evil", "dataset/..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_escapes_an_archive(miniature, tmp_path, monkeypatch, server, name, kind):
    served, source = server
    pin(monkeypatch, miniature, tmp_path)
    for member in (name, f"GroceryStoreDataset-{grocery.COMMIT}/dataset/{name}"):
        served["body"] = zipped(miniature, ((link(member) if kind == "link" else zipfile.ZipInfo(member), b"/etc"),))
        before = sorted(p for p in tmp_path.rglob("*") if "home" not in p.parts)
        data = fetch(tmp_path / "home", source)
        assert sorted(p for p in tmp_path.rglob("*") if "home" not in p.parts) == before
        assert leftovers(tmp_path / "home") == ["GroceryStoreDataset"] and len(data.train) == 9
        assert not any(p.is_symlink() for p in (tmp_path / "home").rglob("*"))
        shutil.rmtree(tmp_path / "home")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_damaged_compression_is_one_line(miniature, tmp_path, server, method):
    served, source = server
    buffer, name = io.BytesIO(), f"GroceryStoreDataset-{grocery.COMMIT}/dataset/classes.csv"
    with zipfile.ZipFile(buffer, "w", method) as out:
        out.writestr(name, bytes(range(256)) * 40)
    raw = bytearray(buffer.getvalue())
    raw[30 + len(name) + 8 : 30 + len(name) + 24] = bytes(range(100, 116))
    served["body"] = bytes(raw)
    with pytest.raises(DataError, match=r"no sound zip archive|fetching failed") as error:
        fetch(tmp_path / "home", source)
    assert "\n" not in str(error.value) and leftovers(tmp_path / "home") == []


def test_remains_of_a_killed_fetch_are_swept(miniature, tmp_path, monkeypatch, server):
    served, source = server
    pin(monkeypatch, miniature, tmp_path)
    served["body"] = zipped(miniature)
    (tmp_path / "home/downloads/.grocery-abc").mkdir(parents=True)
    fetch(tmp_path / "home", source)
    assert leftovers(tmp_path / "home") == ["GroceryStoreDataset"]


def test_digests_file_agrees_with_the_pinned_number_of_files():
    lines = grocery.DIGESTS.read_text().split()
    assert len(lines) == 4 + 2640 + 296 + 2485 + 81 + 81 and {len(line) for line in lines} == {16}


# --- the published data


@pytest.fixture
def published():
    folder = grocery.find()
    if folder is None:
        places = ", ".join(map(str, paths.data_roots()))
        pytest.skip(f"the Grocery Store Dataset is in none of {places}; see data/grocery/README.md")
    return folder


@pytest.mark.grocery
def test_published_lists_counts_and_coarse_classes(published):
    rows, classes, coarse, files = grocery.read_rows(published)
    counts = rows.split.value_counts().to_dict()
    assert counts == {"train": 2640, "validation": 296, "query": 2485, "iconic": 81}
    assert len(classes) == 81 and rows.label.nunique() == 81 and len(files) == 5587
    assert len(coarse) == 43  # the publication says 42
    assert rows[rows.split == "validation"].label.nunique() < 81
    assert rows.caption.nunique() == 81 and rows.path.nunique() == 5502


@pytest.mark.grocery
def test_published_content_is_the_pinned_one(published):
    """Hashed by coreutils' sha256sum, not by the package."""
    rows, _, _, files = grocery.read_rows(published)
    told = subprocess.run(["sha256sum", *files], cwd=published, capture_output=True, text=True, check=True).stdout
    digests = [line.split()[0] for line in told.splitlines()]
    lines = sorted(f"{file}\0{digest}" for file, digest in zip(files, digests, strict=True))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == grocery.CONTENT_SHA256
    assert [digest[:16] for digest in digests] == grocery.DIGESTS.read_text().split()
    known = dict(zip(files, digests, strict=True))
    pinned = "01626e6a83629c15b20a12c175f0e53f296ec51cb1533a751d71b1b4015a5c5b"  # as results record it
    assert content_hash(rows.assign(digest=rows.path.map(known))) == pinned


@pytest.mark.grocery
def test_published_data_load_small(published):
    data = load_dataset("grocery", size=16, limit=1)
    assert len(data.query) == 81 and len(data.splits["iconic"]) == 81 and data.train.images.shape[1:] == (16, 16, 3)
    assert "Golden Delicious" in data.query.captions[0] and data.class_names[0] == "Golden-Delicious"


# --- classes never seen in training


def test_halves_by_hand():
    """Coarse class 1 has five classes, 3 has two; 0, 2 and 4 have one: in a row, 1 2 3 4 5, 7 8, 0 6 9."""
    part = grocery.halves([0, 1, 1, 1, 1, 1, 2, 3, 3, 4])
    expected = {"train": [1, 3, 6, 8], "validation": [5], "query": [0, 2, 4, 7, 9]}
    assert {name: [i for i in range(10) if part[i] == name] for name in expected} == expected


@pytest.mark.grocery
def test_published_classes_are_halved_within_their_coarse_class(published):
    data = load_dataset("grocery_unseen", size=8)
    pinned = "e45ca39400cc0b5f639271f92c75ec869845e60f05914cc5870b38699ab0ab5d"  # as results record it
    assert data.content_hash == pinned
    classes = {name: set(split.labels.tolist()) for name, split in data.splits.items()}
    assert classes["query"] == classes["iconic"]
    assert (
        sum(len(classes[s]) for s in ("train", "validation", "query"))
        == 81
        == len(classes["train"] | classes["validation"] | classes["query"])
    )
    assert len(data.train) + len(data.validation) + len(data.query) == 2640 + 296 + 2485
    coarse = {int(a): int(b) for s in data.splits.values() for a, b in zip(s.labels, s.coarse_labels, strict=True)}
    for kind in range(43):
        here = [label for label in coarse if coarse[label] == kind]
        assert abs(2 * len([x for x in here if x in classes["query"]]) - len(here)) <= 1
    alone = [label for label in coarse if list(coarse.values()).count(coarse[label]) == 1]
    assert len([x for x in alone if x in classes["query"]]) in (len(alone) // 2, len(alone) - len(alone) // 2)
    for split in data.splits.values():
        assert min(np.bincount(split.labels)[sorted(set(split.labels))]) >= (1 if split.name == "iconic" else 2)
