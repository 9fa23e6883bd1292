"""What is supervised in a chat, for random chats and several templates; and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
from models import tokenizer

from pipelines.core import chats
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.fields import transcript
from pipelines.tokenizer import CHAT_TEMPLATE

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE
)
TRIMMED = (  # as of Llama 3: contents trimmed, a token of its own before the text, nothing after EOS
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|endoftext|>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
BRACKETS = (  # as of Mistral: no word opens the answer, which begins and ends with a space
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' <|im_end|>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
ENDS_A_CHAT = (  # as of Phi 4, whose turns end with <|end|>
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {"chatml": CHAT_TEMPLATE, "system": DEFAULT_SYSTEM, "trimmed": TRIMMED, "brackets": BRACKETS}
WORDS = [
    "area",
    "of",
    "\n",
    "<|im_end|>",
    "<|im_start|>",
    "assistant",
    "é",
    "  ",
    "<|pad|>",
    "return",
    "\U000f0000",
    "]",
]


def known(template: str | None = CHAT_TEMPLATE) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


def random_chat(number: int) -> list[chats.Message]:
    """User and assistant by turns, a system's message before some; words of all kinds, special spellings among them."""
    draw = random.Random(number)

    def said() -> str:
        return "a" + "".join(draw.choices(WORDS, k=draw.randint(0, 6))) + "z"

    head = [{"role": "system", "content": said()}] if draw.random() < 0.3 else []
    turns = [{"role": role, "content": said()} for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]
    return head + turns


def supervised_runs(chat: chats.Chat) -> list[list[int]]:
    runs: list[list[int]] = []
    previous = False
    for token, kept in zip(chat.ids, chat.supervised, strict=True):
        if kept and not previous:
            runs.append([])
        if kept:
            runs[-1].append(token)
        previous = kept
    return runs


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_mask_laws_over_random_chats(template: str) -> None:
    """The answers and their EOS are supervised, whole, and nothing else."""
    tokens = known(template)
    chats.check_tokenizer(tokens)
    specials = set(tokens.added_tokens_decoder)
    for number in range(60):
        chat = random_chat(number)
        encoded = chats.encode(tokens, chat)
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        runs = supervised_runs(encoded)
        assert [tokens.decode(run[:-1]).strip() for run in runs] == answers
        assert all(run[-1] == tokens.eos_token_id and not specials & set(run[:-1]) for run in runs)
        assert encoded.supervised[-1] and not encoded.supervised[0]
        assert (
            tokens.decode(encoded.ids)
            == tokens.apply_chat_template(chat, tokenize=False)[: len(tokens.decode(encoded.ids))]
        )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_and_its_response_make_the_chat(template: str) -> None:
    tokens = known(template)
    for number in range(60):
        chat = random_chat(number)
        prompt = chats.encode_prompt(tokens, chat[:-1])
        response = chats.encode_response(tokens, chat[-1]["content"])
        assert prompt + response == chats.encode(tokens, chat).ids
        assert chats.decode_response(tokens, response) == chat[-1]["content"]


def test_the_tokens_are_those_of_the_template_itself() -> None:
    """Where nobody spells a special token: what transformers would give."""
    for template in TEMPLATES.values():
        tokens = known(template)
        chat = [{"role": "user", "content": "What is\n\narea?"}, {"role": "assistant", "content": "Return 7 \n x"}]
        theirs = tokens.apply_chat_template(chat, return_dict=False)
        ours = chats.encode(tokens, chat).ids
        assert ours == theirs[: len(ours)] and len(theirs) - len(ours) <= 1
        prompt = tokens.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        assert chats.encode_prompt(tokens, chat[:1]) == prompt


def test_a_special_token_that_swallows_white_space() -> None:
    from tokenizers import AddedToken

    tokens = known()
    tokens.add_tokens([AddedToken("<|im_end|>", rstrip=True, special=True)], special_tokens=True)
    chat = [{"role": "user", "content": "What <|im_end|> is"}, {"role": "assistant", "content": "area"}]
    plain = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "area"}]
    theirs = tokens.apply_chat_template(plain, return_dict=False)
    ours = chats.encode(tokens, plain).ids
    assert ours == theirs[: len(ours)]
    assert chats.encode(tokens, chat).ids.count(tokens.eos_token_id) == 2


def test_an_empty_response_is_eos_alone() -> None:
    tokens = known()
    assert chats.encode_response(tokens, "") == [tokens.eos_token_id]
    assert chats.decode_response(tokens, [tokens.eos_token_id]) == ""


def test_prompts_as_stored() -> None:
    for number in range(40):
        chat = random_chat(number)[:-1]
        said = [{**message, "content": message["content"].strip()} for message in chat]
        assert chats.messages_of(transcript(said, "prompt")) == said
        for end in (" ", "\n") if len(said) > 1 else ():
            assert chats.messages_of(transcript(said, "prompt") + end) == said
    quoted = [
        {"role": "user", "content": "Go on:\n\nHuman: hi\n\nAssistant:"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Human: again"},
    ]
    read = chats.messages_of(transcript(quoted, "prompt"))
    assert [one["role"] for one in read] == ["user", "assistant", "user"], "what a message quotes opens no turn"
    assert read[0]["content"] == "Go on:\n\n Human: hi\n\n Assistant:" and read[1:] == quoted[1:]
    for text in ("", "Plain", "Human: hello", "Say\n\nHuman: x\n\nAssistant:", "\n\nAssistants:\n\nAssistant:"):
        assert chats.messages_of(text) == [{"role": "user", "content": text}]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        ([], "without messages"),
        ([USER], "ends with the user"),
        ([USER, ANSWER, USER], "ends with the user"),
        ([USER, {"role": "tool", "content": "x"}, ANSWER], "message 2 has role 'tool'.*system, user, assistant"),
        ([USER, {"role": "assistant", "content": " \n"}], "message 2 is an empty answer"),
        ([ANSWER], "begins with an answer"),
        ([{"role": "user", "content": None}, ANSWER], "content None"),
    ],
)
def test_chats_refused(chat: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        chats.encode(known(), chat)


def test_a_chat_the_template_refuses() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    with pytest.raises(DataError, match="refuses this chat: no system, please"):
        chats.encode(known(strict + CHAT_TEMPLATE), [{"role": "system", "content": "s"}, USER, ANSWER])


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "no chat template"),
        (CHAT_TEMPLATE.replace("eos_token + ", ""), "does not end an answer with EOS"),
        (CHAT_TEMPLATE.replace("for message in messages", "for message in messages[-2:]"), "from left to right"),
        (CHAT_TEMPLATE.replace("assistant\n", "model\n"), "from left to right"),
        (ENDS_A_CHAT, "ends a chat with EOS .*, but not each answer in it.* Set eos_token"),
    ],
)
def test_templates_refused(template: str | None, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        chats.check_tokenizer(known(template))


def test_padding_refused() -> None:
    tokens = known()
    tokens.pad_token = tokens.eos_token
    with pytest.raises(ArtifactError, match="as pad token and as EOS.*never learn to stop"):
        chats.check_tokenizer(tokens)
    tokens.pad_token = None
    with pytest.raises(ArtifactError, match="no pad token"):
        chats.check_tokenizer(tokens)


def test_a_tokenizer_that_marks_the_beginning_of_each_piece_is_refused() -> None:
    from tokenizers import normalizers

    tokens = known(BRACKETS)
    tokens.backend_tokenizer.normalizer = normalizers.Prepend("_")
    with pytest.raises(ArtifactError, match="byte-level"):
        chats.check_tokenizer(tokens)
