"""The K-way loss by hand and against references; who is held out; calibration; best-of-n by enumeration."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.calibration import calibration_curve

from pipelines.core import best_of_n_curve, calibration, preference_data, preferences, reward_examples, segments
from pipelines.core.errors import ArtifactError, DataError
from pipelines.core.preference_data import Ranking


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def loss(rewards: torch.Tensor, *ranks: list[int]) -> torch.Tensor:
    decided = [preferences.pairs(one) for one in ranks]
    return preferences.k_way_loss(rewards, preferences.flat(decided, [len(one) for one in ranks], len(ranks)))


def test_three_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)  # the gaps are 1, 2 and 1
    value = loss(rewards, [1, 2, 3])
    value.backward()
    assert float(value.detach()) == pytest.approx((0.3132617 + 0.1269280 + 0.3132617) / 3, abs=1e-6)
    gradient = [-(sigmoid(-1) + sigmoid(-2)) / 3, 0.0, (sigmoid(-1) + sigmoid(-2)) / 3]
    assert rewards.grad is not None and rewards.grad.tolist() == pytest.approx(gradient, abs=1e-6)


def test_ties_are_dropped_and_the_mean_is_over_what_is_left() -> None:
    assert preferences.pairs([1, 1, 2]) == [(0, 2), (1, 2)]
    assert preferences.pairs([2, 2, 2]) == []
    value = loss(torch.tensor([0.5, 3.0, 0.0]), [1, 1, 2])
    assert float(value) == pytest.approx(-(math.log(sigmoid(0.5)) + math.log(sigmoid(3.0))) / 2)
    with pytest.raises(ValueError, match="ranking 1 has no pair"):
        preferences.flat([[(0, 1)], []], [2, 2], 2)


def test_identical_texts_decide_nothing() -> None:
    assert preferences.pairs([1, 2, 3], ["a", "a", "b"]) == [(0, 2), (1, 2)]


def test_two_are_bradley_terry() -> None:
    strong, weak = 1.7, 0.4
    value = loss(torch.tensor([weak, strong]), [2, 1])
    assert float(value) == pytest.approx(-math.log(math.exp(strong) / (math.exp(strong) + math.exp(weak))))


def test_pairs_alone_are_trls_loss() -> None:
    """TRL's RewardTrainer.compute_loss: -logsigmoid(chosen - rejected).mean()."""
    torch.manual_seed(0)
    rewards = torch.randn(40)
    chosen, rejected = rewards[::2], rewards[1::2]
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(loss(rewards, *[[1, 2]] * 20), expected)


def test_every_ranking_weighs_the_same_whatever_k() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(11)
    parts = [loss(rewards[:2], [1, 2]), loss(rewards[2:], [3, 1, 2, 2, 5, 4, 6, 6, 1])]
    torch.testing.assert_close(loss(rewards, [1, 2], [3, 1, 2, 2, 5, 4, 6, 6, 1]), sum(parts) / 2)


def test_parts_of_a_step_add_up_to_it() -> None:
    torch.manual_seed(0)
    rewards, ranks = torch.randn(12), [[1, 2, 3], [2, 1, 2], [1, 2, 2], [3, 2, 1]]
    parts = [
        preferences.k_way_loss(rewards[3 * n : 3 * n + 3], preferences.flat([preferences.pairs(one)], [3], 4))
        for n, one in enumerate(ranks)
    ]
    torch.testing.assert_close(loss(rewards, *ranks), sum(parts))


def test_order_is_of_no_consequence() -> None:
    torch.manual_seed(0)
    rewards, ranks = torch.randn(5), [2, 1, 3, 3, 1]
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 13):
        moved = loss(rewards[list(order)], [ranks[place] for place in order])
        torch.testing.assert_close(moved, loss(rewards, ranks))


def test_right_counts_what_cannot_be_told_apart_as_half() -> None:
    assert preferences.right([3.0, 1.0, 1.0], [(0, 1), (1, 2), (2, 0)]) == 1.5


# --- who learns from what ------------------------------------------------------------------------------------


def ranking(number: int, labeler: str | None = None, **changes: Any) -> Ranking:
    one = Ranking(f"r{number}", f"g{number}", f"prompt {number}", ("long answer", "short"), (1, 2), labeler)
    return one._replace(**changes)


def test_a_kept_out_labeler_teaches_nothing_and_is_measured_on_fresh_prompts() -> None:
    draw = random.Random(0)
    train = [ranking(n, draw.choice("ABC")) for n in range(60)]
    shared = [(n, other) for n in range(9) for other in "DE"]
    train += [ranking(100 + m, who, prompt=f"prompt {n}", group=f"g{n}") for m, (n, who) in enumerate(shared)]
    test = [ranking(200 + n, draw.choice("ABCDE")) for n in range(20)]
    names = set()
    for seed in range(12):
        sides = preference_data.part(train, test, 2, seed)
        names |= sides.unseen
        assert len(sides.unseen) == 2 and not {one.labeler for one in sides.train} & sides.unseen
        assert not {one.task for one in sides.train} & {one.task for one in sides.held_out}
        assert not {one.group for one in sides.train} & {one.group for one in sides.held_out}
        assert set(test) <= set(sides.held_out)
        assert preference_data.part(train, test, 2, seed) == sides
    assert names == set("ABCDE"), "which labelers are kept out depends on the seed"


def test_nobody_is_kept_out_where_nobody_is_named() -> None:
    sides = preference_data.part([ranking(1), ranking(2)], [ranking(3)], 1, 0)
    assert not sides.unseen and len(sides.train) == 2


def test_who_ranked_nothing_but_test_prompts_is_unseen_without_a_dial() -> None:
    """As where people bring rankings of training and of held-out labelers in two files, as in the paper."""
    test = [ranking(10 + n, "CD"[n % 2]) for n in range(4)]
    for seed in range(8):
        train = [ranking(n, "AB"[n % 2]) for n in range(6)]
        assert preference_data.part(train, test, 0, seed).unseen == {"C", "D"}
        more = preference_data.part(train, test, 1, seed)
        assert more.unseen > {"C", "D"} and len(more.unseen) == 3 and len(more.train) == 3
        alone = preference_data.part([one._replace(labeler="A") for one in train], test, 1, seed)
        assert alone.unseen == {"C", "D"} and len(alone.train) == 6, "who taught everything cannot be kept out"
    assert not preference_data.part([*train, ranking(7)], test, 0, 0).unseen, "the one without a name may be C"


def test_a_prompt_is_one_element_in_whatever_order_its_responses_were_ranked() -> None:
    rankings = [
        ranking(1, "A", responses=("x", "y", "z"), ranks=(1, 2, 3)),
        ranking(2, "B", responses=("z", "x", "y"), ranks=(1, 2, 2), prompt="prompt 1"),
        ranking(3, "B", responses=("x", "y", "z"), ranks=(1, 2, 3)),
    ]
    sequences = [segments.of_completions([1, 2], [[ord(text)] for text in one.responses]) for one in rankings]
    found = reward_examples.by_prompt(reward_examples.Encoded(rankings, sequences, 0))
    assert found.sequences == [sequences[0], sequences[2]]
    assert found.pairs == [[(0, 1), (0, 2), (1, 2), (2, 0), (2, 1)], [(0, 1), (0, 2), (1, 2)]]


def test_rankings_that_decide_nothing_are_left_out_and_counted() -> None:
    tied, same = ranking(2, ranks=(1, 1)), ranking(3, responses=("x", "x"))
    sides = preference_data.part([ranking(1), tied, same], [ranking(4), ranking(5, ranks=(2, 2))], 0, 0)
    assert [one.id for one in sides.train] == ["r1"] and [one.id for one in sides.held_out] == ["r4"]
    assert sides.left_out == 3


@pytest.mark.parametrize(
    ("train", "test", "labelers", "told"),
    [
        ([ranking(1, ranks=(1, 1))], [ranking(2)], 0, r"train.parquet: none of its 1 rankings decides a pair"),
        ([ranking(1)], [ranking(2, ranks=(1, 1))], 0, r"test.parquet: none of its 1 rankings decides a pair"),
        ([ranking(1), ranking(2)], [ranking(3, prompt=" prompt 2\n")], 0, r"train and test: r2 and r3"),
        ([ranking(1)], [ranking(1, prompt="other")], 0, r"1 ids stand more than once, e.g. r1"),
        ([ranking(1, "A"), ranking(2, "B")], [ranking(3, "A")], 2, r"2 labelers cannot be kept out of 2 .*at most 1"),
        ([ranking(1, prompt="")], [ranking(2, prompt="", responses=("short", "long answer"))], 0, "r1 and r2"),
    ],
)
def test_refused(train: list[Ranking], test: list[Ranking], labelers: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        preference_data.part(train, test, labelers, 0)


def test_jokes_without_a_prompt_are_different_tasks() -> None:
    other = ranking(2, prompt="", responses=("a third", "a fourth"))
    assert preference_data.part([ranking(1, prompt="")], [other], 0, 0).train


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"responses": ["one"], "ranks": [1]}, r"ranking 'r7' has 1 response"),
        ({"ranks": [1, 2, 3]}, r"ranking 'r7' has 2 responses and ranks \[1, 2, 3\]"),
        ({"ranks": [1, None]}, "one rank for each"),
        ({"responses": ["one", None]}, "response 2 is null"),
    ],
)
def test_no_ranking(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    (tmp_path / "comparisons").mkdir()
    row = {"id": "r7", "group": "g", "prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": None}
    pq.write_table(pa.Table.from_pylist([row | changes]), tmp_path / "comparisons/train.parquet")
    with pytest.raises(DataError, match=told):
        preference_data.read(tmp_path, "train")
    with pytest.raises(ArtifactError, match="dvc repro feedback"):
        preference_data.read(tmp_path, "test")


def test_the_longer_one() -> None:
    assert preference_data.longer_wins([ranking(1), ranking(2), ranking(3, ranks=(2, 1))])
    assert not preference_data.longer_wins([ranking(1), ranking(2, ranks=(2, 1)), ranking(3, ranks=(2, 1))])


def test_who_is_shown_first_does_not_know_who_won() -> None:
    shown = [preference_data.shown_first(ranking(n), (0, 1)) for n in range(400)]
    assert shown == [preference_data.shown_first(ranking(n), (1, 0)) for n in range(400)]
    assert 160 < sum(shown) < 240


def test_some_are_the_same_however_many_there_are() -> None:
    every = [ranking(n) for n in range(50)]
    few, more = preference_data.some(every, 5), preference_data.some(every, 20)
    assert len(few) == 5 and set(few) <= set(more) and preference_data.some(every, None) == every


# --- calibration, best-of-n -----------------------------------------------------------------------------------


def test_reliability_agrees_with_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    predicted = draw.random(2000)
    won = (draw.random(2000) < predicted**2).astype(float)
    bins = calibration.reliability(predicted, won)
    observed, mean = calibration_curve(won, predicted, n_bins=10)
    assert [one.observed for one in bins] == pytest.approx(observed.tolist())
    assert [one.predicted for one in bins] == pytest.approx(mean.tolist())
    expected = sum(one.pairs * abs(one.predicted - one.observed) for one in bins) / 2000  # type: ignore[operator]
    assert calibration.expected_calibration_error(bins) == pytest.approx(expected) != pytest.approx(0, abs=0.05)


def test_certainty_that_is_earned_has_no_error_and_empty_bins_count_nothing() -> None:
    predicted = np.array([0.75, 0.75, 0.75, 0.75, 1.0])
    bins = calibration.reliability(predicted, np.array([1.0, 1.0, 0.0, 1.0, 1.0]))
    assert calibration.expected_calibration_error(bins) == pytest.approx(0.0)
    assert sum(one.pairs for one in bins) == 5 and bins[0].observed is None and bins[9].pairs == 1
    assert calibration.probabilities([0.0, 900.0], [0.0, -900.0]).tolist() == [0.5, 1.0]


def test_best_of_n_is_the_mean_over_every_draw() -> None:
    draw = random.Random(0)
    proxy, gold = [draw.random() for _ in range(6)], [draw.random() for _ in range(6)]
    for n in range(1, 7):
        drawn = itertools.combinations(range(6), n)
        picked = [gold[max(some, key=lambda place: proxy[place])] for some in drawn]
        assert best_of_n_curve.expected_gold(proxy, gold, n) == pytest.approx(sum(picked) / len(picked))
    with pytest.raises(ValueError, match="there are 6"):
        best_of_n_curve.expected_gold(proxy, gold, 7)


def test_what_the_proxy_cannot_tell_apart_shares_its_gold() -> None:
    assert best_of_n_curve.expected_gold([1.0, 1.0, 0.0], [0.2, 0.8, 9.0], 3) == pytest.approx(0.5)


def test_the_curve_ends_where_the_fewest_responses_do() -> None:
    curve = best_of_n_curve.curve([[1, 2, 3], [1, 2]], [[0.1, 0.2, 0.3], [1.0, 0.0]])
    assert curve.shape == (2, 2) and curve[:, 0].tolist() == pytest.approx([0.2, 0.5])
    assert best_of_n_curve.divergence(1) == 0.0 and best_of_n_curve.divergence(4) == pytest.approx(math.log(4) - 0.75)
