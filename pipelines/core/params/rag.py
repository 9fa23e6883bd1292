"""Section `rag`."""

from __future__ import annotations

from pydantic import Field

from pipelines.core.params.section import Section, Share

EMBEDDERS = ("minilm-l6-v2",)  # names of packages (core/embedding.py)


class RagParams(Section):
    """Stage `rag`."""

    embedder: str = Field(description="minilm-l6-v2, a sentence-transformers directory, or a hub id")
    reranker: str | None = Field(description="cross-encoder applied to the best candidates; null: none")
    chunk_tokens: int = Field(ge=16, description="of the embedder's tokenizer")
    chunk_overlap: Share = Field(description="of a chunk that the next one repeats")
    embedded_chunks: int | None = Field(
        ge=1, description="chunks of a document, after its signature, that get vectors; null: all. BM25 reads all"
    )
    exact_chunks: int = Field(ge=1, description="with more vectors than this an approximate index is searched")
    fusion_k: float = Field(gt=0.0, description="constant of reciprocal rank fusion")
    dense_weight: float = Field(gt=0.0, description="of the vectors' ranks beside BM25's, whose weight is 1")
    tune: bool = Field(description="choose both by queries instead, that nothing is judged by afterwards")
    tuning_share: Share = Field(description="of the groups of queries: what fusion and threshold are chosen by")
    kinds: tuple[str, ...] = Field(description="kinds of queries that retrieval is measured on; empty: all")
    pool: int | None = Field(ge=1, description="documents ranked: all targets, others by hash; null: only the whole")
    threshold_queries: int = Field(ge=2, description="of each sort for the threshold of relevance; as many judge it")
    samples: int = Field(ge=0, le=64)
