"""Attributes of a restaurant in a text: what the E2E data's prompts ask for, and whether an answer says it.

A prompt lists attributes (`name[Aromi], food[Chinese], familyFriendly[no]`), an answer is one or two sentences.
An attribute is **realised** when its value is said, **contradicted** when another value of it is, and
**invented** when it is said without being asked for. Values that people use for one another are one value
(`VALUES`): cheap and less than £20, moderate and £20-25, high and more than £30; ratings of 1, 3 and 5 out of 5 are
low, average and high. What is not judged: fluency, order, and a plain "restaurant", the noun for any of them.

Data: Novikova, Dušek, Rieser, "The E2E Dataset" (SIGDIAL 2017); the errors are those that Dušek, Howcroft, Rieser,
"Semantic Noise Matters for Neural NLG" (INLG 2019) count in it: missing, wrong and added slots.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SLOT = re.compile(r"([A-Za-z][A-Za-z ]*?)\s*\[([^\[\]]*)\]")
RATING = r"(?:customer |customers |user |overall )*(?:satisfaction |service )*(?:ratings?|rated|reviews?|scores?)"
PRICE = r"(?:price[ds]?|pricing|price[- ]rang(?:e|ed|es)|costs?|end)"
BETWEEN = r"(?:\W+(?:(?!low|high|average|moderate|cheap|price|rat)\w+\W+){0,3}?)"  # a few words without another value
VALUES: dict[str, dict[str, str]] = {
    "eatType": {
        "pub": r"\bpubs?\b",
        "coffee shop": r"\bcoffee[- ]?(?:shops?|houses?|bars?|place)\b|\bcaf[eé]s?\b",
        "restaurant": r"\brestaurants?\b",
    },
    "food": {
        "Chinese": r"\bchinese\b",
        "English": r"\b(?:english|british)\b|\bfish (?:and|&) chips\b",
        "Fast food": r"\bfast[- ]?foods?\b",
        "French": r"\bfrench\b",
        "Indian": r"\bindian\b",
        "Italian": r"\bitalian\b|\bpasta\b",
        "Japanese": r"\bjapanese\b|\bsushi\b",
    },
    "priceRange": {
        "low": (
            r"\b(?:cheap(?:er|ly)?|inexpensive|low(?:er)?[- ]{0,2}(?:price[ds]?|pricing|cost|priced))\b"
            rf"|\b{PRICE}{BETWEEN}(?:low|cheap)\b(?! (?:customer|rat))"
            r"|\b(?:less than|under|below|cheaper than|up to)\W+(?:£\s*)?20\b"
        ),
        "moderate": (
            r"\bmoderate(?:ly)?\b(?![- ](?:customer|rat))"
            rf"|\b(?:mid[- ]?|average[- ]|reasonabl[ey] |medium[- ]){PRICE}\b"
            rf"|\b{PRICE}{BETWEEN}(?:average|reasonable|medium)\b(?! (?:customer|rat))"
            r"|20\W{1,3}(?:to |and )?(?:£\s*)?25\b"
        ),
        "high": (
            rf"\b(?:expensive|pricey|costly|up-?market)\b|\bhigh(?:er|ly)?[- ]{PRICE}\b"
            rf"|\b{PRICE}{BETWEEN}high\b(?! (?:customer|rat))"
            r"|\b(?:more than|over|above|at least|upwards of|from)\W+(?:£\s*)?30\b"
        ),
    },
    "customer rating": {
        "low": (
            rf"\b(?:low(?:ly)?|poor(?:ly)?|bad(?:ly)?)[- ]{RATING}\b|\b{RATING}{BETWEEN}(?:low|poor|poorly|bad|badly)\b"
            r"|\b(?:1|one)[- ](?:out )?of[- ](?:5|five)\b|\b1\s?/\s?5\b|\b(?:1|one)[- ]stars?\b"
        ),
        "average": (
            rf"\b(?:average(?:ly)?|mediocre|moderate|decent)[- ]{RATING}\b"
            rf"|\b{RATING}{BETWEEN}(?:average|moderate|decent)\b"
            r"|\b(?:3|three)[- ](?:out )?of[- ](?:5|five)\b|\b3\s?/\s?5\b|\b(?:3|three)[- ]stars?\b"
        ),
        "high": (
            rf"\b(?:high(?:ly)?|excellent|great|good|well|top)[- ]{RATING}\b"
            rf"|\b{RATING}{BETWEEN}(?:high|highly|excellent|great|good)\b|\bhighly recommended\b"
            r"|\b(?:5|five)[- ](?:out )?of[- ](?:5|five)\b|\b5\s?/\s?5\b|\b(?:5|five)[- ]stars?\b"
        ),
    },
    "area": {
        "city centre": (
            r"\b(?:city|town)(?:['’]s)?[- ]cent(?:re|er)\b|\bcent(?:re|er) of (?:the )?(?:city|town)\b|\bdowntown\b"
        ),
        "riverside": r"\briver ?(?:side|bank|front)?\b|\bwaterfront\b",
    },
}
SAME = {
    "cheap": "low", "less than £20": "low", "£20-25": "moderate", "more than £30": "high",
    "1 out of 5": "low", "3 out of 5": "average", "5 out of 5": "high",
}  # fmt: skip
FAMILY = re.compile(r"\b(?:famil(?:y|ies)|kids?|child(?:ren)?s?|adults?)\b", re.IGNORECASE)
NOT = re.compile(r"\b(?:not?|non|never|neither|nor|without|lacks?|unfriendly|unsuitable|adults?)\b|n['’]t\b", re.I)
CLAUSE = re.compile(r"[.;!?,]|\b(?:but|however|although|though|while|yet|and)\b", re.IGNORECASE)
NEAR = re.compile(
    r"\b(?:[Nn]ear(?:by)?|[Cc]lose|[Nn]ext|[Bb]eside|[Aa]djacent)(?:\s+(?:to|by))*\s+(?:the\s+)?([A-Z]\w*)"
)


class Verdict(NamedTuple):
    """What a text does with a prompt's attributes."""

    realised: frozenset[str]
    missing: frozenset[str]
    wrong: frozenset[str]  # contradicted or invented

    def score(self) -> float:
        """Attributes realised less those wrong, as a share of those asked for, at least 0."""
        return max(0.0, (len(self.realised) - len(self.wrong)) / len(self.realised | self.missing))


def asked(prompt: str) -> dict[str, set[str]]:
    """Attributes of a prompt with their values, empty where it lists none; the cleaned data have slots of several."""
    found: dict[str, set[str]] = {}
    for slot, value in SLOT.findall(prompt):
        if value.strip():
            found.setdefault(slot.strip(), set()).add(value.strip())
    return found


def judge(prompt: str, text: str) -> Verdict:
    """What `text` does with the attributes of `prompt`, which must list at least one.

    The two names are looked for as they are written and then taken out, so that the Raja Indian Cuisine next door
    does not count as Indian food. Of several values of one attribute any will do.
    """
    wanted = asked(prompt)
    realised = set()
    for slot in ("name", "near"):
        for value in wanted.get(slot, ()):
            text, count = _mention(value).subn("it", text)
            realised |= {slot} if count else set()
    found = said(text)
    for slot in wanted.keys() - {"name", "near"}:
        for value in wanted[slot]:
            known = slot == "familyFriendly" or SAME.get(value, value) in VALUES.get(slot, {})
            there = SAME.get(value, value) in found[slot] if known else _mention(value).search(text)
            realised |= {slot} if there else set()
    meant = {slot: {SAME.get(value, value) for value in values} for slot, values in wanted.items()}
    wrong = {slot for slot, values in found.items() if values - meant.get(slot, set()) - {"restaurant"}}
    return Verdict(frozenset(realised), frozenset(wanted.keys() - realised), frozenset(wrong))


def said(text: str) -> dict[str, set[str]]:
    """Values that a text gives to the attributes whose values are known; `near`: whether another place is near."""
    found = {
        slot: {name for name, value in own.items() if re.search(value, text, re.I)} for slot, own in VALUES.items()
    }
    clauses = [clause for clause in CLAUSE.split(text) if clause and FAMILY.search(clause)]
    refused = any(NOT.search(clause) for clause in clauses)
    found["familyFriendly"] = {"no" if refused else "yes"} if clauses else set()
    places = set(NEAR.findall(text)) - {"City", "River", "Riverside"}
    found["near"] = {"elsewhere"} if places else set()
    return found


def _mention(value: str) -> re.Pattern[str]:
    """A value as it is written; in capitals throughout (a placeholder such as NEAR) only as such."""
    flags = 0 if value.isupper() else re.IGNORECASE
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)", flags)
