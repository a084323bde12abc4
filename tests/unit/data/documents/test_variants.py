"""Options of documents, conversations and images: what a sample becomes, and that its length is the planned one."""

import io
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m4train.config import AugmentConfig, ConversationOptions, DocumentOptions, ImageOptions, SourceConfig
from m4train.data.documents.labels import trained_tokens
from m4train.data.documents.pieces import BORDER_KIND, IMAGE_KIND
from m4train.data.documents.rendering import Renderer, encode_view, expand
from m4train.data.documents.sample import sample_from_dict
from m4train.data.documents.variants import (
    Draws,
    conversation_variant,
    documents_in,
    image_numbers,
    image_views,
    variant_drawn,
)
from m4train.data.loading.collate import Collator
from m4train.data.loading.stream_loader import StreamLoader
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import BadSample, ConfigError
from tests.helpers.data import FakeProcessor, data_config, png, write_shards
from tests.helpers.processing import tiny_idefics2_processor, tiny_idefics3_processor, tiny_idefics_processor

IDEFICS3 = tiny_idefics3_processor(split=True, tiles=3)
MARKER = "<<END>>"


def parts(texts: str, **options) -> list[str]:
    """Documents of a stored one, each written with `i` for an image and other characters for texts."""
    items = [{"image": f"{n}.png"} if c == "i" else {"text": MARKER if c == "|" else c} for n, c in enumerate(texts)]
    found = documents_in(items, DocumentOptions(**options))
    return ["".join("i" if "image" in item else item["text"] for item in part) for part in found]


def test_without_options_a_document_is_what_it_is() -> None:
    assert parts("iaibii") == ["iaibii"]


def test_images_past_the_limit_leave_a_paragraphs_end_between_texts() -> None:
    assert parts("iaibic", max_images=1) == ["ia\n\nb\n\nc"]
    assert parts("aiiib", max_images=1) == ["aib"]
    assert parts("aib", max_images=0) == ["a\n\nb"]
    assert parts("ai", max_images=0) == ["a"]


def test_documents_that_end_in_images() -> None:
    assert parts("aibii", ending_images="strip") == ["aib"]
    assert parts("aibi", ending_images="skip") == ["aibi"]
    for ending in ("aibii", "ai", "aii"):
        with pytest.raises(BadSample) as error:
            parts(ending, ending_images="skip")
        assert error.value.reason == "skipped"


def test_rows_of_images_and_documents_without_one() -> None:
    assert parts("aiib", max_images_in_a_row=2) == ["aiib"]
    with pytest.raises(BadSample, match="3 images in a row"):
        parts("aiiib", max_images_in_a_row=2)
    with pytest.raises(BadSample, match="has no image"):
        parts("ab", require_image=True)


def test_a_marker_begins_another_document_and_nothing_is_lost_or_doubled() -> None:
    assert parts("ai|bc|i|", end_marker=MARKER) == ["ai", "bc", "i"]
    assert parts("ai|bc|di", end_marker=MARKER, require_image=True) == ["ai", "di"]
    found = documents_in([{"text": f"a {MARKER} b{MARKER}"}, {"image": "0.png"}], DocumentOptions(end_marker=MARKER))
    assert found == [[{"text": "a"}], [{"text": "b"}], [{"image": "0.png", "number": 0}]]
    assert [image_numbers(part) for part in found] == [[], [], [0]]


words = st.text("abc \n", min_size=1, max_size=8)
texts = words.map(lambda text: {"text": text})
contents = st.lists(st.one_of(texts, st.just({"image": "x.png"})), min_size=1, max_size=4)
turns = st.tuples(contents, words).map(
    lambda both: [
        {"role": "user", "content": both[0]},
        {"role": "assistant", "content": [{"text": both[1]}]},
    ]
)
systems = st.one_of(st.just([]), words.map(lambda text: [{"role": "system", "content": [{"text": text}]}]))
talks = st.tuples(systems, st.lists(turns, min_size=1, max_size=5)).map(
    lambda both: both[0] + [message for turn in both[1] for message in turn]
)


@given(talks, st.integers(0, 50))
def test_shuffled_turns_keep_answers_with_questions_and_every_image_with_its_text(talk, variant) -> None:
    plain = conversation_variant(talk, ConversationOptions(), Draws("k", variant))
    shuffled = conversation_variant(talk, ConversationOptions(shuffle_turns=True), Draws("k", variant))

    def exchanges(messages):
        users = [m["content"] for m in messages if m["role"] == "user"]
        leading = next((n for n, item in enumerate(users[0]) if "image" not in item), 0)
        users[0] = users[0][leading:]
        answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
        return Counter(repr((user, answer)) for user, answer in zip(users, answers))

    assert [m["role"] for m in plain] == [m["role"] for m in shuffled]
    numbers = [image_numbers(m["content"]) for m in shuffled]
    assert sorted(n for row in numbers for n in row) == list(range(sum(map(len, numbers))))
    if all(item.get("text") for m in plain for item in m["content"][:1]):  # else leading images change owners
        assert exchanges(plain) == exchanges(shuffled)
    first = next(m for m in plain if m["role"] == "user")["content"]
    leading = next((n for n, item in enumerate(first) if "image" not in item), 0)
    begins = next(m for m in shuffled if m["role"] == "user")["content"]
    assert begins[:leading] == first[:leading]


def test_orders_are_all_drawn_about_equally_often() -> None:
    talk = [m for q in "abc" for m in (user(q), answer(q.upper()))]
    options = ConversationOptions(shuffle_turns=True)
    seen = Counter(
        "".join(
            m["content"][0]["text"] for m in conversation_variant(talk, options, Draws("k", n)) if m["role"] == "user"
        )
        for n in range(600)
    )
    assert len(seen) == 6
    assert min(seen.values()) > 60


def user(text: str) -> dict:
    return {"role": "user", "content": [{"text": text}]}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"text": text}]}


def test_line_breaks_come_before_the_users_text_as_often_as_asked() -> None:
    options = ConversationOptions(newline_probability=0.25)
    breaks = 0
    for n in range(400):
        message = {"role": "user", "content": [{"image": "0.png"}, {"text": "q"}]}
        asked, said = conversation_variant([message, answer("a")], options, Draws("k", n))
        assert said["content"] == [{"text": "a"}]
        assert asked["content"][1]["text"] in ("q", "\nq")
        breaks += asked["content"][1]["text"] == "\nq"
    assert 70 < breaks < 130


def test_a_system_prompt_is_for_conversations_that_have_none() -> None:
    options = ConversationOptions(system_prompt="Be brief.")
    told = conversation_variant([user("q"), answer("a")], options, Draws("k"))
    assert told[0] == {"role": "system", "content": [{"text": "Be brief."}]}
    own = [{"role": "system", "content": [{"text": "own"}]}, user("q"), answer("a")]
    assert conversation_variant(own, options, Draws("k"))[0]["content"] == [{"text": "own"}]


OPTIONS = SourceConfig(
    conversations=ConversationOptions(shuffle_turns=True, newline_probability=0.5, system_prompt="Look."),
    images=ImageOptions(enlarge=False, upscale_max=3.0, max_tokens=60, max_tokens_per_sample=150),
)


@settings(max_examples=60)
@given(talks, st.integers(0, 7), st.sampled_from(["auto", "all", "last_turn"]))
def test_planned_lengths_are_exact_and_labels_are_the_assistants_words(talk, variant: int, loss: str) -> None:
    """With the real Idefics3 processor: every option, every variant."""
    sample = sample_from_dict({"messages": talk})
    rng = np.random.default_rng(len(sample.images))
    sizes = [tuple(int(n) for n in rng.integers(5, 120, 2)) for _ in sample.images]
    prepared = Renderer(IDEFICS3, OPTIONS).prepare(sample, "key", sizes, variant)
    pictures = [Image.new("RGB", size) for size in sizes]
    encoded = {n: encode_view(pictures[n], view, IDEFICS3) for n, view in prepared.views.items()}
    result = expand(prepared.pieces, encoded, prepared.planned)
    assert len(result.ids) == prepared.planned.tokens.sum()
    assert sum(map(len, result.frames)) == prepared.planned.frames.sum()
    assert all(len(image.ids) <= 60 for image in encoded.values())
    assert sum(len(image.ids) for image in encoded.values()) <= 150
    messages = conversation_variant(sample.messages, OPTIONS.conversations, Draws("key", variant, "turns"))
    mask = trained_tokens(result, loss)
    text = IDEFICS3.tokenizer.decode(result.ids[mask].tolist())
    close = "<end_of_utterance>"
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    said = [a.strip() + close for a in answers]
    if loss == "all":
        assert all(part.strip() in text for m in messages for part in [i["text"] for i in m["content"] if "text" in i])
    else:
        kept = said if loss == "auto" else said[-1:]
        assert [piece.strip() + close for piece in text.split(close)[:-1]] == kept


def sizes_of(processor, options: ImageOptions, *sizes: tuple[int, int]) -> list[int]:
    views = image_views(dict(enumerate(sizes)), options, processor, Draws("k"))
    return [processor.at_detail(v.detail).frames_for(*v.size(*sizes[n])) for n, v in views.items()]


def test_small_images_are_not_enlarged() -> None:
    assert IDEFICS3.frames_for(20, 20) == 10
    assert sizes_of(IDEFICS3, ImageOptions(enlarge=False), (20, 20), (40, 20), (96, 96)) == [1, 3, 10]
    idefics2 = tiny_idefics2_processor(split=True)
    assert sizes_of(idefics2, ImageOptions(enlarge=False), (20, 20), (56, 60)) == [1, 5]


def test_images_are_made_to_fit_their_budgets() -> None:
    tokens = [IDEFICS3.at_detail(detail).tokens_for(90, 90) for detail in (1, 2, 3)]
    assert tokens == sorted(set(tokens))
    assert sizes_of(IDEFICS3, ImageOptions(max_tokens=tokens[1]), (90, 90)) == [5]
    assert sizes_of(IDEFICS3, ImageOptions(max_tokens=tokens[2] - 1), (90, 90)) == [5]
    assert sizes_of(IDEFICS3, ImageOptions(max_tokens_per_sample=2 * tokens[1]), (90, 90), (90, 90)) == [5, 5]
    with pytest.raises(BadSample, match="take"):
        sizes_of(IDEFICS3, ImageOptions(max_tokens_per_sample=tokens[0]), (90, 90), (90, 90))


def test_images_are_cut_as_often_as_their_shares_say() -> None:
    shares = {1: 0.5, 2: 0.3, 3: 0.2}
    renderer = Renderer(IDEFICS3, SourceConfig(images=ImageOptions(tiles=shares), variants=400))
    sample = sample_from_dict({"items": [{"image": "0.png", "width": 90, "height": 90}, {"text": "A page."}]})
    views = [renderer.prepare(sample, f"k{n}", [(90, 90)], 3).views[0] for n in range(400)]
    for tiles, share in shares.items():
        assert sum(view.detail == tiles for view in views) / 400 == pytest.approx(share, abs=0.08)
        assert IDEFICS3.at_detail(tiles).frames_for(90, 90) == tiles**2 + (tiles > 1)
    assert sizes_of(IDEFICS3, ImageOptions(tiles={2: 1.0}), (90, 90), (20, 20)) == [5, 5]
    assert sizes_of(IDEFICS3, ImageOptions(tiles={3: 1.0}, enlarge=False), (90, 90), (20, 20)) == [10, 1]
    idefics2 = tiny_idefics2_processor(split=True)
    assert sizes_of(idefics2, ImageOptions(tiles={1: 1.0}), (90, 90)) == [1]
    assert sizes_of(idefics2, ImageOptions(tiles={2: 1.0}), (90, 90)) == [5]


def test_only_shares_of_several_numbers_of_tiles_are_random_and_all_have_an_index_of_their_own() -> None:
    made = [Renderer(IDEFICS3, SourceConfig(images=ImageOptions(tiles=t))) for t in ({}, {2: 1.0}, {2: 1.0, 3: 1.0})]
    assert [renderer.variants for renderer in made] == [1, 1, 8]
    assert len({renderer.fingerprint() for renderer in made}) == 3
    assert made[0].fingerprint() == IDEFICS3.fingerprint()


def test_image_options_that_cannot_work_are_refused() -> None:
    idefics = tiny_idefics_processor()
    for processor, options, message in (
        (IDEFICS3, ImageOptions(upscale_max=2.0), "enlarge=false"),
        (idefics, ImageOptions(upscale_max=2.0), "same size"),
        (idefics, ImageOptions(enlarge=False), "one number of frames"),
        (idefics, ImageOptions(tiles={2: 1.0}), "this processor makes 1 at most"),
        (IDEFICS3, ImageOptions(tiles={2: 0.5, 4: 0.5}), "this processor makes 3 at most"),
        (IDEFICS3, ImageOptions(max_tokens=2), "at least"),
        (tiny_idefics2_processor(split=True), ImageOptions(scaled_decode=True), "before it resizes"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            Renderer(processor, SourceConfig(images=options), "web")
        assert str(error.value).startswith("data.sources.web.images.")


CHANGES = [
    {"documents": DocumentOptions(max_images=1)},
    {"documents": DocumentOptions(end_marker=MARKER)},
    {"conversations": ConversationOptions(shuffle_turns=True)},
    {"conversations": ConversationOptions(system_prompt="x")},
    {"images": ImageOptions(enlarge=False)},
]


def test_fingerprints_change_with_what_changes_rendering_and_with_nothing_else() -> None:
    plain = Renderer(IDEFICS3, SourceConfig()).fingerprint()
    assert plain == IDEFICS3.fingerprint()
    found = {Renderer(IDEFICS3, SourceConfig(**change)).fingerprint() for change in CHANGES}
    assert len(found | {plain}) == len(CHANGES) + 1
    other = SourceConfig(weight=3, loss="all", images=ImageOptions(scaled_decode=True), variants=3)
    assert Renderer(IDEFICS3, other).fingerprint() == plain


def talk_of(number: int) -> tuple:
    rng = np.random.default_rng(number)
    picture = Image.fromarray(rng.integers(0, 256, (int(rng.integers(9, 99)), int(rng.integers(9, 99)), 3), np.uint8))
    messages = [m for q in range(4) for m in (user(f"{number} asks {q} " * (q + 1)), answer(f"answer {q}"))]
    messages[0]["content"].insert(0, {"image": "0.png"})
    return f"talk{number}", {"messages": messages}, {"0.png": png(picture)}


def test_planned_packs_of_varied_samples_are_collated_and_vary_by_seed_and_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path, [talk_of(n) for n in range(20)])
    config = SourceConfig(path=str(tmp_path / "*.tar"), conversations=OPTIONS.conversations, images=OPTIONS.images)
    data = data_config(sequence_length=512, epochs=2, augment=AugmentConfig(crop_scale=[0.5, 1.0]))
    sources = build_sources({"talks": config}, data, IDEFICS3)
    seen = {}
    for seed in (0, 1):
        collator = Collator(sources, IDEFICS3, data, seed)
        for step in Plan(sources, data, seed, 4).steps():
            for pack in step.packs:
                batch, bad = collator.batch([pack], step.step)
                assert not bad
                assert batch.segments.lengths == tuple(unit.tokens for unit in pack.units)
                for unit, ids in zip(pack.units, batch.input_ids.split(batch.segments.lengths)):
                    seen[seed, unit.epoch, unit.sample] = tuple(ids.tolist())
                    document = collator.document(unit, pack.number)
                    said = IDEFICS3.tokenizer.decode(document.rendered.ids[document.trained].tolist())
                    assert sorted(said.split("<end_of_utterance>")[:-1]) == [f" answer {q}" for q in range(4)]
    assert len(seen) == 80
    for one, other in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
        assert sum(seen[*one, n] != seen[*other, n] for n in range(20)) > 10


def test_variants_are_drawn_evenly() -> None:
    drawn = Counter(variant_drawn(4, 0, 0, "source", sample) for sample in range(800))
    assert set(drawn) == set(range(4))
    assert min(drawn.values()) > 150


def test_parts_of_documents_are_packed_apart_and_trained_to_their_own_end(tmp_path: Path) -> None:
    items = [{"text": f"one{MARKER}two"}, {"image": "0.png"}, {"text": f"{MARKER} three"}, {"image": "1.png"}]
    images = {f"{n}.png": png(Image.new("RGB", (16, 16), (50 * n, 0, 0))) for n in range(2)}
    write_shards(tmp_path, [("a", {"items": items}, images)])
    config = SourceConfig(path=str(tmp_path / "*.tar"), documents=DocumentOptions(end_marker=MARKER))
    data = data_config(epochs=1)
    processor = FakeProcessor()
    sources = build_sources({"web": config}, data, processor)
    [step] = Plan(sources, data, 0, 4).steps()
    collator = Collator(sources, processor, data, 0)
    units = [unit for pack in step.packs for unit in pack.units]
    found = [collator.document(unit, 0) for unit in units]
    assert sorted(processor.decode(document.rendered.ids) for document in found) == ["one", "three", "two"]
    for document in found:
        assert document.rendered.ids[0] == processor.bos_id
        assert document.rendered.ids[-1] == processor.eos_id
        for frames in document.rendered.frames:
            red = 0 if "two" in processor.decode(document.rendered.ids) else 50
            assert frames[0][0, 0, 0] == red


def test_the_marker_of_obelics_is_never_trained_on(tmp_path: Path) -> None:
    marker = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
    write_shards(tmp_path, [("a", {"items": [{"text": f"one\n\n{marker}\n\ntwo"}]}, {})])
    config = SourceConfig(path=str(tmp_path / "shard-000000.tar"))
    key = f"data.sources.web.documents.end_marker={marker}"
    with pytest.raises(ConfigError, match=f"Sample 'a' holds {marker}.*{key}"):
        build_sources({"web": config}, data_config(), FakeProcessor())
    streams = StreamLoader(
        {"web": config}, FakeProcessor(), data_config(), seed=0, global_batch_size=1, micro_batch_size=1
    )
    with pytest.raises(ConfigError, match=key):
        next(iter(streams))
    config = SourceConfig(path=config.path, documents=DocumentOptions(end_marker=marker))
    [source] = build_sources({"web": config}, data_config(), FakeProcessor())
    [step] = Plan([source], data_config(epochs=1), 0, 1).steps()
    assert sum(pack.tokens for pack in step.packs) == 2 * (1 + 3 + 1)  # bos, the text, eos


def test_scaled_decoding_changes_no_length_and_little_of_the_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        (901, 601), Image.Resampling.BICUBIC
    )
    for orientation in (1, 6):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = orientation
        smooth.save(buffer, "jpeg", quality=90, exif=exif)
        folder = tmp_path / str(orientation)
        sample = {"items": [{"image": "0.jpg"}, {"text": "a photo"}]}
        write_shards(folder, [("a", sample, {"0.jpg": buffer.getvalue()})])
        for processor in (IDEFICS3, tiny_idefics2_processor(), tiny_idefics_processor()):
            frames, hashes = [], []
            for scaled in (False, True):
                images = ImageOptions(scaled_decode=scaled)
                data = data_config(epochs=1)
                sources = build_sources({"s": SourceConfig(path=str(folder / "*.tar"), images=images)}, data, processor)
                plan = Plan(sources, data, 0, 1)
                batch, bad = Collator(sources, processor, data, 0).batch(next(plan.steps()).packs, 1)
                assert not bad
                [document] = [
                    Collator(sources, processor, data, 0).document(u, 0) for u in next(plan.steps()).packs[0].units
                ]
                frames.append(document.rendered.frames[0])
                hashes.append((batch.data_hash, plan.fingerprint()))
            for whole, fast in zip(*frames):
                assert whole.shape == fast.shape
                assert 0 < np.abs(whole.astype(int) - fast).max() < 40
                assert np.abs(whole.astype(int) - fast).mean() < 6
            assert hashes[0][0] != hashes[1][0]
            assert hashes[0][1] != hashes[1][1]


document_items = st.lists(st.one_of(texts, texts, st.just({"image": "x.png"})), min_size=1, max_size=8)
document_options = st.builds(
    DocumentOptions,
    end_marker=st.sampled_from([None, "b"]),
    max_images=st.sampled_from([None, 0, 1, 3]),
    max_images_in_a_row=st.sampled_from([None, 2]),
    ending_images=st.sampled_from(["keep", "strip", "skip"]),
    require_image=st.booleans(),
)
PROCESSORS = [IDEFICS3, tiny_idefics2_processor(split=True), tiny_idefics_processor(), FakeProcessor()]


@settings(max_examples=80)
@given(document_items, document_options, st.sampled_from(PROCESSORS))
def test_documents_under_all_options_keep_their_length_and_every_image_its_text(items, options, processor) -> None:
    sample = sample_from_dict({"items": items})
    sizes = [(20 + 9 * n, 40) for n in range(len(sample.images))]
    renderer = Renderer(processor, SourceConfig(documents=options))
    parts: list[list[dict]] = []
    with suppress(BadSample):
        parts = documents_in(sample.items, options)
    if not parts:
        with pytest.raises(BadSample, match="leave it out"):
            renderer.prepare(sample, "key", sizes)
        return
    prepared = renderer.prepare(sample, "key", sizes)
    encoded = {n: encode_view(Image.new("RGB", sizes[n]), view, processor) for n, view in prepared.views.items()}
    result = expand(prepared.pieces, encoded, prepared.planned)
    assert len(result.ids) == prepared.planned.tokens.sum()
    kept = [number for part in parts for number in image_numbers(part)]
    assert sorted(prepared.views) == kept
    assert [piece.image for piece in prepared.pieces if hasattr(piece, "image")] == kept
    assert (prepared.planned.kinds == BORDER_KIND).sum() == len(parts) - 1
    for part in parts:
        assert options.max_images is None or len(image_numbers(part)) <= options.max_images
        assert options.ending_images == "keep" or "image" not in part[-1] or options.ending_images == "skip"
    if processor is IDEFICS3:
        text = result.ids[(result.kinds != IMAGE_KIND) & (result.kinds != 0)]
        said = "".join(item["text"] for part in parts for item in part if "text" in item)
        assert processor.tokenizer.decode(text.tolist()).replace(processor.tokenizer.eos_token, "") == said
