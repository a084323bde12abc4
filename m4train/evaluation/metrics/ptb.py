"""The words of a caption, as the tokenizer of the Penn Treebank splits it in the evaluation of COCO captions.

Written for the rules that captions need and proved against the Java tokenizer (Stanford PTBTokenizer 3.4.1 with
-preserveLines -lowerCase); web addresses and phone numbers are not its business. One quirk is kept: brackets become `-lrb-` and
the like, which are not among the dropped marks, whose names are in upper case.
"""

from __future__ import annotations

import re
from functools import lru_cache

_DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ALIKE = str.maketrans(
    {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- ", "\u2026": " ... "}
    | {"\u20ac": " $ ", "\u00a3": " # ", "\u00a2": " cents ", "\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 "}
)
# Words that keep the full stop behind them; those of the second list only with a capital.
_SHORT = [
    "adj",
    "adm",
    "adv",
    "al",
    "ala",
    "apr",
    "ariz",
    "assn",
    "assoc",
    "aug",
    "ave",
    "bldg",
    "blvd",
    "bros",
    "calif",
    "capt",
    "cf",
    "cmdr",
    "co",
    "col",
    "colo",
    "conn",
    "corp",
    "cpl",
    "ct",
    "dak",
    "dec",
    "dept",
    "dr",
    "esq",
    "est",
    "etc",
    "ext",
    "feb",
    "fla",
    "fri",
    "ft",
    "ga",
    "gen",
    "gov",
    "hon",
    "inc",
    "ind",
    "intl",
    "jan",
    "jr",
    "jul",
    "jun",
    "kan",
    "ky",
    "lt",
    "ltd",
    "maj",
    "mar",
    "md",
    "messrs",
    "mfg",
    "mich",
    "minn",
    "mo",
    "mon",
    "mont",
    "mr",
    "mrs",
    "ms",
    "mt",
    "natl",
    "neb",
    "nev",
    "nov",
    "oct",
    "okla",
    "ph",
    "pres",
    "prof",
    "pvt",
    "rd",
    "rep",
    "rev",
    "sen",
    "sep",
    "sept",
    "sgt",
    "sq",
    "sr",
    "st",
    "tel",
    "tenn",
    "thu",
    "thurs",
    "treas",
    "tue",
    "tues",
    "univ",
    "va",
    "vs",
    "wed",
    "wis",
    "wyo",
]
_SHORT_NAMES = ["Ark", "Del", "Ill", "La", "Mass", "Ore", "Pa", "Tex", "Wash"]

_L = r"[^\W\d_]"  # a letter
_LD = r"[^\W_]"  # a letter or digit
_ACRONYM = rf"{_L}(?:\.{_L})+\.?"
_REDUCED = r"'(?:re|ve|ll|[sdm])"
# The longest match wins, of equally long ones the first; the group is the token, what is matched behind it its context.
_RULES = [
    re.compile(rule)
    for rule in (
        rf"(?i:(can)not|(gon|wan)na|(got)ta|(gim|lem)me|(more)'n|('t)(?:is|was))(?!{_LD})",
        rf"(?i:({_LD}+)n't)(?!{_L})",
        rf"(?i:({_LD}+){_REDUCED})(?!{_L})",
        rf"(?i:(n't|{_REDUCED}))(?!{_L})",
        r"(<[/!]?[A-Za-z][^>\s]*[^<>]*>)",
        r"([A-Z]+(?:&[A-Z]+)+)",
        rf"({_ACRONYM}(?:-(?:{_ACRONYM}|{_LD}+))*)(?!{_LD})",
        rf"((?i:{'|'.join(_SHORT)})\.|(?:{'|'.join(_SHORT_NAMES)})\.|[A-Za-z]\.|(?i:ph\.d\.))(?!{_LD})",
        r"((?i:nos?)\.)(?=\s*\d)",
        rf"({_L}{_LD}*\.)(?=[,;:])",
        rf"({_L}{_LD}*(?:[.!?]{_L}{_LD}*)*)",
        rf"((?:{_LD}+(?:[-_]{_LD}+)*)(?:/{_LD}+(?:[-_]{_L}+)*)*)",
        r"([-+]?(?:\d*(?:[.:,]\d+)+|\d+))",
        rf"([A-HJ-XZdlno]'{_L}{{2,}}|{_L}+[aeiouAEIOU]'[aeiouA-Z]{_L}*|[lLdDjJ]'|[yY]'(?={_L}))",
        rf"('[nN]'|(?i:c'mon|e'er|li'l|ev'ry|nor'easter|nat'l|s'mores|ol'|somethin'|dunkin'|cont'd\.?|'em|'till?|'cause|'n)(?!{_L}))",
        r"((?<!\w)'(?:[2-9]0[sS](?!\w)|\d\d(?![\w%/:'-])))",
        r"([<>]?[:;=][-o*']?[)(])",
        rf"([@#]{_L}[\w]*|[^\s@]+@{_L}[\w.]*)",
        r"((?i:[a-z]{1,2}\$))",
        r"(-(?:lrb|rrb|lsb|rsb|lcb|rcb)-)",
        r"(-{2,}|\.{3,}|[?!]+|_+)",
        r"(\S)",
    )
]


@lru_cache(maxsize=65536)  # references are asked for once a checkpoint
def caption_words(text: str) -> tuple[str, ...]:
    """The words of a caption, in lower case, without punctuation marks that stand alone."""
    return tuple(word for word in _tokens(text.translate(_ALIKE)) if word not in _DROPPED)


def _tokens(text: str) -> list[str]:
    found, place = [], 0
    for chunk in re.finditer(r"\S+", text):
        place = max(place, chunk.start())
        while place < chunk.end():
            matches = [match for rule in _RULES if (match := rule.match(text, place))]
            best = max(matches, key=lambda match: match.end())
            token = best[best.lastindex or 0]
            place += len(token)
            found.append(_written(token))
    return found


def _written(token: str) -> str:
    if token == '"':
        return "''"
    if token.startswith("--"):
        return "--"
    if token.startswith("..."):
        return "..."
    return "".join(_BRACKETS.get(letter, letter) for letter in token.lower())
