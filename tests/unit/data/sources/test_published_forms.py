"""The forms of public repositories and datasets, rebuilt small: what each is read as, and what the others are told to do."""

import copy
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.source import build_sources
from m4train.data.sources.media import words
from m4train.data.sources.placeholders import stray
from m4train.errors import BadSample
from tests.helpers.data import FakeProcessor, data_config
from tests.unit.data.sources.test_records import FORMS, ODD, A, B, Pic, composed, said, same

PA, PB = Pic(A), Pic(B)
WEB = "https://cdn.example.org/abc?id=3"
Q, R = "Which?", "Red."
SEEN = [("user", [PA, Q]), ("assistant", [R])]
BOTH = [("user", [PA, PB, Q]), ("assistant", [R])]
CAPTION = [PA, R]


def hg(question: str, answer: str | None = R) -> list[dict]:
    said_by = [{"from": "human", "value": question}]
    return said_by if answer is None else [*said_by, {"from": "gpt", "value": answer}]


def ua(question: Any, answer: Any = R) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def items(*content: dict) -> list[dict]:
    return ua(list(content), [{"type": "text", "text": R}])


TEXT = {"type": "text", "text": Q}
MMMU: dict[str, Any] = {
    "id": "validation_Art_1", "question": "<image 1> Which?", "options": "['Blue.', 'Red.']", "explanation": "", "image_1": A,
    "image_2": None, "img_type": "['Photographs']", "answer": "B", "topic_difficulty": "Easy", "subfield": "Drawing",
}  # fmt: skip
CHOICES = "A. Blue.\nB. Red."
MMBENCH = {"index": 1, "question": Q, "A": "Blue.", "B": R, "answer": "B", "category": "c", "image": A, "source": "s"}
CHOSEN = [("user", [PA, f"{Q}\n{CHOICES}"]), ("assistant", ["B. Red."])]
OCRVQA = {
    "image": A, "image_id": "1", "questions": ["1?", "2?"], "answers": ["1.", "2."], "ocr_tokens": ["x"], "title": "A Book",
    "authorName": "N", "genre": "G", "set_name": "train",
}  # fmt: skip
QWEN_VL = {"id": "0", "conversations": [{"from": "user", "value": "Picture 1: <img>a.png</img>\nIn <box>(1,2),(3,4)</box>?"},
                                        {"from": "assistant", "value": R}]}  # fmt: skip

READ: dict[str, tuple[dict, list] | tuple[dict, list, dict]] = {
    "LLaVA, text alone": (
        {"id": "w_0", "model": "", "conversations": hg(Q)},
        [("user", [Q]), ("assistant", [R])],
    ),
    "ShareGPT4V": ({"id": "1", "image": A, "conversations": hg("Which?\n<image>")}, [("user", [Q, PA]), ("assistant", [R])]),
    "LLaVA-NeXT interleaved": (
        {"sample_id": 0, "conversations": hg("<image><image>Which?"), "image": [A, B], "choice_list": None,
         "metadata": {"dataset": "x", "split": "train", "num_sample": 3, "task_instruction": ""}},
        BOTH,
    ),
    "LLaVA-OneVision": (
        {"id": "1", "image": {"bytes": None, "path": A}, "conversations": hg("<image>\nWhich?"), "data_source": "x"}, SEEN,
    ),
    "FineVision": (
        {"images": [A], "texts": [{"user": Q, "assistant": R}], "source": "v", "relevance_ratings": [4], "relevance_min": 4,
         "image_correspondence_ratings": [5], "visual_dependency_ratings": [3], "formatting_min": 2},
        SEEN,
    ),
    "LLaMA-Factory": ({"messages": ua("<image>Which?"), "images": [A]}, SEEN),
    "LLaMA-Factory, preferences": (
        {"conversations": hg("<image>Which?", None), "chosen": hg(Q)[1], "rejected": hg(Q, "No.")[1], "images": [A]}, SEEN,
    ),
    "LLaMA-Factory, alpaca": ({"instruction": Q, "input": "", "output": R, "images": [A]}, SEEN),
    "ms-swift": ({"messages": ua("<image>Which?"), "images": [{"bytes": None, "path": A}]}, SEEN),
    "ms-swift, rejected": ({"messages": ua("<image>Which?"), "images": [A], "rejected_response": "No."}, SEEN),
    "ms-swift, names in texts": (
        {"query": "<img>a.png</img>Which?", "response": R}, SEEN, {"placeholder": "/<img>(?P<image>.*?)</img>/"},
    ),
    "Unsloth": ({"messages": items({**TEXT, "image": None}, {"type": "image", "text": None, "image": {"path": A}})},
                [("user", [Q, PA]), ("assistant", [R])]),
    "Unsloth, radiology": ({"image": A, "image_id": "ROCO_1", "caption": R, "cui": ["C1"]}, CAPTION),
    "TRL": (
        {"messages": items({**TEXT, "index": None}, {"index": 0, "text": None, "type": "image"}), "images": [A]},
        [("user", [Q, PA]), ("assistant", [R])],
    ),
    "TRL, prompt and completion": ({"images": [A], "prompt": ua(Q)[:1], "completion": ua(Q)[1:]}, SEEN),
    "OpenAI": (
        {"messages": [{"role": "system", "content": "S"}, *items(
            {"type": "image_url", "image_url": {"url": A, "detail": "low"}}, TEXT)], "parallel_tool_calls": False, "tools": []},
        [("system", ["S"]), *SEEN],
    ),
    "OpenAI, preferences": (
        {"input": {"messages": [*ua("1?", "1."), *items({"type": "image_url", "image_url": {"url": A}}, TEXT)[:1]], "tools": [],
                   "parallel_tool_calls": True}, "preferred_output": ua(Q)[1:], "non_preferred_output": ua(Q, "No.")[1:]},
        [("user", ["1?"]), ("assistant", ["1."]), *SEEN],
    ),
    "Label Studio, JSON_MIN": (
        {"image": A, "id": 1, "caption": R, "annotator": 1, "annotation_id": 2, "created_at": "2024-01-01", "lead_time": 3.2},
        CAPTION,
    ),
    "COCO captions as questions": ({"question_id": "1", "image": A, "question": Q, "answer": ["No.", R, R], "id": 5}, SEEN),
    "VQAv2 with its picture": (
        {"question_type": "what", "multiple_choice_answer": R, "image_id": 1, "answer_type": "other", "question_id": 2,
         "answers": [{"answer": R, "answer_confidence": "yes", "answer_id": 1}], "question": Q, "image": A},
        SEEN,
    ),
    "alpaca with a picture": ({"instruction": "Look.", "input": Q, "output": R, "image": A},
                              [("user", [PA, "Look.\nWhich?"]), ("assistant", [R])]),
    "InternVL": ({"id": 0, "image": A, "width": 20, "height": 10, "conversations": hg("<image>\nWhich?")}, SEEN),
    "InternVL, several": (
        {"id": 1, "image": [A, B], "width_list": [1, 2], "height_list": [1, 2],
         "conversations": hg("Image-1: <image>\nImage-2: <image>\nWhich?")},
        [("user", ["Image-1: ", PA, "Image-2: ", PB, Q]), ("assistant", [R])],
    ),
    "Qwen-VL": (
        QWEN_VL, [("user", ["Picture 1: ", PA, "In <box>(1,2),(3,4)</box>?"]), ("assistant", [R])],
        {"placeholder": "/<img>(?P<image>.*?)</img>/"},
    ),
    "Qwen2-VL": ({"messages": items({"type": "image", "image": A, "resized_height": 280, "resized_width": 420}, TEXT)}, SEEN),
    "PaliGemma": ({"prefix": Q, "suffix": R, "image": A}, SEEN),
    "Florence-2": ({"image": A, "prefix": "<OD>", "suffix": "cup<loc_1><loc_2>"},
                   [("user", [PA, "<OD>"]), ("assistant", ["cup<loc_1><loc_2>"])]),
    "M3IT": ({"instruction": "Look.", "inputs": Q, "image_base64_str": ["data:image/png;base64,iVBORw0KGgo="], "outputs": R},
             [("user", [Pic("data:image/png;base64,iVBORw0KGgo="), "Look.\nWhich?"]), ("assistant", [R])]),
    "M3IT without inputs": ({"instruction": Q, "inputs": "", "image_base64_str": [], "outputs": R},
                            [("user", [Q]), ("assistant", [R])]),
    "MMMU": (MMMU, [("user", [PA, f" Which?\n{CHOICES}"]), ("assistant", ["B. Red."])], {"placeholder": "<image {n}>"}),
    "MMMU, a picture as a choice": (
        MMMU | {"image_2": B, "options": "['<image 2>', 'Red.']"},
        [("user", [PA, " Which?\nA. ", PB, "B. Red."]), ("assistant", ["B. Red."])], {"placeholder": "<image {n}>"},
    ),
    "MMMU, open": (MMMU | {"options": "[]", "answer": "12"}, [("user", [PA, " Which?"]), ("assistant", ["12"])],
                   {"placeholder": "<image {n}>"}),
    "MMBench, where nan stands for nothing": (MMBENCH | {"hint": "nan", "C": "nan", "D": "nan"}, CHOSEN),
    "ScienceQA": (
        {"image": A, "question": Q, "choices": ["Blue.", R], "answer": 1, "hint": "Look.", "lecture": "L", "solution": "S"},
        [("user", [PA, f"Look.\n{Q}\n{CHOICES}"]), ("assistant", ["B. Red."])],
    ),
    "A-OKVQA": ({"image": A, "question": Q, "choices": ["Blue.", R], "correct_choice_idx": 1, "direct_answers": "['Red.']",
                 "difficult_direct_answer": False, "rationales": ["It is."]}, CHOSEN),
    "SEED-Bench": ({"answer": "B", "choice_a": "Blue.", "choice_b": R, "question": Q, "image": A, "data_type": "image"}, CHOSEN),
    "DocVQA": ({"questionId": "1", "question": Q, "image": A, "docId": 3, "answers": [R, "red"], "data_split": "val"}, SEEN),
    "ChartQA": ({"imgname": A, "query": Q, "label": [R]}, SEEN, {"fields": {"answer": "label"}}),
    "OCR-VQA": (OCRVQA, [("user", [PA, "1?"]), ("assistant", ["1."]), ("user", ["2?"]), ("assistant", ["2."])]),
    "SLAKE": ({"img_id": 1, "img_name": A, "question": Q, "answer": R, "q_lang": "en", "qid": 0, "modality": "MRI"}, SEEN),
    "Mantis": ({"id": "1", "images": [A, B], "conversation": ua("<image><image>Which?"), "source": "s"}, BOTH),
    "MiniCPM-V": ({"id": "0", "image": {"<image_00>": A, "<image_01>": B}, "conversations": ua("<image_00><image_01>Which?")}, BOTH),
    "GLM-4V": ({"messages": [{"role": "user", "content": Q, "image": A}, ua(Q)[1]]}, SEEN),
    "DeepSeek-VL": (
        {"conversations": [{"role": "<|User|>", "content": "<image_placeholder>Which?", "images": [A]},
                           {"role": "<|Assistant|>", "content": R}]},
        SEEN, {"placeholder": "<image_placeholder>"},
    ),
    "InternLM-XComposer": ({"id": "0", "image": [A], "conversations": ua("<ImageHere>Which?")}, SEEN, {"placeholder": "<ImageHere>"}),
    "LLaVA-Med": ({"id": "1", "image": A, "pair_id": "2", "domain": {"mri": True}, "conversatons": hg("<image>Which?")},
                  SEEN, {"fields": {"conversations": "conversatons"}}),
    "R1-style": ({"image": A, "problem": "<image>Which?", "solution": R}, SEEN),
    "Axolotl": ({"messages": items({"type": "image", "path": A}, TEXT)}, SEEN),
    "Anthropic": ({"system": "S", "messages": items({"type": "image", "source": {"type": "url", "url": A}}, TEXT)},
                  [("system", ["S"]), *SEEN]),
    "a context that is asked for": (
        {"messages": ua("<image>Which?"), "images": [A], "context": "It is May."}, [("user", ["It is May.\n", PA, Q]), ("assistant", [R])],
        {"fields": {"context": "context"}},
    ),
    "a hint of exchanges": ({"texts": [{"user": Q, "assistant": R}], "clue": "Look."},
                            [("user", ["Look.\nWhich?"]), ("assistant", [R])], {"fields": {"hint": "clue"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_published_form_is_read(name: str) -> None:
    record, expected, *options = READ[name]
    found = composed(record, **(options[0] if options else {}))
    assert same(said(found), expected), said(found)
    found.unread()


COCO = {"info": {}, "images": [{"id": 1, "file_name": A}], "annotations": [{"image_id": 1, "id": 5, "caption": R}]}
LISTED = "write each on a line of its own"
REFUSED: dict[str, tuple[Any, str, str] | tuple[Any, str, str, dict]] = {
    "an address next to a caption": ({"url": WEB, "caption": R, "key": "0", "status": "success"}, "unread_media", "'url' holds"),
    "LAION": ({"URL": WEB, "TEXT": R, "WIDTH": 20, "HEIGHT": 10, "similarity": 0.3}, "bad_json", "{caption: ...}"),
    "LAION as captions": ({"URL": WEB, "TEXT": R, "NSFW": "UNLIKELY"}, "unread_media", "'URL'", {"fields": {"caption": "TEXT"}}),
    "LAION as texts": (
        {"URL": WEB, "TEXT": R, "WIDTH": 20, "HEIGHT": 10}, "unread_media", "'URL'", {"fields": {"text": "TEXT"}},
    ),
    "WIT": ({"image_url": "https://w/a", "page_title": "T", "caption_reference_description": R}, "bad_json", "{caption: ...}"),
    "COCO": (COCO, "bad_json", f"listed under 'annotations', {LISTED}"),
    "MiniGPT-4": ({"annotations": [{"image_id": "2", "caption": R}]}, "bad_json", LISTED),
    "MiniGPT-4, line by line": ({"image_id": "2", "caption": R}, "unread_media", "'image_id'"),
    "VQAv2's questions": ({"questions": [{"image_id": 4, "question": Q, "question_id": 1}]}, "bad_json", LISTED),
    "VQAv2 without its picture": ({"image_id": 4, "question": Q, "answers": [{"answer": R}]}, "unread_media", "'image_id'"),
    "records in an object": ({"data": [{"image": A, "caption": R}]}, "bad_json", f"listed under 'data', {LISTED}"),
    "Visual Genome": ({"id": 1, "qas": [{"question": Q, "answer": R}]}, "bad_json", LISTED),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": Q}]}]}, "bad_json", LISTED),
    "an InternVL list of datasets": ({"mine": {"root": "x", "annotation": "a.jsonl", "repeat_time": 1}}, "bad_json", "mine"),
    "Label Studio": ({"id": 1, "data": {"image": A}, "annotations": [{"result": []}]}, "bad_json", LISTED),
    "OpenAI's batches": ({"custom_id": "1", "url": "/v1/chat", "body": {"messages": ua(Q)}}, "bad_json", "body"),
    "OpenAI's preferences without the better one": ({"input": {"messages": ua(Q)[:1]}, "non_preferred_output": ua(Q)[1:]}, "empty_answer", "'input'"),
    "Qwen-VL": (QWEN_VL, "stray_placeholder", "placeholder='/<img>(?P<image>.*?)</img>/'"),
    "MMMU": (MMMU, "stray_placeholder", "placeholder="),
    "ms-swift, a video": ({"messages": ua("<video>Which?"), "videos": ["v.mp4"]}, "stray_placeholder", "only pictures are trained on"),
    "ms-swift, grounding": (
        {"messages": ua("<image>Find <ref-object>", "[<bbox>]"), "images": [A], "objects": {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}},
        "stray_placeholder", "write the names and the coordinates into the texts",
    ),
    "ChartQA": ({"imgname": A, "query": Q, "label": R}, "empty_answer", "fields={answer: ...}"),
    "questions of LLaVA-Bench": ({"question_id": 1, "image": A, "text": Q, "category": "conv"}, "empty_answer", "no answer"),
    "OCR-VQA with a lost answer": (OCRVQA | {"answers": ["1."]}, "bad_json", "are 2 and 1"),
    "OCR-VQA without questions": ({k: v for k, v in OCRVQA.items() if k != "questions"}, "bad_json", "title"),
    "RLAIF-V": ({"image": A, "question": Q, "chosen": R, "rejected": "N", "image_path": "./x/1.jpg"}, "unread_media", "ignore_fields=[image_path]"),
    "PixMo": ({"image_url": "https://p/x", "image_sha256": "ab", "question": Q, "answer": R, "photo": "b.png"}, "unread_media", "'photo'"),
    "a caption that is missing": ({"image": A, "caption": "nan"}, "no_text", "'nan'"),
    "conversations of plain texts": ({"image": A, "conversations": [Q, R]}, "bad_json", "turn 0 is a str"),
    "lists of lists": ({"conversation": [[ua(Q)[0]], [ua(Q)[1]]]}, "bad_json", "turn 0 is a list"),
    "a classification": ({"image": A, "label": 3}, "bad_json", "image, label"),
    "Donut": ({"file_name": A, "ground_truth": json.dumps({"gt_parse": {}})}, "bad_json", "ground_truth"),
    "a line that is a text": ("a", "bad_json", "a str"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_as_it_is_says_what_to_do(name: str) -> None:
    record, reason, part, *options = REFUSED[name]
    with pytest.raises(BadSample) as error:
        composed(record, **(options[0] if options else {})).unread()
    assert (error.value.reason, part in error.value.detail) == (reason, True), error.value.detail


def test_addresses_of_texts_are_where_they_come_from() -> None:
    assert composed({"text": "A page.", "url": WEB, "timestamp": "2024"}).unread() == ("url", "timestamp")
    assert composed({"image": A, "caption": R, "url": WEB}).unread() == ("url",)


def test_of_preferences_only_the_better_answer_is_learnt() -> None:
    record, _ = READ["OpenAI, preferences"]
    found = composed(record)
    assert [message.get("weight", 1) for message in found.sample.messages] == [1, 0, 1, 1]
    assert found.unread() == ("non_preferred_output", "input.parallel_tool_calls")


def test_a_context_next_to_turns_is_counted_until_it_is_asked_for() -> None:
    assert composed({"messages": ua(Q), "context": "It is May.", "hint": "nan"}).unread() == ("context", "hint")


def test_a_placeholder_that_names_its_picture() -> None:
    named = {"placeholder": ["/<img>(?P<image>.*?)</img>/", "<pic>"]}
    found = composed({"messages": ua("<img> b.png </img>or<pic>?"), "images": [A]}, **named)
    assert same(said(found)[0][1], [PB, "or", PA, "?"])
    with pytest.raises(BadSample) as error:
        composed({"messages": ua("<img></img>Which?")}, **named)
    assert error.value.reason == "missing_image"


PAGE = (Path(__file__).parents[4] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_examples_of_the_documents_are_read_with_their_pictures(tmp_path: Path, kind: str, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (20, 10), name).save(tmp_path / "photos" / f"{name}.jpg")
    [block] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) > 20
    if kind == "parquet":
        [example] = re.findall(r"```python\n(import pyarrow.*?)```", PAGE, re.DOTALL)
        pytest.importorskip("pyarrow")
        monkeypatch.chdir(tmp_path)
        exec(example, {})
    (tmp_path / "mine.jsonl").write_text(block)
    (tmp_path / "mine.json").write_text(f"[{','.join(lines)}]")
    config = SourceConfig(path=str(tmp_path / f"mine.{kind}"), format="auto")
    [built] = build_sources({"s": config}, data_config(), FakeProcessor())
    assert (built.index.bad_count, built.index.unread) == (0, {})
    assert len(built) == (1 if kind == "parquet" else len(lines))
    for number in range(len(built)):
        seen = list(built.images(number).values())
        assert bool(seen) == (kind == "parquet" or "photos/" in lines[number])
        assert seen == [] or max(seen[0].getpixel((5, 5))) > 200


# Places for pictures of published templates, and what only looks like them.
PLACES = sorted(
    words("""<image> <Image> </img> <image/> <|image|> <|image_1|> <image1> <image-1> <image:1> [image1] {{image}} {image_1} <ImageHere>
<image_soft_token> <start_of_image> <|vision_start|> <|image_pad|> <|VIDEO|> <IMG_CONTEXT> <im_start> <|im_patch|> <boi> <eoi>
<fake_token_around_image> <row_1_col_1> <global-img> <|media_placeholder|> <ref-object> <bbox> <图片> 【图片】 <|endofimage|> <imgpad>
<imagetoken> <unk_image> <cimage> <image_gen> <|image_sentinel|> %%image%% __image__ ##IMAGE## [[image]] <frame1> <audio_bos>
＜image＞ &lt;image&gt; &lt;|image|&gt; <ImageFeature> <dummyimage> <Screenshot>""")
)
PLACES += [
    "<image 1>",
    "[Image #1]",
    "< image >",
    "[INSERT IMAGE]",
    "<image id=1>",
    '<image src="a.jpg">',
    "![a](b.png)",
]
TEXTS = sorted(
    words("""<div> <p> <|im_start|> <|im_end|> <s> </s> <think> <answer>3</answer> [1] {x} ${image} a[image] f(x)={x} \\frac{image}{x}
@image __init__ <box>(1,2)</box> <ref>cup</ref> <loc_12> [link](a.html) <OD> <CAPTION> {{name}} {%image%} &lt;p&gt; <ImageGallery>
<|box_start|> <VideoPlayer> [pictured]""")
)
TEXTS += [
    "[Figure 1]",
    "[Image credit: NASA]",
    "[frame 3]",
    "x <= image",
    "a<image && b>c",
    "# Image",
    "(image 1)",
    "<vision statement>",
]


@pytest.mark.parametrize("place", PLACES)
def test_places_for_pictures(place: str) -> None:
    assert stray(f"Look at {place} here.") is not None


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_no_places(text: str) -> None:
    assert stray(f"Look at {text} here.") is None


def test_looking_for_places_takes_time_in_proportion() -> None:
    for text in (
        "<" * 100_000 + " image",
        "<img " * 20_000,
        "[image " * 20_000,
        "{{image" * 20_000,
        "&lt;" * 30_000 + "img",
    ):
        begun = time.perf_counter()
        stray(text)
        assert time.perf_counter() - begun < 10  # 0.2 s, and hours if it were not


BASES = [
    *(case[0] for case in READ.values()),
    *(case[0] for case in REFUSED.values()),
    *(form for form, _ in FORMS.values()),
]
BASES = [base for base in BASES if isinstance(base, dict)]
STRANGE = [
    *ODD,
    10**30,
    -1,
    0.5,
    float("inf"),
    "<image>",
    "<img>a</img>",
    "nan",
    "[1, 2",
    "{'a': 1}",
    [{"role": "user"}],
    [[["a"]]],
]
STRANGE += [
    {"role": "user", "content": [{"type": "image"}]},
    {"text": ["a", "b"]},
    [{"type": "image_url", "image_url": {}}],
]
NAMES = sorted({name for base in BASES for name in base}) + [
    "role",
    "value",
    "weight",
    "A",
    "B",
    "option_a",
    "answer_idx",
    "history",
]


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    yield place
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[name], (*place, name))


def changed(value: Any, place: tuple, change: Callable[[Any, Any], None]) -> Any:
    """The value after a change to what holds its part at `place`."""
    value = copy.deepcopy(value)
    holder = value
    for name in place[:-1]:
        holder = holder[name]
    change(holder, place[-1])
    return value


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_record_holds_it_is_a_sample_or_a_bad_one(seed: int) -> None:
    """Records of all forms with parts replaced, lost, repeated and under other names end in nothing but a bad sample."""
    draw = random.Random(seed)

    def repeat(holder: Any, name: Any) -> None:
        if isinstance(holder, list):
            holder.append(holder[name])
        else:
            holder[draw.choice(NAMES)] = holder[name]

    changes = (lambda h, n: h.__setitem__(n, draw.choice(STRANGE)), lambda h, n: h.__delitem__(n), repeat)
    outcomes = Counter()
    for _ in range(600):
        record = draw.choice(BASES)
        for _ in range(draw.randint(1, 3)):
            inner = [place for place in places(record) if place]
            record = changed(record, draw.choice(inner), draw.choice(changes)) if inner else record
        try:
            composed(record).unread()
            outcomes["read"] += 1
        except BadSample as error:
            outcomes[error.reason] += 1
    assert len(outcomes) > 8
