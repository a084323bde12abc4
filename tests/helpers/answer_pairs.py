"""Answers with references, drawn from fixed seeds: what the reference implementations of the metrics were given once."""

from __future__ import annotations

import random

from m4train.evaluation.metrics.said import Said

COUNT = 2000
PROBES = """
$5|100%|.5|#1|rock & roll|couldnt've|Im|Id've|“yes”|90°|a – b|a—b|3.|3.5|1,000|1,23|2, 3|p.m.|U.S.|black/white|
well-lit (room)!|the cat|A cat|an owl|none|Zero|ten|two dogs|dont know|don't know|won't|wont|girl's|2:50 pm|10:30|
yes!|yes, sir|no?|x;y|x ;y|[a]|{b}|a=b|1+1|a_b|a\\b|<b>|me@x|`q`|"q"|say "hi"|it's|its|they're|theyre|oclock|ow's'at|
somebody'd|yall'd've|é|ÉCOLE|½|a*b|a^b|a|b
""".replace("\n", "").split("|")
_WORDS = [
    "yes",
    "no",
    "none",
    "two",
    "three",
    "ten",
    "3",
    "12",
    "1,000",
    "3.5",
    ".5",
    "5%",
    "$5",
    "50",
    "red",
    "blue",
    "the",
    "a",
    "an",
    "cat",
    "dogs",
    "dont",
    "don't",
    "Im",
    "it's",
    "wont",
    "couldnt've",
    "oclock",
    "U.S.",
    "p.m.",
    "2:30",
    "black/white",
    "well-lit",
    "rock",
    "&",
    "roll",
    "#1",
    "(left)",
    '"stop"',
    "yes!",
    "no?",
    "café",
    "naïve",
    "–",
    "“quoted”",
    "100,978",
    "-5",
    "0",
    "10%",
    "10",
    "0.1",
]
_CAPTION_WORDS = [
    "a",
    "the",
    "an",
    "man",
    "woman",
    "dog",
    "cat's",
    "dogs",
    "isn't",
    "can't",
    "don't",
    "it's",
    "they're",
    "we've",
    "I'm",
    "he'd",
    "o'clock",
    "t-shirt",
    "well-lit",
    "black-and-white",
    "20-year-old",
    "U.S.",
    "p.m.",
    "Mr.",
    "St.",
    "Dr.",
    "cannot",
    "gonna",
    "3",
    "12",
    "1,000",
    "3.5",
    "50%",
    "$5",
    "#1",
    "&",
    "R&B",
    "sitting",
    "on",
    "of",
    "in",
    "front",
    "next",
    "to",
    "with",
    "red",
    "blue",
    "John's",
    "10:30",
    "2nd",
    "1950's",
    "'90s",
    "1/2",
    "and/or",
    "A",
    "T.V.",
    "TV",
    "iPhone",
    "café",
    "naïve",
    "beach's",
    "(left)",
    "[right]",
    "...",
    "--",
    "-",
    "/",
    "+",
    "holding",
    "skateboard",
    "giraffe",
    "giraffes",
    "plate",
    "food",
    "tree",
    "grass",
    "wont",
    "mother-in-law",
    "mid-air",
    "half-eaten",
    "it’s",
    "rock'n'roll",
    "ma'am",
    "5-7",
    "7th",
    "No.5",
    "24/7",
    "U.S.A.",
]
_SPEECH = (
    """
The answer is|so|therefore|thus the result is|It could be|I think|(A)|(B)|B|C|D.|A and B|because|= 5|x = 3.14|1,234|2.5e3|42|
blue whale|a cell wall|the final answer|of course not|42.004|-7|\n|. Then|!|option C is right|(C) or (D)|A|Sorry|Z|none
""".replace("\n|", "|")
    .replace("\n", "")
    .split("|")
)
OPTIONS = ("blue whale", "A cell wall", "42", "red", "3.14")


def text(draw: random.Random, words: list[str], longest: int) -> str:
    said = [draw.choice(words) for _ in range(draw.randint(0, longest))]
    said = [word.upper() if draw.random() < 0.1 else word for word in said]
    said = [word + draw.choice(".,;!?'") if draw.random() < 0.1 else word for word in said]
    return draw.choice([" ", " ", " ", " ", "  ", "\t", "\n"]).join(said)


def _changed(draw: random.Random, said: str) -> str:
    """A text with some letters lost or in another case."""
    if not said or draw.random() < 0.4:
        return said
    place = draw.randrange(len(said))
    return draw.choice([said[:place] + said[place + 1 :], said.upper(), f" {said}", said + ".", said[: place + 1]])


def vqa_pairs(seed: int = 1) -> list[Said]:
    """Ten references each, and an answer that is often one of them, changed."""
    draw, found = random.Random(seed), []
    for number in range(COUNT):
        known = [text(draw, _WORDS, 3) for _ in range(draw.randint(1, 3))]
        references = tuple(draw.choice(known) if draw.random() < 0.8 else text(draw, _WORDS, 2) for _ in range(10))
        if draw.random() < 0.1:
            references = (known[0],) * 10
        answer = _changed(draw, draw.choice(references)) if draw.random() < 0.9 else text(draw, _WORDS, 3)
        if number < len(PROBES):
            answer = PROBES[number]
            references = (answer,) * draw.randint(1, 9) + tuple(PROBES[:1])
            references += (answer.lower(),) * (10 - len(references))
        found.append(Said(answer, references))
    return found


def text_pairs(seed: int = 2) -> list[Said]:
    """One to three references each."""
    draw, found = random.Random(seed), []
    for _ in range(COUNT):
        references = tuple(text(draw, _WORDS, 4) for _ in range(draw.randint(1, 3)))
        answer = draw.choice(references) if draw.random() < 0.8 else text(draw, _WORDS, 4)
        for _ in range(draw.randint(0, 4)):
            answer = _changed(draw, answer)
        about = {"dataset": draw.choice(["HME100k", "IIIT5K"])}
        found.append(Said(answer, references, about=about))
    return found


def number_pairs(seed: int = 3) -> list[Said]:
    """Numbers near each other, with and without percent signs, and texts."""
    draw, found = random.Random(seed), []
    for _ in range(COUNT):
        right = draw.choice([0, 1, -1]) * draw.choice([1, 10, 0.5, 33.3, 100, 1234])
        near = right * draw.choice([1, 1.05, 0.95, 1.0501, 0.9499, 1.2, -1, 0.01, 100])
        forms = ["{:g}", "{:.2f}", "{:g}%", "{:,.0f}", "${:g}", " {:g} ", "{:e}"]
        reference, answer = draw.choice(forms).format(right), draw.choice(forms).format(near)
        if draw.random() < 0.2:
            reference = text(draw, _WORDS, 2)
            answer = _changed(draw, reference)
        found.append(Said(answer, (reference,)))
    return found


def choice_pairs(seed: int = 4) -> list[Said]:
    """What models say to multiple choice (with options) and to open questions (without)."""
    draw, found = random.Random(seed), []
    for _ in range(COUNT):
        answer = text(draw, _SPEECH, 6)
        if draw.random() < 0.5:
            options = tuple(draw.sample(OPTIONS, draw.randint(2, 5)))
            found.append(Said(answer, (draw.choice("ABCDE"[: len(options)]),), options=options))
        else:
            found.append(Said(answer, tuple(draw.sample([*OPTIONS, "1,234", "2500", "x", "-7"], draw.randint(1, 2)))))
    return found


def caption_pairs(seed: int = 5) -> list[Said]:
    """Captions of images, each with two to five references."""
    draw, found = random.Random(seed), []
    for _ in range(COUNT):
        references = tuple(caption(draw) for _ in range(draw.randint(2, 5)))
        answer = draw.choice(references).split()
        draw.shuffle(answer[: draw.randint(0, len(answer))])
        kept = [word for word in answer if draw.random() < 0.8]
        found.append(Said(" ".join(kept) if draw.random() < 0.9 else caption(draw), references))
    return found


def caption(draw: random.Random) -> str:
    words = [draw.choice(_CAPTION_WORDS) for _ in range(draw.randint(3, 14))]
    words = [word.capitalize() if draw.random() < 0.1 else word for word in words]
    words = [word + draw.choice([",", ".", ";", "'s", '"']) if draw.random() < 0.05 else word for word in words]
    return " ".join(words) + draw.choice([".", "", " ."])


def yes_no_pairs(seed: int = 6) -> list[Said]:
    """Pairs of questions of MME: with two about each picture, in fourteen categories."""
    draw, found = random.Random(seed), []
    categories = [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ]
    categories += ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    said = ["Yes", "no", "Yes.", "No, it is", "y", "N", "I say no", "not", " yes it", "", "nyes", "x"]
    for number in range(COUNT):
        about = {"category": categories[number // 2 % len(categories)], "question_id": f"picture {number // 2}"}
        found.append(Said(draw.choice(said), (draw.choice(["Yes", "No"]),), about=about))
    return found


def figure_pairs(seed: int = 7) -> list[Said]:
    """Questions about figures, in the manner of HallusionBench."""
    draw, found = random.Random(seed), []
    for number in range(COUNT):
        about = {"category": draw.choice(["VD", "VS"]), "subcategory": draw.choice(["chart", "map"])}
        about |= {"set_id": str(number // 8), "figure_id": str(number // 2 % 2), "question_id": str(number % 2)}
        found.append(Said(draw.choice(["Yes", "No", "yes.", "it is not", "Eyes"]), (draw.choice("01"),), about=about))
    return found
