"""``hamlet`` as a person uses it: the real packaged model, photos of real groceries where they are, else drawn ones."""

import csv
import io
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import hamlet
from hamlet import cli, paths

FOUND = [r / "GroceryStoreDataset/dataset/test" for r in paths.data_roots()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """<class>/<image>: four classes of six photos."""
    folder = tmp_path_factory.mktemp("photos")
    classes = next(
        ([r / "Fruit/Banana", r / "Fruit/Kiwi", r / "Fruit/Lemon", r / "Fruit/Pineapple"] for r in FOUND if r.is_dir()),
        None,
    )
    for c in range(4):
        for i in range(6):
            file = folder / f"class{c}" / f"{i}.jpg"
            file.parent.mkdir(exist_ok=True)
            if classes:
                Image.open(sorted(classes[c].glob("*.jpg"))[i]).save(file, quality=95)
            else:
                squares = np.random.default_rng([c, i]).integers(40 * c, 40 * c + 99, (5, 5, 3), dtype=np.uint8)
                Image.fromarray(squares).resize((200, 200)).save(file)
    return folder


@pytest.fixture(scope="module")
def index(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "index"
    cli.main(["index", str(photos), str(folder)])
    return folder


def lines(capsys, *words) -> list[str]:
    cli.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"hamlet {command} " in capsys.readouterr().out.split("options:")[0]


def test_python_m_hamlet_is_the_same():
    run = subprocess.run(
        [sys.executable, "-m", "hamlet", "search", "nowhere", "x"], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stderr.startswith("error: no index at nowhere") and run.stderr.count("\n") == 1


def test_two_commands_from_photos_to_the_page(photos, index, tmp_path, capsys):
    again = lines(capsys, "index", photos, index)
    assert (
        "24 photos" in again[1]
        and "0 new, 0 changed, 0 gone" in again[1]
        and again[2].startswith("model default (knows ImageNet, not trained on your photos); index flat")
    )
    assert lines(capsys, "page", index, tmp_path / "page.html") == [str(tmp_path / "page.html")]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<section>") == 24


def test_search_by_photo_in_every_form(photos, index, tmp_path, capsys, monkeypatch):
    file = photos / "class1" / "2.jpg"
    plain = lines(capsys, "search", index, file, "-k", 3)
    assert len(plain) == 3 and re.fullmatch(rf"  1  (1\.0000|0\.9999)  {file}", plain[0])
    found = json.loads("\n".join(lines(capsys, "search", index, file, "-k", 3, "--json")))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines(capsys, "search", index, file, "-k", 3, "--csv")))))
    assert [r["path"] for r in rows] == [r["path"] for r in found] and found[0]["path"] == str(file)
    assert sum("class1" in r["path"] for r in found) >= 2
    opened = []
    monkeypatch.setattr(cli.webbrowser, "open", opened.append)
    place = lines(capsys, "search", index, file, "--open")[0]
    assert opened == [f"file://{place}"] and "<section>" in Path(place).read_text(encoding="utf-8")


def test_the_python_road_of_five_lines(photos, tmp_path):
    made = hamlet.search.Index.from_folder(photos, tmp_path / "index", progress=False)
    found = made.query(made.encoder().encode(str(photos / "class0" / "0.jpg"), progress=False), k=5)
    assert found["path"][0] == str(photos / "class0" / "0.jpg") and found["score"].is_monotonic_decreasing


def test_duplicates_find_resized_and_recompressed_copies_alone(photos, tmp_path, capsys):
    original = Image.open(photos / "class2" / "1.jpg")
    quality = (
        50 if any(r.is_dir() for r in FOUND) else 90
    )  # what stands for photos where there are none is not so robust
    for copy in ("half.png", "worse.jpg"):
        picture = original.resize((original.width // 2, original.height // 2)) if copy == "half.png" else original
        picture.save(photos / copy, **({"quality": quality} if copy == "worse.jpg" else {}))
    try:
        cli.main(["index", str(photos), str(tmp_path / "index")])
        capsys.readouterr()
        found = lines(capsys, "duplicates", tmp_path / "index")
    finally:
        for copy in ("half.png", "worse.jpg"):
            (photos / copy).unlink()
    assert found[-1].startswith("1 group of") and len(found) == 5
    assert {line.strip() for line in found[1:4]} == {str(photos / n) for n in ("class2/1.jpg", "half.png", "worse.jpg")}


def test_embed_writes_a_table_for_other_tools(photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no photo")
    try:
        told = lines(capsys, "embed", photos, tmp_path / "out.parquet")
    finally:
        (photos / "broken.jpg").unlink()
    assert told[0].startswith("left out: broken.jpg") and told[1] == "1 left out"
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table["path"].nunique() == 24 and len(table["vector"][0]) == 1280
    np.testing.assert_allclose(np.linalg.norm(np.stack(table["vector"]), axis=1), 1, atol=1e-4)
    rows = hamlet.load("default").encode([photos / p for p in table["path"][:3]], progress=False)
    np.testing.assert_allclose(np.stack(table["vector"][:3]), rows, atol=1e-4)


def test_words_without_any_training_are_read_as_imagenet_classes(index, capsys):
    cli.main(["search", str(index), "a red apple with stripes", "-k", "3"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert said.err.startswith("read as ImageNet's ") and "Granny Smith" in said.err and "hamlet train" in said.err
    cli.main(["search", str(index), "apples and pears " * 40, "-k", "3"])  # longer than the name of any file
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_mistakes_end_in_one_line(photos, index, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert "no photo below" in refused(capsys, "index", tmp_path / "empty", tmp_path / "i")
    assert "is a file" in refused(capsys, "index", photos, tmp_path / "file")
    assert "no photo at gone.jpg" in refused(capsys, "search", index, "gone.jpg")
    assert "k: expected a whole number" in refused(capsys, "search", index, photos / "class0" / "0.jpg", "-k", 0)
    assert "no model" in refused(capsys, "index", photos, tmp_path / "i", "--model", "nosuch")
    assert "no index at" in refused(capsys, "page", tmp_path, tmp_path / "p.html")
    assert "batch" in refused(capsys, "embed", photos, tmp_path / "o.parquet", "--batch-size", 0)
    assert "an empty query" in refused(capsys, "search", index, " ")
    for least in ("2", "nan"):
        assert "--threshold: expected a number from -1 to 1" in refused(
            capsys, "duplicates", index, "--threshold", least
        )
    for epochs in (0, -3):
        assert "epochs: expected" in refused(capsys, "train", photos, "--name", "x", "--epochs", epochs)
    for name in ("", "..", "a/b", "default"):
        assert f"name {name!r}: expected letters" in refused(capsys, "train", photos, "--name", name)


def test_serve_says_where_only_once_it_can(index, tmp_path, capsys):
    pytest.importorskip("uvicorn", reason="the live page needs the extra 'web'")
    assert "port 70000: expected" in refused(capsys, "serve", index, "--port", 70000)
    assert "no index at" in refused(capsys, "serve", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        cli.main(["serve", str(index), "--port", str(taken.getsockname()[1])])
    assert "http" not in capsys.readouterr().out


@pytest.mark.slow
def test_train_then_index_and_find_by_words(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HAMLET_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    for c, name in enumerate(("banana", "kiwi", "lemon", "pineapple")):
        (tmp_path / "all named").mkdir(exist_ok=True)
        (tmp_path / "all named" / name).symlink_to(photos / f"class{c}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "fruit.safetensors").write_bytes(b"of another day")
    with pytest.warns(UserWarning, match="the model that was there before: .*/fruit-[0-9a-f]{8}.safetensors") as said:
        told = lines(capsys, "train", tmp_path / "all named", "--name", "fruit", "--epochs", 1)
    assert Path(str(said[-1].message).split(": ")[1]).read_bytes() == b"of another day"
    assert told[-1] == f"use it: hamlet index '{tmp_path / 'all named'}' INDEX --model fruit"
    card = hamlet.load("fruit").card
    assert {"banana", "kiwi", "lemon", "pineapple"} == set(card["classes"]) and card["image_size"] == 160
    made = lines(capsys, "index", tmp_path / "all named", tmp_path / "index", "--model", "fruit")
    assert made[-1].startswith("model fruit; index flat")
    assert len(lines(capsys, "search", tmp_path / "index", "a yellow lemon", "-k", 4)) == 4
