"""Every way to call `generate` that the documentation shows, with the tokens, scores and errors of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import m4train
from m4train.models.generation_settings import GenerationSettings
from tests.helpers.models import tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs
from tests.parity.models_reference import reference_pair

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES: dict[str, tuple[str, Any, Any]] = {
    "Idefics": ("ForVisionText2Text", tiny_idefics, idefics_inputs),
    "Idefics2": ("ForConditionalGeneration", tiny_idefics2, idefics2_inputs),
    "Idefics3": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
    "SmolVLM": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
}


class Letters:
    """A tokenizer of one character an id."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(33 + int(i)) for i in ids)


class Listener:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Any) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    head, tiny, make = FAMILIES[request.param]
    config = tiny() if request.param == "Idefics" else tiny(model_type=request.param.lower())
    ours = getattr(m4train, request.param + head)
    theirs, ours = reference_pair(request.param, config, ours, tmp_path_factory.mktemp(request.param))
    return theirs, ours, make(config, "left")


PLAIN = {"max_new_tokens": 6, "eos_token_id": 96, "pad_token_id": 3, "do_sample": False}
DRAWN = PLAIN | {"do_sample": True, "temperature": 1.4, "top_k": 20, "top_p": 0.9}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": PLAIN,
    "sampling": DRAWN,
    "min_p": DRAWN | {"min_p": 0.2},
    "several": DRAWN | {"num_return_sequences": 2},
    "beams": PLAIN | {"num_beams": 3},
    "best beams": PLAIN | {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "early": PLAIN | {"num_beams": 3, "early_stopping": True, "eos_token_id": [*range(40, 60)]},
    "sampling with beams": DRAWN | {"num_beams": 3},
    "sampling with few tokens": DRAWN | {"num_beams": 3, "top_k": 1, "eos_token_id": [7, 8, 9]},
    "penalties": PLAIN | {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "pad_token_id": 0},
    "bad words": PLAIN | {"bad_words_ids": [[90], [5, 6]]},
    "suppressed": PLAIN | {"suppress_tokens": [*range(30)]},
    "longer": PLAIN | {"eos_token_id": [*range(50)], "min_new_tokens": 4},
    "long": PLAIN | {"eos_token_id": [*range(50)], "min_length": 27},
    "by length": {key: value for key, value in PLAIN.items() if key != "max_new_tokens"} | {"max_length": 30},
    # an image token that is generated has no image: without a cache the next step of both libraries fails
    "no cache": PLAIN | {"use_cache": False, "bad_words_ids": [[90]]},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_tokens(pair: tuple[Any, Any, dict[str, Any]], name: str) -> None:
    theirs, ours, inputs = pair
    torch.manual_seed(0)
    expected = theirs.generate(**inputs, **CALLS[name])
    torch.manual_seed(0)
    assert ours.generate(**inputs, **CALLS[name]).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["greedy", "sampling", "beams", "best beams", "penalties", "sampling with beams"])
def test_sequences_scores_and_logits_in_a_dictionary(pair: tuple[Any, Any, dict[str, Any]], name: str) -> None:
    theirs, ours, inputs = pair
    asked = {**CALLS[name], "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(0)
    expected = theirs.generate(**inputs, **asked)
    torch.manual_seed(0)
    found = ours.generate(**inputs, **asked)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for key in ("scores", "logits"):
        for mine, other in zip(found[key], expected[key], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    if asked.get("num_beams"):
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.beam_indices, expected.beam_indices)
    plain = ours.generate(**inputs, **PLAIN, return_dict_in_generate=True)
    assert list(plain) == ["sequences"]


def test_a_configuration_of_theirs(pair: tuple[Any, Any, dict[str, Any]]) -> None:
    theirs, ours, inputs = pair
    for settings in (PLAIN, PLAIN | {"num_beams": 3, "length_penalty": 0.3}):
        config = transformers.GenerationConfig(**settings)
        expected = theirs.generate(**inputs, generation_config=config).tolist()
        for given in (config, settings, GenerationSettings(**settings)):
            assert ours.generate(**inputs, generation_config=given).tolist() == expected
        more = theirs.generate(**inputs, generation_config=config, max_new_tokens=2).tolist()
        assert ours.generate(**inputs, generation_config=config, max_new_tokens=2).tolist() == more


def test_functions_of_the_caller(pair: tuple[Any, Any, dict[str, Any]]) -> None:
    theirs, ours, inputs = pair
    width = inputs["input_ids"].shape[1]
    for asked in (PLAIN, PLAIN | {"num_beams": 3}):
        asked = asked | {
            "logits_processor": transformers.LogitsProcessorList([lambda ids, scores: -scores]),
            "stopping_criteria": transformers.StoppingCriteriaList(
                [lambda ids, scores, **_: torch.full((ids.shape[0],), ids.shape[1] >= width + 3)]
            ),
        }
        expected = theirs.generate(**inputs, **asked)
        assert ours.generate(**inputs, **asked).tolist() == expected.tolist()
        assert expected.shape[1] == width + 3


def test_a_streamer(pair: tuple[Any, Any, dict[str, Any]]) -> None:
    theirs, ours, inputs = pair
    one = {name: value[:1] for name, value in inputs.items()}
    heard = []
    for model in (theirs, ours):
        listener = Listener()
        model.generate(**one, **PLAIN, streamer=listener)
        heard.append(listener.heard)
        with pytest.raises(ValueError, match="streamer"):
            model.generate(**one, **PLAIN, num_beams=2, streamer=listener)
    assert heard[0] == heard[1]
    assert heard[0][-1] == "end"


def test_strings_that_stop(pair: tuple[Any, Any, dict[str, Any]]) -> None:
    _, ours, inputs = pair
    whole = ours.generate(**inputs, **PLAIN | {"eos_token_id": None})
    width = inputs["input_ids"].shape[1]
    said = Letters().decode(whole[0, width:])
    for given in (said[1:3], [said[1:3], "nothing"], said[2]):
        asked = PLAIN | {"eos_token_id": None, "stop_strings": given, "tokenizer": Letters()}
        row = ours.generate(**{name: value[:1] for name, value in inputs.items()}, **asked)[0, width:]
        last = given if isinstance(given, str) else given[0]
        assert Letters().decode(row) == said[: said.index(last) + len(last)]
    with pytest.raises(ValueError, match="tokenizer"):
        ours.generate(**inputs, **PLAIN, stop_strings="a")


@pytest.mark.parametrize("cached", [True, False])
def test_prompts_as_embeddings(pair: tuple[Any, Any, dict[str, Any]], cached: bool) -> None:
    theirs, ours, inputs = pair
    embeds = theirs.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    asked = PLAIN | {"bad_words_ids": [[90]], "use_cache": cached}
    expected = ours.generate(**inputs, **asked)
    found = ours.generate(inputs_embeds=embeds, **rest, **asked)
    assert found.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
    both = ours.generate(inputs["input_ids"], inputs_embeds=embeds, **rest, **asked)
    assert both.tolist() == expected.tolist()
    assert ours.generate(inputs=inputs["input_ids"], **rest, **asked).tolist() == expected.tolist()
    with pytest.raises(TypeError, match="generate needs a prompt"):
        ours.generate(**PLAIN)


@pytest.mark.parametrize(
    "asked", [{"max_length": 3}, {"max_length": 20}, {"max_new_tokens": 0}, {"max_new_tokens": -2}]
)
def test_lengths_that_leave_no_token(asked: dict[str, int], tmp_path: Path) -> None:
    theirs, ours = reference_pair("Idefics3", tiny_idefics3(), m4train.Idefics3ForConditionalGeneration, tmp_path)
    prompt = torch.full((1, 20), 5)
    for model in (theirs, ours):
        with pytest.raises(ValueError, match="max_"):
            model.generate(prompt, **asked)
