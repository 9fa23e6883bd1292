"""What a model makes of the beginning of a text, for people to read."""

from __future__ import annotations

from typing import Any


def greedy(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """The most likely continuation of each prompt, `tokens` tokens at most, special tokens left out.

    Where the context has no room for both, a continuation gets up to half of it, and of the prompt the end is read.
    """
    import torch

    from pipelines.core import context_window, packing, sampling

    separator = packing.separator_id(tokenizer)
    room = context_window.length(model.config)
    new = min(tokens, room // 2) if room else tokens
    ids = [[separator, *one] for one in packing.encode(tokenizer, prompts)]
    stops = sorted({separator, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})
    found = sampling.sample(
        model,
        [one[-(room - new) :] if room else one for one in ids],
        count=1,
        tokens=new,
        stops=stops,
        pad=separator,
        temperature=0,
        seed=0,
        precision="bf16" if model.get_input_embeddings().weight.dtype == torch.bfloat16 else "fp32",
        tell=lambda done, total: None,
    )
    return [tokenizer.decode(one, skip_special_tokens=True) for (one,) in found.ids]
