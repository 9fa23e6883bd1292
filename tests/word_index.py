"""An index of a few documents with the interface of `retrieval.Index`, ranked by shared words."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pipelines.core import citing
from pipelines.core.retrieval import Passage


class WordIndex:
    """`documents.json` of a folder: a list of {id, title, text, url}."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self.documents = documents
        self.manifest = {"embedder": {"name": "words", "sha256": "abc"}}

    @classmethod
    def open(cls, folder: Path, embedder: str | None = None) -> WordIndex:
        if embedder not in (None, "abc"):
            raise ValueError(f"{folder}: made with embedder abc, asked for {embedder}")
        return cls(json.loads((folder / "documents.json").read_text()))

    def search(
        self,
        query: str,
        count: int = 10,
        *,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
        exclude: Collection[str] = (),
        distinct: bool = True,
    ) -> list[Passage]:
        asked = set(citing.words(query))
        found = []
        for one in self.documents:
            if one["id"] not in exclude and (where is None or where({"document": one["id"]})):
                told = set(citing.words(f"{one['title']} {one['text']}"))
                share = len(asked & told) / len(asked)
                found.append(
                    Passage(f"{one['id']}#0", one["id"], one["title"], one["text"], one["url"], share, share, 0, 9, 1)
                )
        return sorted(found, key=lambda passage: (-passage.score, passage.chunk))[:count]
