"""How near a response comes to a reference, for one example: 0 (nothing in common) to 1 (the same).

chrF: F-score over character 1- to 6-grams, recall counting twice (Popović, WMT 2015). ROUGE-L: F-score of the
longest common subsequence of words, lower-cased, not stemmed (Lin, 2004); a word there is a run of a-z and 0-9, so
in other scripts only chrF speaks.
"""

from __future__ import annotations


def chrf(response: str, reference: str, beta: int = 2) -> float:
    """Sentence chrF of sacrebleu, as a share; `beta` is how many times recall counts."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF(beta=beta).sentence_score(response, [reference]).score) / 100


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F1 of rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, response)["rougeL"].fmeasure)
