import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.config import ConversationOptions, DocumentOptions, SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.inspection.preview import PackView, frame_uri, view_pack, write_page
from tests.helpers.data import (
    FakeProcessor,
    data_config,
    document,
    make_sources,
    write_shards,
    write_with_a_damaged_picture,
)


@pytest.fixture
def collator_and_packs(tmp_path: Path) -> tuple[Collator, list]:
    sources, data = make_sources(tmp_path)
    step = next(Plan(sources, data, 0, 6).steps())
    return Collator(sources, FakeProcessor(), data, 0), list(step.packs)


def views(collator: Collator, packs: list) -> list[PackView]:
    return [view_pack(collator, pack) for pack in packs]


def test_what_is_coloured_trained_is_what_the_batch_trains(collator_and_packs: tuple[Collator, list]) -> None:
    collator, packs = collator_and_packs
    for pack, view in zip(packs, views(collator, packs)):
        batch, _ = collator.batch([pack], 1)
        assert (view.tokens, view.loss_tokens) == (batch.tokens, batch.loss_tokens)
        spans = [span for segment in view.segments for span in segment.spans]
        assert sum(span.tokens for span in spans if span.kind == "trained") == batch.loss_tokens
        shown = "".join(span.text for span in spans if span.kind == "trained")
        assert shown == collator.processor.decode(batch.targets.numpy())
        assert sum(len(span.frames) for span in spans) == batch.images.count
        borders = np.cumsum([segment.tokens for segment in view.segments])
        assert [segment.end for segment in view.segments] == borders.tolist()


def test_kinds_of_a_conversation(collator_and_packs: tuple[Collator, list]) -> None:
    collator, packs = collator_and_packs
    segments = [segment for view in views(collator, packs) for segment in view.segments]
    chat = next(segment for segment in segments if segment.source == "digits")
    kinds = [span.kind for span in chat.spans]
    assert kinds == ["structural", "image", "masked", "structural", "trained"]
    assert chat.spans[2].text == "Which digit is this?"
    assert chat.spans[4].text.startswith("It is ")


def test_frames_are_shown_as_they_are(collator_and_packs: tuple[Collator, list]) -> None:
    collator, packs = collator_and_packs
    batch, _ = collator.batch(packs[:1], 1)
    spans = [span for segment in view_pack(collator, packs[0]).segments for span in segment.spans]
    uris = [frame for span in spans for frame in span.frames]
    for uri, frame in zip(uris, batch.images.pixels.numpy(), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert (np.asarray(image).transpose(2, 0, 1) == frame).all()


def test_large_frames_are_compressed() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 128, 128), dtype=np.uint8)
    assert frame_uri(noise).startswith("data:image/jpeg")
    assert frame_uri(noise[:, :64, :64]).startswith("data:image/png")


def test_a_split_document_shows_its_own_part(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    data = replace(data, sequence_length=90)
    collator = Collator(sources, FakeProcessor(), data, 0)
    packs = [pack for step, _ in zip(Plan(sources, data, 0, 6).steps(), range(4)) for pack in step.packs]
    parts = [segment for view in views(collator, packs) for segment in view.segments if segment.unit.last >= 0]
    assert parts
    for part in parts:
        assert sum(span.tokens for span in part.spans) == part.tokens == part.unit.tokens


def test_a_bad_sample_is_named_and_takes_no_tokens(tmp_path: Path) -> None:
    key = write_with_a_damaged_picture(tmp_path)
    sources, data = make_sources(tmp_path, write=False)
    collator = Collator(sources, FakeProcessor(), data, 0)
    packs = [pack for step, _ in zip(Plan(sources, data, 0, 2).steps(), range(5)) for pack in step.packs]
    segments = [segment for view in views(collator, packs) for segment in view.segments]
    dropped = [segment for segment in segments if segment.problem]
    assert {segment.key for segment in dropped} == {key}
    assert dropped[0].problem.startswith("unreadable_image")
    assert dropped[0].tokens == 0


def test_the_page_needs_nothing_else_and_escapes_text(tmp_path: Path) -> None:
    name, sample, images = document(1)
    sample["items"].append({"text": "<script>alert('x')</script>"})
    sample["items"].append({"text": "<a href='javascript:alert(2)'>here</a>"})
    write_shards(tmp_path / "pages", [(name, sample, images)])
    write_shards(tmp_path / "digits", [document(20)])
    sources, data = make_sources(tmp_path, write=False)
    collator = Collator(sources, FakeProcessor(), data, 0)
    step = next(Plan(sources, data, 0, 2).steps())
    page = tmp_path / "new" / "preview.html"
    write_page(page, "title", "subtitle", views(collator, list(step.packs)))
    html = page.read_text()
    assert "&lt;script&gt;alert" in html
    assert html.count("<script") == 1  # its own
    assert "http" not in html
    assert f"pages / {name}" in html
    links = re.findall(r"<[^<>]*\b(?:src|href)=[\"']?([^\"' >]*)", html)
    assert links
    assert [link for link in links if not link.startswith("data:")] == []
    assert "&lt;a href=" in html


def test_the_page_says_which_variant_is_shown(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    data.sources["digits"].conversations = ConversationOptions(newline_probability=0.5)
    data.sources["pages"].documents = DocumentOptions(end_marker="Page")
    sources = build_sources(data.sources, data, FakeProcessor())
    collator = Collator(sources, FakeProcessor(), data, 0)
    packs = [view_pack(collator, pack) for pack in next(Plan(sources, data, 0, 4).steps()).packs]
    write_page(tmp_path / "page.html", "title", "subtitle", packs)
    page = (tmp_path / "page.html").read_text()
    segments = [segment for pack in packs for segment in pack.segments]
    assert {segment.variants for segment in segments} == {1, 8}
    for segment in segments:
        if segment.variants > 1:
            assert f"variant {segment.variant + 1} of 8" in page
    assert "of a longer sample" in page


@pytest.mark.parametrize("form", ["canonical", "json"])
def test_an_answer_that_should_not_be_learnt_is_masked(tmp_path: Path, form: str) -> None:
    talk = [("user", "1?"), ("assistant", "First."), ("user", "2?"), ("assistant", "Second."), ("user", "3?")]
    messages: list[dict] = [{"role": role, "content": text} for role, text in [*talk, ("assistant", "Third.")]]
    messages[1]["weight"], messages[5]["weight"] = 0, 0.25
    if form == "json":
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
        path = str(tmp_path / "a.jsonl")
    else:
        path = str(write_shards(tmp_path, [("k", {"messages": messages}, {})])[0])
    talking = ConversationOptions(system_prompt="Be short.")
    config = SourceConfig(path=path, format=form, conversations=talking, epochs=1)
    data = data_config()
    sources = build_sources({"s": config}, data, FakeProcessor())
    collator = Collator(sources, FakeProcessor(), data, 0)
    packs = next(Plan(sources, data, 0, 1).steps()).packs
    [segment] = view_pack(collator, packs[0]).segments
    assert [span.text for span in segment.spans if span.kind == "trained"] == ["Second.", "Third."]
    assert "First." in "".join(span.text for span in segment.spans if span.kind == "masked")
    batch, _ = collator.batch(packs, 1)
    shown = collator.processor.decode(batch.targets.numpy())
    assert shown == "Second.Third."
    assert batch.target_weights.tolist() == [1.0] * (len("Second.") + 1) + [0.25] * (len("Third.") + 1)
    assert batch.documents[0].loss_weight == 8 + 0.25 * 7
