"""Gold judges by hand-worked answers and on people's answers; simulated labelers; what rankings say of themselves."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from statistics import NormalDist

import pytest

from pipelines.core import agreement, judges, labelers, rankings, slots
from pipelines.core.errors import DataError
from pipelines.core.text_scores import chrf, rouge_l

E2E = Path(__file__).parents[2] / "shared/data/e2e_clean_demonstrations.jsonl.gz"
PROMPT = (
    "name[The Mill], eatType[pub], food[Indian], priceRange[£20-25], customer rating[high], area[riverside], "
    "familyFriendly[no], near[Raja Indian Cuisine]"
)


@pytest.mark.parametrize(
    ("answer", "missing", "wrong"),
    [
        (
            "The Mill is a highly rated pub near Raja Indian Cuisine. It serves moderately priced Indian food by the "
            "river and is not family-friendly.",
            "", "",
        ),
        (
            "The Mill, a riverside pub close to Raja Indian Cuisine, has Indian food at £20 to £25, 5 out of 5 stars; "
            "adults only.",
            "", "",
        ),
        # Raja Indian Cuisine next door is no Indian food; expensive and kids contradict; the city centre too.
        (
            "Near Raja Indian Cuisine in the city centre is The Mill, an expensive pub that welcomes kids.",
            "food, priceRange, customer rating, area, familyFriendly", "priceRange, area, familyFriendly",
        ),
        ("Aromi is a coffee shop near Burger King.", "everything", "eatType, near"),
        ("The Mill is a restaurant.", "everything but name", ""),  # the noun for any of them
        ("It has a low price and a high customer rating.", "everything but customer rating", "priceRange"),
        ("", "everything", ""),
    ],
)  # fmt: skip
def test_slots_by_hand(answer: str, missing: str, wrong: str) -> None:
    every = set(slots.asked(PROMPT))
    assert len(every) == 8
    found = slots.judge(PROMPT, answer)
    want = every - {missing.removeprefix("everything but ")} if missing.startswith("everything") else set()
    assert found.missing == (want or set(filter(None, missing.split(", "))))
    assert found.wrong == set(filter(None, wrong.split(", ")))
    assert found.realised == every - found.missing
    assert found.score() == pytest.approx(max(0.0, (len(found.realised) - len(found.wrong)) / 8))


def test_placeholders_are_not_words() -> None:
    prompt = "name[NAME], area[city centre], near[NEAR]"
    assert slots.judge(prompt, "NAME is near the city centre.").missing == {"near"}
    assert slots.judge(prompt, "NAME is in the city centre near NEAR.").score() == 1.0
    assert slots.judge("name[NAME], food[French]", "NAME has French food near NEAR.").wrong == {"near"}
    assert slots.judge("name[NAME], food[Thai]", "NAME has Thai food.").score() == 1.0  # a value we do not know


def test_gold_is_deterministic_bounded_and_names_what_it_needs() -> None:
    reference, answer = "Return the area of a shape.", "Return the size of a shape, which is a number."
    assert judges.gold("overlap", "p", reference, reference) == pytest.approx(1.0)
    assert judges.gold("overlap", "p", answer, reference) == pytest.approx(
        (chrf(answer, reference, beta=1) + rouge_l(answer, reference)) / 2
    )
    assert 0 < judges.gold("overlap", "p", answer + " and then some more words", reference) < 0.7
    assert judges.gold("overlap", "p", "", reference) == 0 == judges.gold("slots", PROMPT, "", None)
    with pytest.raises(
        DataError, match=r'overlap needs a reference, and the prompt text "p" has none.*column reference'
    ):
        judges.gold("overlap", "p", "a", None)
    with pytest.raises(DataError, match=r"slots needs prompts that list attributes, such as name\[Aromi\]"):
        judges.gold("slots", "p", "a", None)


@pytest.mark.skipif(not E2E.exists(), reason=f"{E2E} is not there")
def test_people_say_what_the_prompt_asks_for() -> None:
    with gzip.open(E2E, "rt", encoding="utf-8") as file:
        rows = random.Random(0).sample([json.loads(line) for line in file], 600)
    own = [slots.judge(row["prompt"], row["completion"]) for row in rows]
    others = [
        slots.judge(row["prompt"], other["completion"]) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    assert sum(one.score() for one in own) / len(own) > 0.94  # the data's own errors are about as many
    assert sum(one.score() for one in others) / len(others) < 0.15
    # Answers to prompts with the same name differ in what else they say, which is what K samples differ in.
    by_name: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_name.setdefault(row["prompt"].split("]")[0], []).append(row)
    near = [
        slots.judge(first["prompt"], second["completion"]).score()
        for group in by_name.values()
        for first, second in zip(group, group[1:], strict=False)
        if first["prompt"] != second["prompt"]
    ]
    assert sum(near) / len(near) < 0.6


NAMES = ("ada", "ben", "cleo", "dov", "eve")


def test_labelers_are_people_of_their_own() -> None:
    people = [labelers.labeler(name, "overlap") for name in NAMES]
    assert len({one.weight for one in people}) == len({one.slip for one in people}) == 5
    assert all(0.2 < one.weight < 0.8 and 0.75 < one.slip / labelers.SLIP < 1.25 for one in people)
    random_scores = random.Random(1)
    seen = [judges.Aspects(random_scores.random() * 0.6, random_scores.random() * 0.6) for _ in range(400)]
    points = [[labelers.points(one, "overlap", "p", str(n), a) for n, a in enumerate(seen)] for one in people]
    assert {point for row in points for point in row} <= set(range(1, 8))
    assert len(set(map(tuple, points))) == 5
    for row in points:  # a taste with slips, but a taste: better answers get more points
        best = sorted(range(400), key=lambda n: -sum(seen[n]))
        assert sum(row[n] for n in best[:100]) > sum(row[n] for n in best[-100:]) + 150


def test_slips_are_of_the_stated_size_and_of_each_answer_its_own() -> None:
    who = labelers.labeler("ada", "slots")
    points = [labelers.points(who, "slots", "p", str(n), judges.Aspects(0.5, 0.5)) for n in range(4000)]
    assert sum(points) / 4000 == pytest.approx(4.0, abs=0.06)
    slips = NormalDist(0.0, who.slip)
    off = 1 - (slips.cdf(0.5) - slips.cdf(-0.5))  # share that rounds to another point than 4
    assert sum(point != 4 for point in points) / 4000 == pytest.approx(off, rel=0.15)


def test_the_same_answer_is_seen_the_same_way_and_order_does_not_matter() -> None:
    who = labelers.labeler("ada", "slots")
    answers, seen = ["x", "y", "x", "z"], [judges.Aspects(v, 0.5) for v in (0.9, 0.2, 0.9, 0.5)]
    ranks = labelers.rank(who, "slots", "p", answers, seen)
    assert ranks[0] == ranks[2]
    assert labelers.rank(who, "slots", "p", answers[::-1], seen[::-1]) == ranks[::-1]
    assert set(ranks) == set(range(1, len(set(ranks)) + 1))


def test_each_prompt_has_one_labeler_and_a_share_has_all() -> None:
    given = [labelers.assigned(NAMES, f"p{n}", 0.25, 7) for n in range(4000)]
    shared = [names for names in given if len(names) == 5]
    assert len(shared) / 4000 == pytest.approx(0.25, abs=0.03)
    counts = [sum(names == [name] for names in given) for name in NAMES]
    assert sum(counts) + len(shared) == 4000 and min(counts) > 500
    assert labelers.assigned(NAMES, "p1", 0.25, 7) == given[1]


def test_agreement_by_hand() -> None:
    # Pairs (0,1), (0,2), (1,2): the first two agree on (0,1) and (0,2); the second ties (1,2).
    assert agreement.agreement([[1, 2, 3], [1, 2, 2]]) == (2, 2)
    assert agreement.agreement([[1, 2], [2, 1], [1, 2]]) == (1, 3)
    assert agreement.agreement([[1, 1], [1, 2]]) == (0, 0) == agreement.agreement([[1, 2]])
    assert agreement.kendall_tau([[[1, 2, 3], [3, 2, 1]], [[1, 2, 3], [1, 2, 3]]]) == pytest.approx(0.0)
    # tau-b of (1,2,3) and (1,2,2): 2 concordant of sqrt(3 * 2) pairs.
    assert agreement.kendall_tau([[[1, 2, 3], [1, 2, 2]]]) == pytest.approx(2 / 6**0.5)
    assert agreement.kendall_tau([[[1, 1], [1, 2]], [[1, 2]]]) is None


def test_labelers_may_have_had_the_answers_in_another_order() -> None:
    # As in tables of chosen and rejected: who disagrees has the two in the other order, and prefers the first as well.
    tallies = {split: rankings.Tally() for split in ("train", "test")}
    for number, tally in enumerate(tallies.values()):
        for who, answers in (("ada", ["x", "y"]), ("ben", ["x", "y"]), ("eve", ["y", "x"])):
            tally.add(rankings.Comparison(f"{number}{who}", f"g{number}", "p", answers, [1, 2], who, None, None))
    found = rankings.figures(tallies)
    assert (found["agreement"], found["kendall_tau"]) == (pytest.approx(1 / 3), pytest.approx(-1 / 3))
    assert found["longer_wins"] == 0.5 and found["labelers"] == 3


def test_length_by_hand() -> None:
    # The longest is best, two have one length: (0,1) longer wins, (0,2) longer wins, (1,2) a toss.
    assert agreement.longer_wins(["aaa", "b", "c"], [1, 2, 3]) == (2.5, 3)
    assert agreement.longer_wins(["aaa", "b", "c"], [2, 1, 1]) == (0, 2)
    total = agreement.total([agreement.Counted(2.5, 3), agreement.Counted(0, 2)])
    assert total == (2.5, 5) and total.share == 0.5
    # In train the shorter wins: that is the rule, whatever test says.
    shorter, longer = agreement.Counted(1, 4), agreement.Counted(3, 4)
    assert agreement.length_only_accuracy(shorter, longer) == 0.25
    assert agreement.length_only_accuracy(longer, longer) == 0.75 == agreement.length_only_accuracy(shorter, shorter)
