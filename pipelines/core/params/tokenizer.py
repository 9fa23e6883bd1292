"""Section `tokenizer`."""

from __future__ import annotations

from pydantic import Field

from pipelines.core.params.section import Section


class TokenizerParams(Section):
    """Stage `tokenizer`."""

    base: str | None = Field(description="smollm2-135m, a directory, a .gguf file, a hub id; null: train one")
    vocab_size: int = Field(ge=300, le=262_144, description="of the trained one (base: null)")
