"""A byte-level BPE tokenizer as the `tokenizer.ggml.*` keys of a GGUF file, read as llama.cpp reads them.

llama.cpp does not run a `tokenizer.json`: it knows a splitting rule by name (`tokenizer.ggml.pre`) and merges by
the list it is given. Its convert_hf_to_gguf.py finds the name by hashing the ids of one long string, so it knows
published vocabularies only, and cannot tell two rules that agree on that string, as gpt-2's and smollm's do. Here
the name follows from the splitting rule itself, which also answers for a vocabulary trained today; whatever llama.cpp
would do otherwise than the tokenizer is refused.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pipelines.core import packing
from pipelines.core.errors import ArtifactError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp, enum llama_token_type

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}  # pattern -> name
IGNORE_MERGES = {"llama-bpe"}  # of these rules llama.cpp takes a word that is a token whole, without merging


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer. Lists are indexed by token id, merges by rank."""

    pre: str  # name of the splitting rule
    tokens: list[str]  # in the byte alphabet of GPT-2; added tokens as they are spelled
    types: list[int]
    merges: list[str]  # "left right"
    ids: dict[str, int]  # of "bos", "eos", "unk", "pad", those that there are
    add_bos: bool  # put before every text
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None


def read(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer, filled up to `rows`, the rows of the model's embedding.

    Raises:
        ArtifactError: it is no byte-level BPE, splits or wraps text in a way llama.cpp has no name for, or has a
            token beyond the embedding that it can make of a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtifactError(f"tokenizer: {type(tokenizer).__name__} has no tokenizer.json; a byte-level BPE is needed")
    told = json.loads(backend.to_str())
    pre = splitting_rule(told)
    packing.check_rows(tokenizer, rows)
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if index < rows}
    tokens = [f"[PAD{index}]" for index in range(rows)]  # llama.cpp's name for a row without a token
    types = [UNUSED] * rows
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        if index >= rows:  # which nothing writes
            continue
        if added.lstrip or added.rstrip or added.single_word:
            raise ArtifactError(
                f"tokenizer: token {added.content!r} (id {index}) swallows spaces or wants word boundaries "
                "(lstrip, rstrip, single_word), which a GGUF file cannot say"
            )
        types[index] = CONTROL if added.special else USER_DEFINED
    if tokenizer.eos_token_id is None:
        raise ArtifactError(
            f"tokenizer: it has no EOS; without one llama.cpp ends a text at token 11 ({tokens[11]!r}): set eos_token"
        )
    add_bos, add_eos = _wrapping(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    named = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    ids = {kind: index for kind, index in named.items() if index is not None}
    return Vocabulary(pre, tokens, types, _merges(told["model"]), ids, add_bos, add_eos, template)


def splitting_rule(told: dict[str, Any]) -> str:
    """llama.cpp's name (src/llama-vocab.cpp) for how a tokenizer.json splits text before merging.

    Raises:
        ArtifactError: it is no byte-level BPE, or llama.cpp has no such rule among those known here.
    """
    model = told["model"]
    plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if model["type"] != "BPE" or not plain:
        raise ArtifactError(f"tokenizer: a byte-level BPE is needed, this is {model['type']} of another kind")
    pre = _named(told.get("pre_tokenizer") or {})
    if pre is None:
        raise ArtifactError(
            "tokenizer: llama.cpp has no name for its pre_tokenizer "
            f"{json.dumps(told.get('pre_tokenizer'), ensure_ascii=False)}; accepted: ByteLevel (gpt-2), "
            "Digits + ByteLevel (smollm), the splits of Llama 3 (llama-bpe) and Qwen2 (qwen2)"
        )
    normalizer = (told.get("normalizer") or {}).get("type")
    if normalizer is not None and (normalizer, pre) != ("NFC", "qwen2"):  # as llama.cpp: Qwen's NFC is left out
        raise ArtifactError(f"tokenizer: it normalizes text ({normalizer}); llama.cpp's {pre} does not")
    if bool(model.get("ignore_merges")) != (pre in IGNORE_MERGES):
        raise ArtifactError(
            f"tokenizer: ignore_merges is {bool(model.get('ignore_merges'))}; llama.cpp's {pre} always takes "
            f"{pre in IGNORE_MERGES}, so the tokens would differ"
        )
    return pre


def _named(rule: dict[str, Any]) -> str | None:
    """The name of a `pre_tokenizer` of tokenizer.json; None if it has none."""
    steps = rule.get("pretokenizers", [rule])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    own_split = last.get("use_regex", True)
    if len(steps) == 1 and own_split:
        return "gpt-2"
    if len(steps) != 2:
        return None
    first = steps[0]
    if first["type"] == "Digits" and first["individual_digits"] and own_split:
        return "smollm"
    if first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and not own_split:
        return SPLITS.get(first["pattern"].get("Regex", ""))
    return None


def _merges(model: dict[str, Any]) -> list[str]:
    """The merges in order of rank, each as "left right"."""
    if not model["merges"]:
        raise ArtifactError("tokenizer: it has no merges, and llama.cpp loads no BPE without; train a larger one")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _wrapping(tokenizer: Any) -> tuple[bool, bool]:
    """Whether BOS is put before a text and EOS after it, seen from what the tokenizer does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    add_bos = whole != bare and whole[0] == tokenizer.bos_token_id
    add_eos = whole != bare and whole[-1] == tokenizer.eos_token_id
    expected = [tokenizer.bos_token_id] * add_bos + bare + [tokenizer.eos_token_id] * add_eos
    if whole != expected:
        raise ArtifactError(
            f"tokenizer: it wraps a text as {tokenizer.convert_ids_to_tokens(whole)}; "
            "a GGUF file can ask for BOS before and EOS after, nothing else"
        )
    return add_bos, add_eos
