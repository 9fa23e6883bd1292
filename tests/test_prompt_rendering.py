"""Rendering, examples, extraction and votes: laws, and scikit-learn as a reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core import prompt_rendering
from pipelines.core.prompt_rendering import Example, balanced, chooser, extract, messages, render, tf_idf, vote

TEXTS = ["Return the area of shape 1.", "the area, area of a circle", "Sort a list in place", "sort ascending", "no"]
POOL = [
    Example(str(number), {"text": text}, ("x", "y"), number % 2, "xy"[number % 2]) for number, text in enumerate(TEXTS)
]
PROMPT = {"kind": "classification", "template": "{{ instruction }} {{text}} ({{ options }})", "system": None}


def test_what_a_question_holds_is_text_whatever_it_looks_like() -> None:
    assert render("a {{ b }} {{b}}", {"b": "{{ c }}", "c": "x"}) == "a {{ c }} {{ c }}"
    with pytest.raises(ValueError, match="'c' has no value; given: b"):
        render("{{ b }} {{ c }}", {"b": "1"})
    turns = messages({**PROMPT, "instruction": "Is it?"}, {"text": "{{ options }} \\1"}, ["x", "y"], POOL[:2])
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[0]["content"] == "Is it? Return the area of shape 1. (x, y)" and turns[1]["content"] == "x"
    assert turns[-1]["content"] == "Is it? {{ options }} \\1 (x, y)"
    numbered = {"kind": "choice", "template": "{{ context }}\n{{ options }}\n{{ passages }}", "system": "Be brief. "}
    turns = messages({**numbered, "instruction": None}, {"context": "c"}, ["p", "q"], (), ["one", "two"])
    assert turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "c\n1. p\n2. q\n[1] one\n[2] two"},
    ]


def test_a_conversation_is_put_as_its_turns() -> None:
    """As in training; it was one message that spelled the speakers."""
    prompt = {"kind": "generation", "template": "Well: {{ prompt }}", "system": "Be kind.", "instruction": None}
    asked = {"prompt": "\n\nSystem: Be brief.\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:"}
    shown = Example("e", {"prompt": "System: No.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, (), 0, "d")
    turns = messages(prompt, asked, (), [shown])
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be kind.\n\nBe brief."),
        ("user", "a"), ("assistant", "b"), ("user", "Well: c"), ("assistant", "d"),
        ("user", "Hi."), ("assistant", "Hello."), ("user", "Well: Who are you?"),
    ]  # fmt: skip
    assert messages(prompt | {"system": None}, {"prompt": "Human: x"}, ()) == [
        {"role": "user", "content": "Well: Human: x"}
    ]
    named = {**prompt, "kind": "classification", "template": "{{ text }}", "system": None}
    assert messages(named, {"text": asked["prompt"]}, ["x"])[0]["content"] == asked["prompt"].strip()


def test_tf_idf_is_scikit_learns() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer().fit(TEXTS)
    asked = "Area of the sorted list, list"
    wanted = (vectors.transform(TEXTS) @ vectors.transform([asked]).T).toarray()[:, 0]
    assert tf_idf(TEXTS)(asked) == pytest.approx(wanted.tolist())
    assert tf_idf(TEXTS)("zebra") == [0.0] * len(TEXTS)


def test_examples_are_alike_in_scripts_without_spaces_too() -> None:
    """Each text was one word, and examples were drawn by lot."""
    texts = ["把数组上下翻转。", "打开一个网络连接。", "เปิดการเชื่อมต่อเครือข่าย", "กลับลำดับของอาร์เรย์"]
    for asked, nearest in (("怎样翻转数组", 0), ("怎样打开连接", 1), ("กลับอาร์เรย์", 3)):
        scores = tf_idf(texts)(asked)
        assert scores.index(max(scores)) == nearest and max(scores) > 0.2


def test_examples_are_balanced_and_never_the_question() -> None:
    assert balanced([4, 3, 2, 1, 0], [0, 1, 0, 1, 0], 3) == [4, 3, 2]
    assert balanced([0, 2, 4, 1], [0, 1, 0, 1, 0], 4) == [0, 1, 2, 4]
    assert balanced([0, 2], [0, 0, 0], 9) == [0, 2] and balanced([], [], 2) == []
    question = {"text": "Compute the area of a shape"}
    fixed, random, similar = (chooser(POOL, how, 2, 7) for how in ("fixed", "random", "similar"))  # type: ignore[arg-type]
    assert [one.id for one in similar(question)][-1] == "0" and {one.label for one in similar(question)} == {0, 1}
    assert fixed(question) == fixed({"text": "else"})
    drawn = {tuple(one.id for one in random({"text": str(n)})) for n in range(20)}
    assert len(drawn) > 3 and random(question) == chooser(POOL, "random", 2, 7)(question)
    assert drawn != {tuple(one.id for one in chooser(POOL, "random", 2, 8)({"text": str(n)})) for n in range(20)}
    for how in ("fixed", "random", "similar"):
        choose = chooser(POOL, how, 5, 7)  # type: ignore[arg-type]
        assert {one.id for one in choose({"text": TEXTS[1]})} == {"0", "2", "3", "4"}
    assert chooser(POOL, "none", 5, 7)(question) == [] and chooser(POOL[::-1], "given", 0, 7)(question) == POOL[::-1]


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("So the answer is Numpy.", "classification", 0),
        ("The answer is numpy. No, the answer is **pandas**!", "classification", 1),
        ("the answer is: the pandas package", "classification", 1),
        ("The answer is numpy or pandas.", "classification", None),
        ("The answer is numpydoc", "classification", None),
        ("numpy", "classification", None),
        ("The answer is 2", "classification", None),
        ("The answer is 2", "choice", 1),
        ("The answer is (2) pandas", "choice", 1),
        ("The answer is 3.", "choice", None),
        ("The answer is 0", "choice", None),
        ("", "choice", None),
    ],
)
def test_extraction(text: str, kind: str, found: int | None) -> None:
    assert extract(r".*answer is:?\s*(.+)", text, kind, ["numpy", "pandas"]) == found


def test_a_number_is_an_option_s_place_where_options_are_numbers_too() -> None:
    options = ["12", "1", "2", "4 of them"]
    told = {"2": 1, "(3)": 2, "12": 0, "12 and": 0, "3. 4 of them": 2, "4": 3, "4 of them": 3, "9" * 5000: None}
    assert {text: extract("(.+)", text, "choice", options) for text in told} == told
    assert extract("(.+)", "1", "classification", options) == 1


def test_a_name_that_is_part_of_a_longer_one_is_not_told_by_it() -> None:
    options = ["good", "very good", "C", "C++", ".net"]
    told = {"very good, as it works": 1, "good, as it works": 0, "very good or good": None, "C++ as it is quick": 3,
            "C as it is quick": 2, "C or C++": None, "the .net framework": 4, "goodness": None}  # fmt: skip
    assert {text: extract("is (.+)", f"is {text}", "classification", options) for text in told} == told


def test_a_name_with_an_ending_behind_it_is_told() -> None:
    """Korean, Chinese and Japanese answers hardly ever end behind the name: all of them were left without an option."""
    for options, told in (
        (["긍정", "부정"], {"긍정입니다.": 0, "부정적이다": 1, "비긍정": None, "긍정이나 부정": None}),
        (["正面", "负面"], {"负面的。": 1, "正面评价": 0}),
        (["肯定", "不肯定"], {"不肯定です": 1}),
    ):
        assert {text: extract("[은是は] ?(.+)", f"답은 {text}", "classification", options) for text in told} == told


def test_votes_and_ties() -> None:
    assert vote([1, 0, 1]) == (1, False)
    assert vote([2, 0, None, 0, 2]) == (2, True), "of two that are as frequent the one that was given first"
    assert vote([None, None, 3]) == (3, False) and vote([None]) == (None, False)


def test_the_file_stands_alone() -> None:
    source = Path(prompt_rendering.__file__).read_text(encoding="utf-8")
    assert "import pipelines" not in source and "from pipelines" not in source
