"""Documents packed into rows of equal length, with their boundaries respected.

The token stream is `separator document separator document ...`, one flat file of uint32 read through a memory
map, so memory does not grow with the corpus. A row is `length` consecutive tokens. Tokens of different
documents never attend to one another and positions start at 0 in each document, so a row gives the same
result as its documents would one by one. No token is lost: what is left of a document opens the next row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipelines.core import distributed, reading
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import torch

DOCUMENT = "<|endoftext|>"  # the separator, where the vocabulary has it
LONGEST_TOKEN = 6  # bytes a token at most on average: how much text is tokenized for a number of tokens


class Batch(NamedTuple):
    """Packed rows. All tensors are int64 of shape (rows, length)."""

    ids: torch.Tensor
    labels: torch.Tensor  # the next token of the stream; a document's last token predicts the separator
    positions: torch.Tensor  # from 0 in each document
    documents: torch.Tensor  # number of the document within its row


def separator_id(tokenizer: Any) -> int:
    """The token that opens a document and ends the one before: `<|endoftext|>`, else BOS, else EOS.

    Raises:
        ArtifactError: the tokenizer has none of them.
    """
    known = tokenizer.get_vocab()
    for token in (known.get(DOCUMENT), tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ArtifactError(f"the tokenizer has neither {DOCUMENT} nor BOS nor EOS to put between documents: set eos_token")


def check_rows(tokenizer: Any, rows: int) -> None:
    """See that a model whose embedding has so many rows knows every token that a tokenizer can make of what is read.

    No text is made into a special token, only what a template spells, or what is put around and between texts. Gemma 3
    of text alone has one without a row, for images.

    Raises:
        ArtifactError: it has no row for some, as where a pad token was added to the tokenizer alone.
    """
    named = {DOCUMENT, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    idle = {token for token in special - named if token not in str(tokenizer.chat_template)}
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= rows and token not in idle)
    if beyond:
        raise ArtifactError(
            f"{tokenizer.name_or_path}: {len(beyond)} tokens of the tokenizer have no row in the model's embedding of "
            f"{rows} rows, for example {beyond[0]!r}; the two do not belong together (if you added them: "
            f"model.resize_token_embeddings({len(tokenizer)}) of transformers, then save it)"
        )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts; a special token's spelling inside a text is text, not that token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return [item.ids for item in backend.encode_batch(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = False


def write_stream(tokenizer: Any, texts: Iterable[str], place: Path, batch: int = 256) -> int:
    """Tokenize documents into a flat uint32 file, a separator before each and one at the end.

    Returns the number of tokens. Memory: one batch of texts.
    """
    separator = separator_id(tokenizer)
    count = 0
    with place.open("wb") as file:
        waiting: list[str] = []

        def flush() -> int:
            ids = [token for one in encode(tokenizer, waiting) for token in (separator, *one)]
            file.write(np.asarray(ids, dtype=np.uint32).tobytes())
            waiting.clear()
            return len(ids)

        for text in texts:
            waiting.append(text)
            if len(waiting) == batch:
                count += flush()
        count += flush()
        file.write(np.asarray([separator], dtype=np.uint32).tobytes())
    return count + 1


class PackedRows:
    """Rows of a token stream, drawn in a new seeded order in each epoch. `key` is the dial that sets `length`."""

    def __init__(
        self, place: Path, length: int, separator: int, seed: int, key: str = "pretrain.sequence_length"
    ) -> None:
        self.stream = np.memmap(place, dtype=np.uint32, mode="r")
        self.length, self.separator, self.seed = length, separator, seed
        self.rows = (len(self.stream) - 1) // length
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if self.rows < 1:
            raise DataError(
                f"the training corpus has {len(self.stream)} tokens, less than one row of "
                f"{key} = {length}: add text or shorten the rows"
            )

    def batch(self, first: int, count: int) -> Batch:
        """Rows number `first` to `first + count` of the endless sequence of shuffled epochs."""
        chosen = [self._row(number) for number in range(first, first + count)]
        return self._pack(np.stack([self.stream[row * self.length :][: self.length + 1] for row in chosen]))

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, self.rows)
        if epoch != self._epoch:  # 8 bytes a row of `length` tokens: small beside everything else
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._order[place])

    def _pack(self, tokens: np.ndarray[Any, Any]) -> Batch:
        import torch

        ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))
        labels = torch.from_numpy(tokens[:, 1:].astype(np.int64))
        opens = ids == self.separator
        documents = opens.long().cumsum(dim=1)
        index = torch.arange(self.length).expand_as(ids)
        starts = torch.where(opens, index, torch.zeros_like(index)).cummax(dim=1).values
        return Batch(ids, labels, index - starts, documents)


def of_corpus(
    data: Path, tokenizer: Any, tokens: int, length: int, key: str, seed: int, context: StageContext
) -> PackedRows:
    """Rows of the training corpus for a run that sees `tokens` tokens; no more text is tokenized than it can use.

    The stream is kept in `context.work`, for the other processes and for a run that goes on after a kill.

    Args:
        key: the dial that sets `length`.

    Raises:
        ArtifactError: the data have no corpus.
        DataError: it has less text than one row.
    """
    place = context.work / "tokens.bin"
    with distributed.leader_first(context.world):
        if not place.exists():
            share = tokens * LONGEST_TOKEN / max(1, reading.corpus_bytes(data, "train"))
            draft = place.with_suffix(".partial")
            write_stream(tokenizer, reading.sample(data, "train", share, seed), draft)
            draft.rename(place)
    return PackedRows(place, length, separator_id(tokenizer), seed, key)


def attention_mask(documents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (rows, 1, length, length): 0 where a token may look, the type's minimum elsewhere.

    A token sees itself and earlier tokens of its own document. `documents`: int64 (rows, length).
    """
    import torch

    length = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=documents.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
