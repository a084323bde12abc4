"""Questions of several turns, and the losses of expected answers, against a plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from m4train import Idefics3Config, Idefics3ForConditionalGeneration
from m4train.config import DecodingConfig
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import Asked, answer_conversations, every_question, reference_losses
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.processing import tiny_idefics3_processor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    processor = tiny_idefics3_processor(image_size=16)
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.eos_id}
    model = Idefics3ForConditionalGeneration(
        Idefics3Config.from_dict(tiny_idefics3(text_config=text, image_token_id=processor.image_token_id))
    )
    perturb(model)
    return model.eval(), processor


def talk(turns: int, number: int = 0) -> Asked:
    """A conversation in which each question shows a picture."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": [{"image": str(turn)}, {"text": f"what {turn}?"}]},
            {"role": "assistant", "content": [{"text": f"that {turn}"}]},
        ]
    images = [Image.new("RGB", (16, 16), (40 * turn + 9 * number, 90, 10)) for turn in range(turns)]
    return Asked(number, f"talk {number}", messages, images, ("this", "that"))


def test_every_question_is_asked_behind_the_stored_answers() -> None:
    asked = every_question(talk(3))
    assert [each.turn for each in asked] == [0, 1, 2]
    assert [len(each.messages) for each in asked] == [2, 4, 6]
    assert [len(each.images) for each in asked] == [1, 2, 3]
    assert [each.references for each in asked] == [(), (), ("this", "that")]
    context = talk(2)
    context.messages[1]["weight"] = 0.0
    assert [each.turn for each in every_question(context)] == [0]  # an answer that is context is not asked
    assert len(every_question(context)[0].images) == 2


def test_answers_to_turns_are_those_to_the_conversations_so_far(pair: tuple[Any, Any]) -> None:
    decoding = Decoding.of(*pair, DecodingConfig(), 5)
    together = list(answer_conversations(*pair, every_question(talk(3)), decoding, CPU, batch_size=3))
    alone = [next(answer_conversations(*pair, [each], decoding, CPU, batch_size=1)) for each in every_question(talk(3))]
    assert [answer.answer for answer in together] == [answer.answer for answer in alone]
    assert [answer.references for answer in together] == [("that 0",), ("that 1",), ("this", "that")]
    assert [answer.question for answer in together] == ["what 0?", "what 1?", "what 2?"]


def test_losses_of_references_are_those_of_a_whole_forward_pass(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    asked = [each for number in range(2) for each in every_question(talk(2, number))]
    found = list(reference_losses(model, processor, asked, CPU, batch_size=3))
    for each, answer in zip(asked, found, strict=True):
        whole = [*each.messages[:-1], {"role": "assistant", "content": [{"text": answer.references[0]}]}]
        given = {"images": [each.images], "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([whole], **given)
        prompt = processor.apply_chat_template([each.messages[:-1]], add_generation_prompt=True, **given)
        start, tokens = prompt["input_ids"].shape[1], answer.about["tokens"]
        with torch.no_grad():
            logits = model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        expected = -sum(logits[place - 1, ids[place]] for place in range(start, start + tokens))
        assert processor.decode(ids[start : start + tokens]).strip() == answer.references[0]
        assert answer.about["loss"] == pytest.approx(float(expected), rel=1e-4)
