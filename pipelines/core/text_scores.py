"""How near a response comes to a reference, for one example: 0 (nothing in common) to 1 (the same).

chrF: F-score over character 1- to 6-grams, recall counting twice (Popović, WMT 2015). ROUGE-L: F-score of the
longest common subsequence of words, lower-cased, not stemmed (Lin, 2004). rouge-score's own words are runs of a-z and
0-9, which leaves none in other scripts; here they are runs of letters and digits of any, and single characters where a
script writes no spaces.
"""

from __future__ import annotations

import re
import unicodedata
from types import SimpleNamespace

# Thai to Burmese, Khmer, kana, Han
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(f"[{NO_SPACES}]|[^\\W_{NO_SPACES}]+")


def chrf(response: str, reference: str, beta: int = 2) -> float:
    """Sentence chrF of sacrebleu, as a share; `beta` is how many times recall counts."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF(beta=beta).sentence_score(response, [reference]).score) / 100


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L F1 of rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    return float(scorer.score(reference, response)["rougeL"].fmeasure)


def words(text: str) -> list[str]:
    """What ROUGE-L compares; of plain ASCII the same as rouge-score's own."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())
