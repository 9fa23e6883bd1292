"""Students of a distillation: which blocks they get, and that they compute what those blocks compute."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model, prepared, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines.core import int8, language_models, student_checks, students, tuning
from pipelines.core.errors import ArtifactError, ParamsError

IDS = torch.randint(5, 250, (2, 20), generator=torch.Generator().manual_seed(1))
SLIDING = {
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
    "use_sliding_window": True,
}
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def known() -> Any:
    return tokenizer()


def teacher_of(known: Any, architecture: str, tied: bool = True) -> Any:
    """Five blocks, 32 wide, each of them different; where the architecture has layer types, two kinds of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(architecture)
    wanted = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
              "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": len(known),
              "bos_token_id": 0, "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}  # fmt: skip
    wanted |= SLIDING if hasattr(default, "layer_types") else {}
    own = {key: value for key, value in wanted.items() if hasattr(default, key)}
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **own, tie_word_embeddings=tied, initializer_range=0.3)
    ).eval()
    for name, value in made.named_parameters():  # gains and biases of one value would hide a block at a wrong place
        if value.dim() == 1:
            torch.nn.init.normal_(value, 1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    return made


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
    return found


def without_blocks(teacher: Any, kept: list[int]) -> torch.Tensor:
    """Logits of the teacher with every other block put through: its output is its input."""

    def through(_: Any, given: Any, named: Any, output: Any) -> Any:
        same = given[0] if given else named["hidden_states"]
        return (same, *output[1:]) if isinstance(output, tuple) else same

    hooks = [
        block.register_forward_hook(through, with_kwargs=True)
        for place, block in enumerate(tuning.blocks(teacher))
        if place not in kept
    ]
    found = logits(teacher)
    for hook in hooks:
        hook.remove()
    return found


def test_spacing_by_hand() -> None:
    assert students.spacing(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's; 2.2, 4.4, 6.6, 8.8 rounded
    assert students.spacing(6, 3) == [0, 3, 5]  # 2.5: halves up
    assert students.spacing(5, 2) == [0, 4]
    assert students.spacing(4, 1) == [3]
    assert students.spacing(1, 1) == [0]


def test_spacing_is_even_and_keeps_both_ends() -> None:
    for blocks in range(1, 41):
        for keep in range(2, blocks + 1):
            kept = students.spacing(blocks, keep)
            gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
            assert (kept[0], kept[-1], len(kept)) == (0, blocks - 1, keep)
            assert min(gaps) >= 1
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("keep", [-1, 0, 6])
def test_blocks_the_teacher_does_not_have(known: Any, keep: int) -> None:
    with pytest.raises(ParamsError, match=rf"distill.keep_layers: {keep}; the teacher has 5 blocks; accepted: 1 to 5"):
        students.from_layers(teacher_of(known, "llama"), keep)


def test_pairs_by_hand() -> None:
    """TinyBERT: of 12 blocks, the 3rd, 6th, 9th and 12th; 5 / 2 = 2.5 is the third."""
    assert students.pairs(12, 4) == [(2, 0), (5, 1), (8, 2), (11, 3)]
    assert students.pairs(5, 2) == [(2, 0), (4, 1)]
    assert students.pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert students.pairs(6, 1) == [(5, 0)]
    assert students.pairs(2, 4) == [(0, 1), (1, 3)]
    assert students.pairs(12, 6, students.spacing(12, 6)) == [(0, 0), (2, 1), (4, 2), (7, 3), (9, 4), (11, 5)]


def test_pairs_name_each_block_once_and_end_with_the_last() -> None:
    for theirs in range(1, 25):
        for ours in range(1, 25):
            found = students.pairs(theirs, ours)
            assert found[-1] == (theirs - 1, ours - 1)
            for side, blocks in zip(zip(*found, strict=True), (theirs, ours), strict=True):
                assert sorted(set(side)) == list(side)
                assert 0 <= side[0] < blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_student_is_the_teacher_without_the_other_blocks(known: Any, architecture: str) -> None:
    """To the bit; and the teacher is what it was, no random number used up."""
    teacher = teacher_of(known, architecture)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    drawn = torch.get_rng_state()
    student, kept = students.from_layers(teacher, 3)
    assert torch.equal(drawn, torch.get_rng_state())
    assert kept == [0, 2, 4]
    assert torch.equal(logits(student), without_blocks(teacher, kept))
    assert (logits(student) - logits(teacher)).abs().max() > 0.01
    with torch.no_grad():
        for value in student.parameters():
            value.add_(1.0)
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_layer_types_are_cut_with_the_blocks(known: Any, architecture: str) -> None:
    student, _ = students.from_layers(teacher_of(known, architecture), 3)
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert student.config.num_hidden_layers == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_changes_nothing(known: Any, architecture: str) -> None:
    """Logits token by token over the cache are those of the whole row, and so is greedy text."""
    student, _ = students.from_layers(teacher_of(known, architecture), 3)
    with torch.no_grad():
        past, rows = None, []
        for place in range(IDS.shape[1]):
            out = student(input_ids=IDS[:, place : place + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits)
        assert len(past.layers) == 3
        torch.testing.assert_close(torch.cat(rows, 1), logits(student), rtol=1e-4, atol=1e-4)
        dials = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        fast, slow = (student.generate(IDS, use_cache=cached, **dials) for cached in (True, False))
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_saved_student_is_the_same(known: Any, architecture: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = teacher_of(known, architecture, tied)
    student, _ = students.from_layers(teacher, 2)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(student))
    assert again.config.num_hidden_layers == 2
    assert again.generation_config.eos_token_id == teacher.generation_config.eos_token_id
    assert torch.equal(logits(students.from_directory(tmp_path).eval()), logits(student))
    assert student_checks.size(again) == student_checks.size(student)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_a_head_that_only_the_configuration_ties_stays_the_teachers(known: Any, tmp_path: Path) -> None:
    """transformers leaves weights that differ apart; a student, and int8, took one of the two for both."""
    apart = model(known)
    apart.config.tie_word_embeddings = False
    apart.lm_head.weight = torch.nn.Parameter(torch.randn_like(apart.lm_head.weight))
    apart.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    teacher = language_models.load(str(tmp_path), torch.float32, "sdpa").eval()
    student, _ = students.from_layers(teacher, 2)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        exact = apart(ids).logits
        assert torch.allclose(student(ids).logits, exact, atol=1e-5)
        assert (int8.quantize(teacher)(ids).logits - exact).norm() < 0.1 * exact.norm()


def test_a_configuration_that_says_nothing_of_a_tied_head(tmp_path: Path) -> None:
    """As inkling's, which has no such field: loading it ended in a traceback."""
    heads = {f"{kind}num_{part}": 1 for kind in ("", "swa_") for part in ("attention_heads", "key_value_heads")}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 32}
    few = {"vocab_size": 300, "num_hidden_layers": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("inkling_text", **few, **sizes, **heads, swa_head_dim=32)
    assert not hasattr(config, "tie_word_embeddings")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert language_models.load(str(tmp_path), torch.float32, "eager").config.tie_word_embeddings is False


def test_student_has_the_teachers_type_and_mode(known: Any) -> None:
    teacher = teacher_of(known, "llama").to(torch.bfloat16).train()
    student, kept = students.from_layers(teacher, 5)
    assert kept == [0, 1, 2, 3, 4]
    assert {value.dtype for value in student.parameters()} == {torch.bfloat16}
    assert student.training
    assert all(value.requires_grad for value in student.parameters())


def test_block_that_depends_on_its_place_is_refused(known: Any) -> None:
    teacher = teacher_of(known, "gpt2")
    teacher.config.scale_attn_by_inverse_layer_idx = True
    stanford = type(teacher)(teacher.config)  # scores of block i divided by i + 1
    with pytest.raises(ArtifactError, match="gpt2: no student.*block 2, attn: scaling is .*, in place 1"):
        students.from_layers(stanford, 3)


def test_random_student_keeps_vocabulary_and_context(known: Any) -> None:
    teacher = model(known, depth=3, length=48)
    teacher.resize_token_embeddings(320, mean_resizing=False)  # more rows than the tokenizer has tokens
    student = students.random(teacher.config, 2)
    ours, theirs = student.config, teacher.config
    for name in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "model_type"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.hidden_size, ours.num_hidden_layers, ours.num_attention_heads) == (128, 2, 2)
    student_checks.check_smaller(teacher, student)
    student_checks.check_same_rows(teacher, student)


def test_adapters_are_refused(known: Any, tmp_path: Path) -> None:
    """In memory, alone in a directory, and beside a model, where transformers puts them over it unmerged."""
    base = model(known)
    base.save_pretrained(tmp_path / "base")
    adapted = prepared(base)
    with pytest.raises(ArtifactError, match="the teacher carries adapters; merge them"):
        students.from_layers(adapted, 1)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="only an adapter"):
        students.from_directory(tmp_path / "adapter")
    adapted.save_pretrained(tmp_path / "base")
    with pytest.raises(ArtifactError, match="the teacher carries adapters; merge them"):
        students.from_layers(language_models.load(str(tmp_path / "base"), torch.float32, "sdpa"), 1)
    with pytest.raises(ArtifactError, match="adapter_config.json beside the model; merge"):
        students.from_directory(tmp_path / "base")


def test_directory_with_a_weight_missing(known: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ArtifactError, match="no config.json"):
        students.from_directory(tmp_path)
    model(known).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "model.norm.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing weights: model\.norm\.weight"):
        students.from_directory(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])  # a copy that was cut off
    with pytest.raises(ArtifactError, match="no causal language model could be loaded: .*header"):
        students.from_directory(tmp_path)


def test_a_model_of_the_hub_is_fetched_once_and_is_a_directory_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "owner/away":
            raise OSError("no such repository")
        assert "*.safetensors" in allow_patterns and not any("bin" in one for one in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert language_models.fetched("owner/name", "distill.teacher") == tmp_path and asked == ["owner/name"]
    (tmp_path / "config.json").write_text("{}")
    assert language_models.fetched(str(tmp_path), "distill.teacher") == tmp_path and len(asked) == 1
    with pytest.raises(ArtifactError, match="student: owner/away: the hub did not give it: no such repository"):
        language_models.fetched("owner/away", "distill.student")


def test_one_file_is_no_directory_for_those_who_read_it_in_other_ways(tmp_path: Path) -> None:
    """They ended in a traceback, or in a process that had died, after the training."""
    (tmp_path / "a.gguf").write_bytes(b"")
    for name in (str(tmp_path / "a.gguf"), "smollm2-135m"):
        with pytest.raises(ParamsError, match=rf"quantize\.model: {name} is one GGUF file .* a Hugging Face directory"):
            language_models.fetched(name, "quantize.model")
