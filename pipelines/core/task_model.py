"""A language model with a linear head for one task: GPT-1, section 3.2 and 3.3.

The last token of every sequence is `extract`; its last hidden state h goes through W_y, which has no bias (equation
3). What of the model is trained is `method` and `tuning` (`core/tuning.py`), and always W_y; with adapters the three
tokens' input embeddings as well. What is trained is fp32, what is frozen in the compute type.

`head` and `last_n` keep the three tokens' embeddings as they begin: what lies below is computed once, so nothing
there can be learned. With adapters, the output embeddings of the three tokens stay as they begin: only the auxiliary
loss reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.core import fine_tuning, k_way, language_models, packing, segments, tuning
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.params.tuning import ADAPTERS, Method
from pipelines.core.task_inputs import Example, Special

if TYPE_CHECKING:
    from pipelines.core.params.transfer import TransferParams

BETAS = (0.9, 0.999)  # of GPT-1's published fine-tuning code
DEVIATION = 0.02  # of new weights: GPT-1, section 4.1
PAPER_LR, PAPER_WIDTH = 6.25e-5, 768  # GPT-1, section 4.1
PROBE_LR = 1e-3  # Adam's default: W_y alone has a convex problem, and the paper's rate hardly moves it


class TaskModel(torch.nn.Module):
    """A causal language model `lm` (wrapped by peft or not, or a loaded classifier) and its head `score`, W_y.

    `score.weight` is (outputs, width). `special`: (3, width), the input embeddings of the special tokens where they
    are apart from the rest (adapters), else None. `again` makes the model anew with another method.
    """

    def __init__(self, lm: Any, score: torch.nn.Linear, method: Method, dropout: float, seed: int, pad: int) -> None:
        super().__init__()
        self.lm, self.score = lm, score
        self.method, self.dropout, self.seed, self.pad = method, dropout, seed, pad
        self.special: torch.nn.Parameter | None = None
        self.special_ids: tuple[int, ...] = ()
        self.again: Callable[[Method], TaskModel] | None = None

    @property
    def config(self) -> Any:
        """The language model's, by which `tuning` finds the blocks."""
        return tuning.inner(self.lm).config

    def learn_special(self, ids: tuple[int, ...], drawn: torch.Tensor) -> None:
        """From now on the input embeddings of the tokens `ids` are the rows of a parameter that begins as `drawn`."""
        self.special_ids, self.special = ids, torch.nn.Parameter(drawn)

        def replaced(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            assert self.special is not None
            for row, token in enumerate(self.special_ids):
                output = torch.where((inputs[0] == token)[..., None], self.special[row].to(output.dtype), output)
            return output

        tuning.inner(self.lm).get_input_embeddings().register_forward_hook(replaced)


def learning_rate(width: int, method: Method) -> float:
    """Peak rate: the paper's at its width, in inverse proportion to the width; ten times that for adapters."""
    paper = PROBE_LR if method == "head" else PAPER_LR
    return paper * PAPER_WIDTH / width * (fine_tuning.LORA_FACTOR if method in ADAPTERS else 1.0)


def load(
    place: Path,
    tokenizer: Any,
    special: Special,
    params: TransferParams,
    outputs: int,
    seed: int,
    context: StageContext,
    random: bool = False,
) -> TaskModel:
    """The pre-trained model of a Hugging Face directory with a new head, ready to be trained.

    Args:
        tokenizer: the base's, with the special tokens added.
        outputs: rows of W_y (`task_mixture.rows`).
        seed: of W_y, of the special tokens' embeddings, of adapters and dropout.
        random: the same architecture with random weights: the paper's "without pre-training" (section 5), where all of
            them are trained (`method: full`). Adapters on them would teach nothing: with `lora` all are trained too.

    Raises:
        ArtifactError: no causal language model, one without a classifier in transformers, or another tokenizer's.
        ParamsError: more layers are asked for than there are, or a dial of `tuning` that the model cannot follow.
    """

    def make(method: Method) -> TaskModel:
        changed = params.model_copy(update={"method": method})
        return _made(place, tokenizer, special, changed, outputs, seed, context, random)

    model = make("full" if random and params.adapted else params.method)
    model.again = make
    return model


def _made(
    place: Path,
    tokenizer: Any,
    special: Special,
    params: TransferParams,
    outputs: int,
    seed: int,
    context: StageContext,
    random: bool,
) -> TaskModel:
    torch.manual_seed(seed)
    longest = max(k_way.ROW_TOKENS, params.max_length)
    dtype = torch.float32 if params.method == "full" else context.dtype
    lm = fine_tuning.read(place, params.method, longest, dtype, context)
    if random:
        from transformers import AutoModelForCausalLM

        kind = lm.config._attn_implementation
        lm = AutoModelForCausalLM.from_config(lm.config, dtype=lm.dtype, attn_implementation=kind)
    width = lm.config.hidden_size
    keep_first(lm, params.transferred_layers)
    language_models.fit_vocabulary(lm, tokenizer)
    _, output = language_models.body_and_head(lm)
    classifier(lm.config, outputs, torch.float32, "meta")  # refused now if it cannot be saved

    # The same numbers whatever the method and the size of the vocabulary.
    generator = torch.Generator().manual_seed(seed)
    head, drawn = (torch.randn(rows, width, generator=generator) * DEVIATION for rows in (outputs, len(special)))
    score = torch.nn.Linear(width, outputs, bias=False)
    read = lm.get_input_embeddings().weight
    known = list(stand_ins(tokenizer)) if params.special_tokens == "known" else None
    with torch.no_grad():
        score.weight.copy_(head)
        for weight in (read, output):
            weight[list(special)] = drawn.to(weight) if known is None else weight[known]
        tokens = read[list(special)].float()
    torch.manual_seed(seed)  # adapters do not depend on the vocabulary either
    lm = _prepared(lm, params, context)
    model = TaskModel(lm, score, params.method, params.dropout, seed, pad_id(tokenizer))
    if params.adapted:
        model.learn_special(tuple(special), tokens)
    return model.to(context.device)


def _prepared(lm: Any, params: TransferParams, context: StageContext) -> Any:
    """The model, what is not trained frozen; what is trained in fp32, also the top of a model in the compute type."""
    lm = tuning.prepare(lm, params, context)
    for value in lm.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    plain = tuning.inner(lm)
    entry, output = plain.get_input_embeddings(), plain.get_output_embeddings()
    if params.method == "full" and output.weight is not entry.weight:
        output.requires_grad_(params.auxiliary > 0)  # nothing else reads it
    return lm


def keep_first(lm: Any, count: int | None) -> None:
    """Drop all blocks but the first `count` (None: keep all); figure 2 of GPT-1.

    Raises:
        ArtifactError: the architecture has no list of its blocks.
        ParamsError: the model has fewer.
    """
    if count is None:
        return
    every, config = tuning.stack(lm), lm.config
    if every is None:
        raise ArtifactError(
            f"architecture {config.model_type}: no list of its {config.num_hidden_layers} blocks is found; set "
            "transfer.transferred_layers: null, or choose another, for example llama, gpt2, qwen3, mistral"
        )
    if count > len(every):
        raise ParamsError(f"transfer.transferred_layers: {count}; the base model has {len(every)} (null: all of them)")
    del every[count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def stand_ins(tokenizer: Any) -> Special:
    """Tokens the base knows, in whose place the learned ones stand: what opens a document, and twice the newline.

    The state of a newline tells what the line before it was about; that of a token drawn at random, which a frozen
    body has never seen, tells far less.

    Raises:
        ArtifactError: the tokenizer has no token for a newline.
    """
    ids = tokenizer.encode("\n", add_special_tokens=False)
    if not ids:
        raise ArtifactError(
            "the tokenizer has no token for a newline, in whose place delimiter and extract would stand: set "
            "transfer.special_tokens: drawn"
        )
    return Special(packing.separator_id(tokenizer), ids[-1], ids[-1])


def encode(example: Example) -> segments.Sequence:
    """An example as one sequence: what its token sequences begin with is encoded once, the rest are branches.

    Every token but `extract` is labelled with the one that follows it. What several sequences share counts once.
    """
    shared = 0
    for column in zip(*example.sequences, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    # The last shared token opens each branch, since it predicts another token in each.
    prefix = example.sequences[0][: max(0, shared - 1)]
    ids, labels = list(prefix), list(example.sequences[0][1 : len(prefix) + 1])
    branches = [0] * len(prefix)
    for number, sequence in enumerate(example.sequences, 1):
        rest = sequence[len(prefix) :]
        ids += rest
        labels += [*rest[1:], segments.UNSUPERVISED]
        branches += [number] * len(rest)
    return segments.Sequence(ids, labels, branches)


def at_extract(hidden: torch.Tensor, batch: k_way.Responses) -> torch.Tensor:
    """Hidden states (rows, length, width) where each of the N sequences of a forward pass ends: (N, width)."""
    return hidden[batch.row.to(hidden.device), batch.column.to(hidden.device)]


def head_logits(model: TaskModel, ends: torch.Tensor) -> torch.Tensor:
    """h W_y^T in fp32: (N, width) -> (N, outputs); in training mode a share of h is dropped."""
    dropped = torch.nn.functional.dropout(ends.float(), model.dropout, model.training)
    return torch.nn.functional.linear(dropped, model.score.weight.float())


def logits(model: TaskModel, batch: k_way.Responses, context: StageContext) -> torch.Tensor:
    """What the head says of each sequence of a forward pass: (N, outputs) fp32, in the order of their examples."""
    return head_logits(model, at_extract(segments.hidden_states(model.lm, batch.rows, context), batch))


def pad_id(tokenizer: Any) -> int:
    """What rows are filled up with; transformers' classifiers read the last token that is another.

    Raises:
        ArtifactError: the tokenizer has neither a padding token nor an EOS.
    """
    found = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), None)
    if found is None:
        raise ArtifactError("the tokenizer has neither a padding token nor an EOS: rows cannot be filled up")
    return int(found)


def classifier(config: Any, outputs: int, dtype: torch.dtype, device: str) -> Any:
    """A classifier of transformers with this model's body and `outputs` labels; its weights are not set.

    Raises:
        ArtifactError: transformers has none for the architecture, or one whose head is not a plain `score`.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = outputs
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device(device):
            made = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except ValueError:
        made = None
    head = getattr(made, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ArtifactError(
            f"architecture {config.model_type}: transformers has no classifier of it with a plain head 'score'; "
            "a decoder-only one is needed, for example llama, gpt2, qwen3, mistral"
        )
    return made
