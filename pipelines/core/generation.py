"""Text out of a model, for people to read."""

from __future__ import annotations

from typing import Any


def greedy(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """The most likely continuation of each prompt, `tokens` tokens at most, special tokens left out.

    Prompts are padded on the left, so that each continues at its right end.
    """
    import torch

    from pipelines.core import packing

    if not prompts:
        return []
    separator = packing.separator_id(tokenizer)
    ids = [[separator, *one] for one in packing.encode(tokenizer, prompts)]
    longest = max(len(one) for one in ids)
    room = getattr(model.config, "max_position_embeddings", None) or longest + tokens
    pad = tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(one)) + one for one in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids], device=model.device)
    new = max(1, min(tokens, room - longest))
    kept = min(longest, room - new)  # the end of a prompt that is longer than the context
    stops = sorted({separator, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})
    with torch.inference_mode():
        out = model.generate(
            input_ids=padded[:, -kept:],
            attention_mask=mask[:, -kept:],
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=stops,
        )
    return [tokenizer.decode(row[kept:], skip_special_tokens=True) for row in out]
