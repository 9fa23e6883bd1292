"""Stage `tokenizer`: the corpus -> a tokenizer directory that `AutoTokenizer.from_pretrained` loads.

In: `data` (its corpus). Out: `tokenizer.json`, its configuration, the chat template, `README.md`,
`evaluation.parquet` (one row a held-out document: bytes, tokens, whether it came back unchanged).

With `base` set it is the base model's own. With `base: null` it is a byte-level BPE (Sennrich et al. 2016;
Radford et al. 2019, section 2.2) trained on the corpus, with ChatML as its chat template. Either way the pad
token is not EOS: a model whose padding is masked would otherwise never learn to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

from pipelines.core import artifacts, chats, language_models, packing, reading
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.params.tokenizer import TokenizerParams

METRICS = frozenset({"vocabulary", "bytes_per_token", "round_trip"})
SCORES = frozenset({"bytes", "tokens", "unchanged"})

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's templates, and SmolLM3's, tell today's date: what is learned and sampled would change from day to day.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"  # Llama's own, where there is no clock
TRAIN_BYTES = 32 * 2**20  # BPE merges settle long before this; it bounds time and memory on a large corpus
HELD_OUT_BYTES = 2**20
SEED = 0  # of which documents, where there are more
PROBES = (
    "안녕하세요, 세계!",
    "naïve café — “quotes” … ‰",
    "👩‍👩‍👧‍👦 🤷🏽‍♀️ emoji",
    "tabs\tand\r\nnewlines\n\n  spaces  ",
    "\x00\x07 control, \u202eright-to-left, e\u0301 combining",
    "العربية עברית हिन्दी 中文 日本語",
    "<|im_start|> spelled out, <|endoftext|> too",
)


def run(params: TokenizerParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Make the tokenizer and measure it on held-out text.

    Raises:
        ArtifactError: it does not give every text back unchanged, chats of the data cannot be learned with it, or the
            data hold no corpus.
    """
    # 1. Take the base model's, or train one on the corpus.
    if params.base is not None:
        tokenizer = language_models.load_tokenizer(params.base)
    else:
        # Of a large corpus documents from all of it: its sources, such as languages, stand one after the other.
        share = TRAIN_BYTES / max(1, reading.corpus_bytes(inputs["data"], "train"))
        tokenizer = _train(params, reading.sample(inputs["data"], "train", share, SEED))

    # 2. Padding must not be EOS, and a chat needs a template.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = _spare_token(tokenizer)
        if spare not in tokenizer.get_vocab():  # the attribute alone would be the unknown token until it is loaded
            tokenizer.add_tokens([spare], special_tokens=True)
        tokenizer.pad_token = spare
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if (dated := _without_a_clock(tokenizer.chat_template)) != tokenizer.chat_template:
        context.say("the chat template tells today's date: it is 26 Jul 2024 for good")
        tokenizer.chat_template = dated
    tokenizer.padding_side = "left"  # generation continues at the right end; training pads by itself
    tokenizer.save_pretrained(outputs)

    # 3. Every text must come back unchanged, chats must be learnable; then bytes per token on text it has not seen.
    _check_probes(tokenizer)
    _check_chats(tokenizer, params.base, inputs["data"], context)
    rows = _evaluate(tokenizer, inputs["data"])
    reading.write_evaluation(outputs / "evaluation.parquet", rows)
    total_bytes, total_tokens = sum(rows["bytes"]), sum(rows["tokens"])
    metrics = {
        "vocabulary": float(len(tokenizer)),
        "bytes_per_token": total_bytes / total_tokens,
        "round_trip": sum(rows["unchanged"]) / len(rows["unchanged"]),
    }
    context.say(_example(tokenizer, inputs["data"]))
    artifacts.write_text(outputs / "README.md", _card(params, tokenizer, metrics))
    return metrics


def _train(params: TokenizerParams, texts: Iterator[str]) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens; the 256 bytes are in it, so nothing is ever unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first_bytes(texts, TRAIN_BYTES), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )


def _first_bytes(texts: Iterator[str], budget: int) -> Iterator[str]:
    for text in texts:
        budget -= len(text.encode())
        yield text
        if budget <= 0:
            return


def _spare_token(tokenizer: Any) -> str:
    """A special token nobody uses, for padding: the last one that is no boundary; a new one if there is none."""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, packing.DOCUMENT}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    template = tokenizer.chat_template or ""
    spare = [token for token in special if token not in used and token not in template]
    return spare[-1] if spare else SPECIAL[-1]


def _without_a_clock(template: Any) -> Any:
    """A chat template, or each of several by name, with one date for good; as it is where it asks for none."""
    if isinstance(template, dict):
        return {name: _without_a_clock(one) for name, one in template.items()}
    return FIXED_DATE + template if "strftime_now" in template and not template.startswith(FIXED_DATE) else template


def _check_chats(tokenizer: Any, base: str | None, data: Path, context: StageContext) -> None:
    """Raise where `sft`, which comes after pre-training, would refuse the tokenizer; where it has no chats, say so."""
    try:
        chats.check_tokenizer(tokenizer)
    except (ArtifactError, DataError) as error:
        told = f"tokenizer.base {base}: {error}"
        if (data / "demonstrations").is_dir():
            raise ArtifactError(
                f"{told} Save the mended tokenizer (transformers: save_pretrained) in a copy of the base's directory, "
                "and name that one: tokenizer.base and pretrain.base"
            ) from None
        context.say(f"warning: stage sft would refuse {told}")


def _check_probes(tokenizer: Any) -> None:
    """Raise if any of a handful of hostile texts changes on its way through the tokenizer.

    Some, as Qwen's, write composed characters for combining ones (NFC): to Unicode that is the same text.
    """
    ids = packing.encode(tokenizer, list(PROBES))
    pairs = zip(PROBES, _decode(tokenizer, ids), strict=True)
    changed = [(text, back) for text, back in pairs if normalize("NFC", text) != normalize("NFC", back)]
    if changed:
        listed = "\n".join(f"  {text!r} came back as {back!r}" for text, back in changed)
        raise ArtifactError(f"the tokenizer loses text; a byte-level tokenizer is needed:\n{listed}")


def _decode(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    return [tokenizer.decode(one, skip_special_tokens=False, clean_up_tokenization_spaces=False) for one in ids]


def _evaluate(tokenizer: Any, data: Path) -> dict[str, list[Any]]:
    """One row a held-out document, about a megabyte of them, from all of the corpus."""
    rows: dict[str, list[Any]] = {key: [] for key in ("id", "group", "bytes", "tokens", "unchanged")}
    budget = HELD_OUT_BYTES
    share = budget / max(1, reading.corpus_bytes(data, "test"))
    for row in reading.sample_rows(data, "test", share, SEED):
        ids = packing.encode(tokenizer, [row["text"]])
        size = len(row["text"].encode())
        values = (row["id"], row["group"], size, len(ids[0]), float(_decode(tokenizer, ids)[0] == row["text"]))
        for key, value in zip(rows, values, strict=True):
            rows[key].append(value)
        budget -= size
        if budget <= 0:
            break
    return rows


def _example(tokenizer: Any, data: Path) -> str:
    """The first held-out document's first tokens, bracketed."""
    text = next(reading.texts(data, "test"))[:160]
    pieces = "".join(f"[{tokenizer.decode([token])}]" for token in packing.encode(tokenizer, [text])[0])
    return f"tokens of a held-out text:\n{pieces}"


def _card(params: TokenizerParams, tokenizer: Any, metrics: dict[str, float]) -> str:
    origin = f"taken from the base model `{params.base}`" if params.base else "a byte-level BPE trained on the corpus"
    return (
        f"# Tokenizer\n\n{len(tokenizer)} tokens, {origin}. {metrics['bytes_per_token']:.3f} bytes a token on "
        f"held-out text; {metrics['round_trip']:.1%} of the documents came back unchanged.\n\n"
        f"End of a turn: `{tokenizer.eos_token}`. Padding: `{tokenizer.pad_token}`. "
        f"Between documents: `{tokenizer.convert_ids_to_tokens(packing.separator_id(tokenizer))}`.\n"
    )
