"""Passages for a prompt, out of the index of stage `rag`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.errors import ArtifactError, ParamsError

if TYPE_CHECKING:
    from pipelines.core.prompt_cells import Find

CHARACTERS = 400  # of a passage's text: several have to fit into a small model's context


def finder(rag: Path, count: int) -> Find:
    """What finds `count` passages for a text, best first, each on one line with its title.

    Raises:
        ArtifactError: the index cannot be opened.
        ParamsError: there is none, since the data have no knowledge.
    """
    from pipelines.core import retrieval

    if not (rag / "index").is_dir():
        raise ParamsError(
            "prompts.strategies: retrieval needs an index, and the data have no knowledge: leave it out, "
            "or name a source with table: knowledge in data.sources"
        )
    try:
        index = retrieval.Index.open(rag / "index")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{rag / 'index'}: {error}. Make it with: dvc repro rag") from None
    known: dict[str, list[str]] = {}

    def find(text: str) -> list[str]:
        if text not in known:
            known[text] = [f"{' '.join(one.title.split())}: {cut(one.text)}" for one in index.search(text, count)]
        return known[text]

    return find


def cut(text: str) -> str:
    """The beginning of a text on one line, up to a word's end."""
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS else line[:CHARACTERS].rsplit(" ", 1)[0] + " …"
