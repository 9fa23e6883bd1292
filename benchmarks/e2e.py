"""Makes the data of profile `e2e` from the E2E challenge's files: `python -m benchmarks.e2e FOLDER`.

In: `e2e_clean_demonstrations.jsonl.gz` (`prompt`, `completion`) and `e2e_rankings.jsonl.gz` (`prompt`, `responses`,
human `scores`). Out: `data/e2e/` with `corpus`, `demonstrations`, `prompts` (with the human text as `reference`) and
`rankings`, restaurant names replaced by `NAME` and `NEAR`: there are too few of them to learn from (Dušek et al.,
"Evaluating the State-of-the-Art of End-to-End Natural Language Generation", 2020, section 3.1, delexicalisation).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACEHOLDERS = {"name": "NAME", "near": "NEAR"}
TARGET = Path("data/e2e")


def delexicalise(prompt: str, texts: list[str]) -> tuple[str, list[str]]:
    """Prompt and texts with the restaurants' names as placeholders, wherever the prompt names them."""
    for slot, placeholder in PLACEHOLDERS.items():
        found = re.search(rf"\b{slot}\[([^\]]*)\]", prompt)
        if found:
            name = re.compile(rf"(?<!\w){re.escape(found[1])}(?!\w)", re.IGNORECASE)
            prompt = prompt.replace(found[0], f"{slot}[{placeholder}]")
            texts = [name.sub(placeholder, text) for text in texts]
    return prompt, texts


def read(place: Path) -> Iterator[dict[str, Any]]:
    """Rows of a gzipped JSONL file."""
    with gzip.open(place, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """One JSONL file of the target, repeated rows once."""
    lines = dict.fromkeys(json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows)
    (TARGET / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{TARGET / name}.jsonl: {len(lines)} rows")


def main() -> None:
    """Read, replace, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    TARGET.mkdir(parents=True, exist_ok=True)
    demonstrations = []
    for row in read(folder / "e2e_clean_demonstrations.jsonl.gz"):
        prompt, (completion,) = delexicalise(row["prompt"], [row["completion"]])
        demonstrations.append({"prompt": prompt, "completion": completion})
    rankings = []
    for row in read(folder / "e2e_rankings.jsonl.gz"):
        prompt, responses = delexicalise(row["prompt"], row["responses"])
        rankings.append({"prompt": prompt, "responses": responses, "scores": row["scores"]})
    references = {row["prompt"]: row["completion"] for row in reversed(demonstrations)}
    write("corpus", [{"prompt": row["prompt"], "text": "\n".join(row.values())} for row in demonstrations])
    write("demonstrations", demonstrations)
    write("prompts", [{"prompt": prompt, "reference": text} for prompt, text in references.items()])
    write("rankings", rankings)


if __name__ == "__main__":
    main()
