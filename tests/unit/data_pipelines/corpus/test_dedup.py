"""Deduplication by buckets against brute force over all documents at once, and the faults of published pipelines."""

import io
import shutil
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.corpus.buckets import COUNTED, KeyWriter, bucket_of, merged_groups
from data_pipelines.corpus.dedup import Dedup, DedupBuckets, DedupKeys
from data_pipelines.corpus.dedup_rules import DedupRules, domain_of, newest_first
from data_pipelines.corpus.filter import END_OF_DOCUMENT
from data_pipelines.corpus.minhash import MinHash
from data_pipelines.corpus.picture_hash import distance, perceptual_hash
from data_pipelines.frame.step import Place
from m4train.errors import ConfigError, DataError
from tests.helpers.corpus import copied, documents_of, page, run_stages, statistics_of
from tests.helpers.pipelines import digests


def deduplicated(documents, rules, tasks=2, buckets=3, folder=None):
    """The documents that are left, in the order of their ranks, by running the three stages."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        place = lambda step, stage: setattr(step, "place", Place(Path(root), stage)) or step
        for rank in range(tasks):
            list(place(DedupKeys(rules, buckets), "keys").run(documents[rank::tasks], rank, tasks))
        for rank in range(2):
            list(place(DedupBuckets(rules, buckets), "buckets").run(None, rank, 2))
        left, counts = [], Counter()
        for rank in range(tasks):
            step = place(Dedup(rules, buckets), "dedup")
            left += step.run([copied(document) for document in documents[rank::tasks]], rank, tasks)
            counts.update(step.ledger.counts)
    return left, counts


DATES = ["", "2023", "2023-01-15T09:30:00Z", "20230115093000", "2024-02-01"]
SITES = ["http://a.example.co.uk/{}", "http://b.example.co.uk/{}", "http://other.org/{}", "http://10.0.0.1/{}"]
PARAGRAPHS = ["Share this page", "Copyright  2023", "Something else", END_OF_DOCUMENT, "One more line", ""]
IMAGES = [f"http://img/{n}.png" for n in range(4)]
documents_drawn = st.lists(
    st.tuples(
        st.sampled_from(SITES),
        st.integers(0, 3),
        st.sampled_from(DATES),
        st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=4),
        st.lists(st.sampled_from(IMAGES), max_size=3),
    ),
    min_size=1,
    max_size=12,
)


def built(drawn):
    pages = []
    for number, (site, place, date, paragraphs, images) in enumerate(drawn):
        pages.append(page(number, ["\n\n".join(paragraphs), *images], site.format(place), date=date))
    return pages


def in_order(documents, tasks):
    """With the place that decides between documents of one date: rank, then number in the rank."""
    return [document for rank in range(tasks) for document in documents[rank::tasks]]


def brute_choice(documents, key_of, tasks):
    """Ids of documents that are not the newest, and then first, of those with one of their keys."""
    order = in_order(documents, tasks)
    dropped = set()
    for document in order:
        for other in order:
            if other is document or not set(key_of(document)) & set(key_of(other)):
                continue
            mine, theirs = ((newest_first(d), order.index(d)) for d in (document, other))
            if theirs < mine:
                dropped.add(document.id)
    return dropped


@settings(max_examples=40)
@given(drawn=documents_drawn, tasks=st.integers(1, 3))
def test_the_newest_document_of_a_url_is_kept(drawn, tasks):
    documents = built(drawn)
    left, _ = deduplicated(documents, {"url": True}, tasks)
    dropped = brute_choice(documents, lambda d: [d.metadata["url"]], tasks)
    assert [d.id for d in left] == [d.id for d in in_order(documents, tasks) if d.id not in dropped]


@settings(max_examples=40)
@given(drawn=documents_drawn)
def test_of_documents_with_the_same_set_of_images_the_newest_is_kept(drawn):
    documents = built(drawn)
    left, _ = deduplicated(documents, {"image_set": True})
    key_of = lambda d: [frozenset(n["url"] for n in d.metadata["nodes"] if n["type"] == "image")] if any(n["type"] == "image" for n in d.metadata["nodes"]) else []  # fmt: skip
    dropped = brute_choice(documents, key_of, 2)
    assert {d.id for d in left} == {d.id for d in documents} - dropped


@settings(max_examples=40)
@given(drawn=documents_drawn, most=st.integers(1, 3), buckets=st.integers(1, 5))
def test_images_of_more_documents_than_allowed_are_removed_and_no_others(drawn, most, buckets):
    """OBELICS wrote the counts of all images under the name of those that are too frequent: as published, every image went."""
    documents = built(drawn)
    left, _ = deduplicated(documents, {"image": most}, buckets=buckets)
    counts = Counter(url for d in documents for url in {n["url"] for n in d.metadata["nodes"] if n["type"] == "image"})
    for document in left:
        before = next(d for d in documents if d.id == document.id)
        kept = [n["url"] for n in before.metadata["nodes"] if n["type"] == "image" and counts[n["url"]] <= most]
        assert [n["url"] for n in document.metadata["nodes"] if n["type"] == "image"] == kept


@settings(max_examples=40)
@given(drawn=documents_drawn, most=st.integers(1, 3))
def test_paragraphs_of_a_domain_that_come_too_often_are_removed_but_never_the_mark_between_documents(drawn, most):
    documents = built(drawn)
    left, _ = deduplicated(documents, {"paragraph": most})
    domain = lambda d: {"a": "uk", "b": "uk", "o": "org", "1": "ip"}[d.metadata["url"][7]]
    same = lambda text: " ".join(text.split())
    paragraphs = lambda d: [p for n in d.metadata["nodes"] if n["type"] == "text" for p in n["text"].split("\n\n")]
    counts = Counter((domain(d), same(p)) for d in documents for p in paragraphs(d))
    by_id = {d.id: d for d in left}
    for document in documents:
        stays = lambda p: not p.strip() or p == END_OF_DOCUMENT or counts[domain(document), same(p)] <= most  # noqa: B023
        kept = "\n\n".join(p for p in paragraphs(document) if stays(p))
        images = [n for n in document.metadata["nodes"] if n["type"] == "image"]
        if document.id not in by_id:
            assert not kept
            assert not images
            continue
        nodes = by_id[document.id].metadata["nodes"]
        unchanged = kept == "\n\n".join(paragraphs(document))
        assert [n["text"] for n in nodes if n["type"] == "text"] == ([kept] if kept or unchanged else [])
        assert [n for n in nodes if n["type"] == "image"] == images


def _jaccard(first, second):
    return len(first & second) / len(first | second)


def test_texts_that_are_nearly_the_same_are_found_and_others_are_not():
    rng = np.random.default_rng(3)
    words = [f"word{n}" for n in range(3000)]
    pages, near = [], []
    for number in range(30):
        text = rng.choice(words, 200).tolist()
        pages.append(page(2 * number, [" ".join(text)], date="2024"))
        changed = list(text)
        for place in rng.choice(200, 2 if number % 2 else 120, replace=False):
            changed[place] = "other"
        pages.append(page(2 * number + 1, [" ".join(changed)], date="2023"))
        near += [pages[-1].id] if number % 2 else []
    left, counts = deduplicated(pages, {"minhash": True})
    dropped = {d.id for d in pages} - {d.id for d in left}
    assert dropped == set(near)  # the older of each pair that shares nine tenths of its shingles
    assert counts == {"minhash": 15, "kept": 45}


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), min_size=2, max_size=8))
def test_documents_that_share_a_band_with_a_newer_one_are_dropped_and_no_others(texts):
    rules = {"minhash": {"bands": 4, "rows": 2, "shingle": 2}}
    documents = [page(n, [" ".join(text)], date=f"20{10 + n % 3}") for n, text in enumerate(texts)]
    left, _ = deduplicated(documents, rules)
    signature = DedupRules.of(rules).minhash
    dropped = brute_choice(documents, lambda d: signature.keys(d.text.split()), 2)
    assert {d.id for d in left} == {d.id for d in documents} - dropped


def test_signatures_agree_as_often_as_texts_are_similar():
    rng = np.random.default_rng(0)
    hashes = MinHash(bands=400, rows=1, shingle=3)
    for share in (0.2, 0.5, 0.9):
        first = rng.integers(0, 10**6, 400).astype(str).tolist()
        second = first[: int(400 * share)] + rng.integers(0, 10**6, 400 - int(400 * share)).astype(str).tolist()
        similarity = _jaccard(set(hashes.shingles(first).tolist()), set(hashes.shingles(second).tolist()))
        agreed = np.mean([a == b for a, b in zip(hashes.keys(first), hashes.keys(second))])
        assert agreed == pytest.approx(similarity, abs=0.08)
    assert hashes.keys([]) == []


# Pictures -------------------------------------------------------------------------------------------------------------


def _photo(seed):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return small.resize((240, 180), Image.Resampling.BICUBIC)


def _stored(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_hash_of_a_picture_is_that_of_imagehash():
    imagehash = pytest.importorskip("imagehash", reason="ImageHash is not installed")
    for seed in range(20):
        theirs = int(str(imagehash.phash(_photo(seed))), 16)
        assert int(distance(perceptual_hash(_photo(seed)), theirs)) <= 2  # its transform works in other rounding


def test_the_hash_of_a_picture_hardly_changes_with_its_storage_and_tells_pictures_apart():
    for seed in range(10):
        original = perceptual_hash(_photo(seed))
        again = Image.open(io.BytesIO(_stored(_photo(seed), "JPEG", quality=70)))
        assert int(distance(original, perceptual_hash(again))) <= 4
        assert int(distance(original, perceptual_hash(_photo(seed).resize((120, 90))))) <= 4
        assert int(distance(original, perceptual_hash(_photo(seed + 100)))) >= 12


def test_a_picture_that_too_many_documents_show_is_removed_whatever_its_name_and_format():
    logo = _photo(1)
    pages = [page(n, ["Text.", _stored(logo, "PNG", compress_level=n + 1), _stored(_photo(50 + n))]) for n in range(4)]
    left, counts = deduplicated(pages, {"picture": 3})
    assert counts == {"picture": 4, "kept": 4}
    assert [len(document.media) for document in left] == [1] * 4
    assert deduplicated(pages, {"picture": 4})[1] == {"kept": 4}
    assert deduplicated(pages, {"image": 1})[1] == {"kept": 4}  # other bytes, other URLs


# Buckets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "buffered", "at_once"), [(1_000_000, 100_000, 50_000), (1000, 17, 20)])
def test_counts_of_many_keys_are_those_of_a_counter(tmp_path, keys, buffered, at_once):
    rng = np.random.default_rng(0)
    drawn = (rng.zipf(1.3, keys) % (keys // 2 + 1)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for rank in range(3):
        writer = KeyWriter(tmp_path, rank, 2, COUNTED, buffered)
        for key in drawn[rank::3].tolist():
            writer.add(key)
        writer.flush()
    found = Counter()
    for bucket in range(2):
        last = -1
        for part in merged_groups(sorted((tmp_path / f"{bucket:04d}").iterdir()), COUNTED, at_once):
            values, counts = np.unique(part["key"], return_counts=True)
            assert int(values[0]) > last  # a key is never divided
            assert (bucket_of(values, 2) == bucket).all()
            last = int(values[-1])
            found.update(dict(zip(values.tolist(), counts.tolist())))
    assert found == Counter(drawn.tolist())


def _peak(tmp_path, documents):
    rng = np.random.default_rng(1)
    writer = KeyWriter(tmp_path, 0, 4, COUNTED, buffered=5000)
    tracemalloc.start()
    for _ in range(documents):
        writer.add(int(rng.integers(0, np.iinfo(np.uint64).max, dtype=np.uint64)))
    writer.flush()
    total = 0
    for bucket in range(4):
        for part in merged_groups(sorted((tmp_path / f"{bucket:04d}").iterdir()), COUNTED, at_once=5000):
            total += len(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == documents
    return peak


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    _peak(tmp_path / "warm", 5000)
    small, large = _peak(tmp_path / "a", 20_000), _peak(tmp_path / "b", 200_000)
    if (
        large > 1.1 * small
    ):  # Python's table of interned names, 4 MB after many tests, may have grown at that moment: once
        large = _peak(tmp_path / "c", 200_000)
    assert large <= 1.1 * small, (small, large)


# Whole pipelines ------------------------------------------------------------------------------------------------------

RULES = {"url": True, "image": 20, "paragraph": 2, "image_set": True}
STAGES = {
    "keys": {"steps": {"keys": {"rules": RULES, "buckets": 4}}, "keep": False},
    "buckets": {"steps": {"buckets": {"rules": RULES, "buckets": 4}}, "keep": False, "reads": None, "tasks": 2},
    "dedup": {"steps": {"dedup": {"rules": RULES, "buckets": 4}}},
}
PAGES = [
    [n, [f"Page {n}\n\nShare this", f"png:{n % 9}", f"http://img/{n % 20}.png"], f"http://s{n % 3}.org/{n % 30}", {"date": f"20{10 + n % 7}"}]
    for n in range(150)
]  # fmt: skip


def test_a_stage_that_is_killed_anywhere_goes_on_to_the_same_end(tmp_path):
    assert run_stages(tmp_path / "a", PAGES, STAGES, tasks=3) == 0
    whole = digests(tmp_path / "a" / "out" / "dedup")
    kept = documents_of(tmp_path / "a" / "out" / "dedup")
    assert 0 < len(kept) <= 30
    for stage in STAGES:
        folder = tmp_path / stage
        assert run_stages(folder, PAGES, STAGES, tasks=3) == 0
        later = list(STAGES)[list(STAGES).index(stage) + 1 :]
        for name in later:
            shutil.rmtree(folder / "out" / name)
        (folder / "out" / stage / "ranks" / "completions" / "00001").unlink()
        for path in (folder / "out" / stage).glob("keys/url/*/00001-000.npy"):
            path.write_bytes(path.read_bytes()[:50])
            path.with_name("00001-077.npy").write_bytes(b"left over")
        assert run_stages(folder, PAGES, STAGES, tasks=3) == 0
        assert digests(folder / "out" / "dedup") == whole
        assert statistics_of(folder / "out" / "dedup") == statistics_of(tmp_path / "a" / "out" / "dedup")


def test_all_documents_go_through_and_numbers_add_up(tmp_path):
    """The smollm script of OBELICS kept its debugging line select(range(100))."""
    assert run_stages(tmp_path, PAGES, STAGES) == 0
    numbers = statistics_of(tmp_path / "out" / "dedup")["dedup"]
    whole = [label for label in numbers["counts"] if label in ("url", "image_set", "kept", "empty")]
    assert sum(numbers["counts"][label] for label in whole) == numbers["before"]["documents"] == 150
    assert numbers["counts"]["kept"] == numbers["after"]["documents"]


def test_other_documents_than_the_keys_were_made_of_are_refused(tmp_path):
    documents = [page(n, ["a"]) for n in range(4)]
    place = Place(tmp_path, "dedup")
    for stage, step in (("keys", DedupKeys({"url": True}, 1)), ("buckets", DedupBuckets({"url": True}, 1))):
        step.place = Place(tmp_path, stage)
        list(step.run(documents if stage == "keys" else None))
    for given_now in (documents[:3], documents[::-1], [*documents, page(9, ["b"])]):
        step = Dedup({"url": True}, 1)
        step.place = place
        with pytest.raises(DataError, match="keys of other documents"):
            list(step.run([copied(document) for document in given_now]))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"urls": True}, "rules.urls is not known"),
        ({}, "rules is empty"),
        ({"url": "off"}, "rules is empty"),
        ({"image": True}, "rules.image=True must say in how many"),
        ({"paragraph": 0}, "1 or more"),
        ({"minhash": {"bnads": 3}}, "rules.minhash="),
        ({"url": 3}, "rules.url=3 must be true or off"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, said):
    with pytest.raises(ConfigError, match=said):
        DedupKeys(rules)


def test_a_date_that_cannot_be_read_is_an_error_not_a_guess():
    with pytest.raises(ConfigError, match=r"page-00001 .*'soon'"):
        newest_first(page(1, ["a"], date="soon"))
    ages = [
        newest_first(page(1, ["a"], date=date))
        for date in ("2024-02-01", "20230115093000", "2023-01-15T09:30:00Z", "2023", "")
    ]
    assert ages == sorted(ages)
    assert ages[1] == ages[2]


@pytest.mark.parametrize(
    ("url", "domain"),
    [
        ("https://www.example.co.uk/a", "example.co.uk"),
        ("http://a.b.example.com:8080/", "example.com"),
        ("http://10.0.0.1/x", "10.0.0.1"),
        ("http://localhost/x", "localhost"),
        ("http://[broken/x", ""),
        ("", ""),
    ],
)
def test_a_domain_is_the_registered_one_without_asking_the_network(url, domain):
    assert domain_of(url) == domain
