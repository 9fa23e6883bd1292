"""PPO-ptx: the gradient of a step is PPO's plus the coefficient times the language model's, however it is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from models import TEXTS, model, prepared, tokenizer
from test_ppo_params import PLAIN

from pipelines.core import attention, distributed, packing, ptx
from pipelines.core.context import StageContext
from pipelines.core.distributed import World
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.params.ppo import PpoParams

PARAMS = PpoParams.model_validate(PLAIN | {"ptx_rows": 5, "ptx_length": 32, "micro_tokens": 64, "ptx_coefficient": 0.7})
STEP, COEFFICIENT = 3, 0.7
Gradients = dict[str, torch.Tensor]


def policy(known: Any, method: str) -> Any:
    """A tiny policy whose adapters, where it has them, have learned something: fresh ones give no gradient to A."""
    plain = model(known, attention=attention.choose("cpu", 64))
    if method == "full":
        return plain
    torch.manual_seed(1)
    wrapped = prepared(plain).eval()
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return wrapped


def stream(known: Any, place: Path) -> packing.PackedRows:
    packing.write_stream(known, TEXTS, place)
    return packing.PackedRows(place, PARAMS.ptx_length, packing.separator_id(known), PARAMS.seed)


def some_loss(lm: Any, rank: int) -> torch.Tensor:
    """Stands for PPO's: its gradient is nothing like a language model's."""
    ids = torch.arange(40).view(2, 20) + 7 * rank
    scores: torch.Tensor = lm(input_ids=ids).logits
    return scores[:, :, 5 + rank].square().mean()


def reference(lm: Any, text: packing.PackedRows) -> torch.Tensor:
    """The language-model loss of a step from transformers' own logits, all rows at once."""
    batch = text.batch(STEP * PARAMS.ptx_rows, PARAMS.ptx_rows)
    mask = packing.attention_mask(batch.documents, torch.float32)
    logits = lm(input_ids=batch.ids, attention_mask=mask, position_ids=batch.positions).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def gradients(lm: Any, loss: torch.Tensor) -> Gradients:
    named = {name: value for name, value in lm.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if one is None else one for name, one in zip(named, found, strict=True)}


def norm(parts: Gradients) -> float:
    return float(torch.stack([part.square().sum() for part in parts.values()]).sum().sqrt())


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def trained(lm: Any) -> list[torch.nn.Parameter]:
    return [value for value in lm.parameters() if value.requires_grad]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("micro_tokens", [32, 64, 1024])
def test_the_gradient_is_the_sum_of_both(
    method: str, micro_tokens: int, known: Any, tmp_path: Path, context: StageContext
) -> None:
    lm, text = policy(known, method), stream(known, tmp_path / "t")
    plain, added = gradients(lm, some_loss(lm, 0)), gradients(lm, reference(lm, text))
    some_loss(lm, 0).backward()  # type: ignore[no-untyped-call]
    params = PARAMS.model_copy(update={"micro_tokens": micro_tokens})
    told = ptx.accumulate(lm, trained(lm), text, STEP, params, COEFFICIENT, context)
    for name, value in lm.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, plain[name] + COEFFICIENT * added[name], atol=1e-6, rtol=1e-4)
        else:
            assert value.grad is None
    assert told.loss == pytest.approx(reference(lm, text).item(), rel=1e-5)
    assert told.ppo_norm == pytest.approx(norm(plain), rel=1e-4)
    assert told.ptx_norm == pytest.approx(COEFFICIENT * norm(added), rel=1e-4)
    assert told.ppo_norm != pytest.approx(told.ptx_norm, rel=0.1)


def test_where_ppo_gives_no_gradient_the_added_one_stands(known: Any, tmp_path: Path, context: StageContext) -> None:
    lm, text = policy(known, "full"), stream(known, tmp_path / "t")
    added = gradients(lm, reference(lm, text))
    told = ptx.accumulate(lm, trained(lm), text, STEP, PARAMS, COEFFICIENT, context)
    assert told.ppo_norm == 0.0
    for name, value in lm.named_parameters():
        torch.testing.assert_close(value.grad, COEFFICIENT * added[name], atol=1e-6, rtol=1e-4)


def test_another_role_on_the_same_backbone_is_left_alone(known: Any, tmp_path: Path, context: StageContext) -> None:
    lm, text = policy(known, "lora"), stream(known, tmp_path / "t")
    added = gradients(lm, reference(lm, text))
    lm.add_adapter("value", lm.peft_config["default"])
    for name, value in lm.named_parameters():
        value.requires_grad_("lora" in name)
        if ".value." in name and value.requires_grad:
            value.grad = torch.ones_like(value)  # of its own loss, in the same minibatch
    ours = [value for name, value in lm.named_parameters() if ".default." in name]
    told = ptx.accumulate(lm, ours, text, STEP, PARAMS, COEFFICIENT, context)
    assert told.ptx_norm == pytest.approx(COEFFICIENT * norm(added), rel=1e-4)
    others = [value.grad for name, value in lm.named_parameters() if ".value." in name]
    assert told.ppo_norm == 0.0 and others and all(one is not None and (one == 1).all() for one in others)


def test_every_step_has_rows_of_its_own(
    known: Any, tmp_path: Path, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of step after step follow one another; the same step again sees the same rows."""
    text, draw = stream(known, tmp_path / "t"), packing.PackedRows.batch
    seen: list[tuple[int, int]] = []

    def watched(rows: packing.PackedRows, first: int, count: int) -> packing.Batch:
        seen.append((first, count))
        return draw(rows, first, count)

    monkeypatch.setattr(packing.PackedRows, "batch", watched)
    lm = policy(known, "lora")
    for step in (0, 1, 1):
        ptx.accumulate(lm, trained(lm), text, step, PARAMS, COEFFICIENT, context)
    numbers = [first + n for first, count in seen for n in range(count)]
    assert numbers == [*range(5), *range(5, 10), *range(5, 10)] and max(count for _, count in seen) == 2


def _process(rank: int, root: Path) -> None:
    """One of two processes: its part of PPO's gradient, the pre-training gradient, and the average of an update."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(root / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    lm = policy(tokenizer(), "lora")
    text = packing.PackedRows(root / "t", PARAMS.ptx_length, packing.separator_id(tokenizer()), PARAMS.seed)
    context = StageContext(stage="test", root=root, fingerprint="0" * 64, world=World(rank, 2))
    some_loss(lm, rank).backward()  # type: ignore[no-untyped-call]
    told = ptx.accumulate(lm, trained(lm), text, STEP, PARAMS, COEFFICIENT, context)
    named = {name: value for name, value in lm.named_parameters() if value.requires_grad}
    distributed.average_gradients(list(named.values()), context.world)
    torch.save((tuple(told), {name: value.grad for name, value in named.items()}), root / f"found-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_one(known: Any, tmp_path: Path) -> None:
    """Five rows in passes of two are three passes: one process does the last once more, for nothing."""
    text, lm = stream(known, tmp_path / "t"), policy(known, "lora")
    plain = gradients(lm, (some_loss(lm, 0) + some_loss(lm, 1)) / 2)
    added = gradients(lm, reference(lm, text))
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    (one, first), (two, second) = (torch.load(tmp_path / f"found-{rank}") for rank in (0, 1))
    assert one == two == pytest.approx((reference(lm, text).item(), norm(plain), COEFFICIENT * norm(added)), rel=1e-4)
    for name in plain:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], plain[name] + COEFFICIENT * added[name], atol=1e-6, rtol=1e-4)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[[list[str]], Path]:
    """A `data` artifact with these texts to train on."""

    def make(texts: list[str]) -> Path:
        (tmp_path / "data/corpus").mkdir(parents=True)
        rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/corpus/train.parquet")
        return tmp_path / "data"

    return make


def test_rows_come_from_the_corpus_once(known: Any, corpus: Callable[[list[str]], Path], context: StageContext) -> None:
    data = corpus(TEXTS)
    found = ptx.rows(PARAMS, 2, data, known, context)
    separator = packing.separator_id(known)
    expected = [token for ids in packing.encode(known, TEXTS) for token in (separator, *ids)] + [separator]
    assert found.stream.tolist() == expected, "a short run still gets text enough for rows"
    assert found.length == PARAMS.ptx_length and found.seed == PARAMS.seed
    (data / "corpus/train.parquet").unlink()
    assert ptx.rows(PARAMS, 2, data, known, context).stream.tolist() == expected, "kept for a run that goes on"


def test_no_text_and_too_little_text_are_refused(
    known: Any, corpus: Callable[[list[str]], Path], tmp_path: Path, context: StageContext
) -> None:
    with pytest.raises(ArtifactError, match="no table corpus"):
        ptx.rows(PARAMS, 2, tmp_path, known, context)
    with pytest.raises(DataError, match=r"less than one row of ppo\.ptx_length = 32"):
        ptx.rows(PARAMS, 2, corpus(["a"]), known, context)
