"""The Qdrant adapter answers as an Index does; its client's embedded mode stands for a server."""

import numpy as np
import pytest

from hamlet.errors import HamletError
from hamlet.search import Index

from .conftest import photo
from .test_index import names, unit_rows

qdrant_client = pytest.importorskip("qdrant_client", reason="the adapter needs the extra 'qdrant'")
from hamlet.search.qdrant import QdrantIndex  # noqa: E402


@pytest.fixture
def client():
    return qdrant_client.QdrantClient(":memory:")


def test_the_same_answers_as_flat(client):
    rows = unit_rows(200)
    there, here = QdrantIndex(client, "photos", 32), Index("flat", 32)
    for index in (there, here):
        assert index.add(rows, names(200)) == list(range(200))
        assert index.remove(names(200)[5]) == 1
    one, other = there.query(rows[3:6], 7), here.query(rows[3:6], 7)
    assert one[["query", "rank", "id", "path"]].equals(other[["query", "rank", "id", "path"]])
    np.testing.assert_allclose(one["score"], other["score"], atol=1e-5)
    np.testing.assert_allclose(there.vectors([9, 3]), rows[[9, 3]], atol=1e-6)


def test_a_collection_is_found_again_and_refuses_what_an_index_refuses(client):
    QdrantIndex(client, "photos", 32).add(unit_rows(20), names(20))
    again = QdrantIndex(client, "photos")
    assert len(again) == 20 and again.next_id == 20
    with pytest.raises(HamletError, match="twice"):
        again.add(unit_rows(1), names(1))
    with pytest.raises(HamletError, match="not in this index"):
        again.remove("gone")
    with pytest.raises(HamletError, match="descriptors of 32 values, not 8"):
        QdrantIndex(client, "photos", 8)
    with pytest.raises(HamletError, match="no collection 'other'"):
        QdrantIndex(client, "other")
    assert client.count("photos").count == 20


def test_a_folder_is_kept_up_to_date(client, photos, colours):
    index = QdrantIndex(client, "photos", 48)
    assert index.update(colours, photos, progress=False).new == 12
    index.save()
    photo(photos / "new.png", 99)
    (photos / "a" / "00.png").unlink()
    again = QdrantIndex(client, "photos")
    done = again.update(colours, progress=False)  # the root is remembered
    assert (done.new, done.changed, done.gone) == (1, 0, 1)
    assert again.query(colours.encode([photos / "new.png"]), 1)["path"].tolist() == [str(photos / "new.png")]
