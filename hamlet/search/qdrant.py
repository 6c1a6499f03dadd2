"""The interface of ``Index`` over Qdrant, a vector database, for more photos than one machine's memory takes.

Change over beyond some ten million photos, or where several machines write or ask: up to there one ``Index`` file is
quicker and needs no server. Nothing is locked: writers of the same paths go on side by side, and the last one counts.
"""

from collections.abc import Sequence

import numpy as np
from qdrant_client import QdrantClient, models

from hamlet.errors import HamletError
from hamlet.search.index import Index

BATCH = 256  # points sent together


class QdrantIndex(Index):
    """A collection of one point a photo, with the payload path and state; what is kept beside it lies in a second one.

    client: a QdrantClient, of a server (``url=``) or embedded (``path=``, ":memory:"). collection: made if absent.
    """

    def __init__(self, client: QdrantClient, collection: str, dimension: int | None = None, about: dict | None = None):
        self.client, self.collection, self.notes = client, collection, f"{collection}-about"
        if client.collection_exists(collection):
            there = client.get_collection(collection).config.params.vectors.size
            if dimension not in (None, there):
                raise HamletError(f"{collection} holds descriptors of {there} values, not {dimension}; name another")
            kept = client.retrieve(self.notes, [0])
            super().__init__("flat", there, {**(kept[0].payload if kept else {}), **(about or {})})
        elif dimension is None:
            raise HamletError(f"no collection {collection!r} in this Qdrant; give dimension= to make one")
        else:
            super().__init__("flat", dimension, about)
            for name, size in ((collection, dimension), (self.notes, 1)):
                client.create_collection(name, models.VectorParams(size=size, distance=models.Distance.DOT))
        self.kind, place = "qdrant", None
        while True:
            points, place = client.scroll(collection, limit=10_000, offset=place, with_payload=True)
            self.paths |= {p.id: p.payload["path"] for p in points}
            self.items |= {p.payload["path"]: (p.id, p.payload["state"]) for p in points}
            if place is None:
                break
        self.next_id = max(self.paths, default=-1) + 1

    def _put(self, rows: np.ndarray, ids: list[int], paths: Sequence[str], states: Sequence[str]) -> None:
        payloads = [{"path": path, "state": state} for path, state in zip(paths, states, strict=True)]
        self.client.upload_collection(self.collection, rows, payloads, ids, batch_size=BATCH, wait=True)

    def _drop(self, ids: list[int]) -> None:
        self.client.delete(self.collection, models.PointIdsList(points=ids), wait=True)

    def _nearest(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, ids = np.zeros((len(rows), k), np.float32), np.full((len(rows), k), -1)
        for i, row in enumerate(rows):
            found = self.client.query_points(self.collection, query=row.tolist(), limit=k).points
            scores[i, : len(found)], ids[i, : len(found)] = [p.score for p in found], [p.id for p in found]
        return scores, ids

    def vectors(self, ids: Sequence[int] | None = None) -> np.ndarray:
        """Descriptors float32 (N, D) by id, by default of all photos."""
        ids = [int(i) for i in (self.paths if ids is None else ids)]
        found = {p.id: p.vector for p in self.client.retrieve(self.collection, ids, with_vectors=True)}
        return np.array([found[i] for i in ids], np.float32).reshape(-1, self.dimension)

    def grow(self, count: int, kind: str | None = None) -> None:
        """The database chooses its own structures."""

    def save(self, folder: object = None) -> None:
        """The points are in the database already; this writes what is kept beside them (model, root)."""
        self.client.upsert(self.notes, [models.PointStruct(id=0, vector=[1.0], payload=self.about)])

    def duplicates(self, threshold: float, limit: int = 32) -> list[list[int]]:
        raise HamletError("duplicates are not looked for in Qdrant; index the folder into a file for that")
