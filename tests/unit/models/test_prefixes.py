"""What prompts share is read once: the same answers, the vision tower once an image, on any rank the same passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m4train import Idefics3Config, Idefics3ForConditionalGeneration, IdeficsForVisionText2Text
from m4train.evaluation.likelihood import answer_losses
from m4train.models.decoding import DecodingSteps
from m4train.models.prefixes import beginnings, distinct
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics3

IMAGE = 7


def test_rows_share_what_holds_all_their_images() -> None:
    pixels = torch.zeros(6, 1, 3, 2, 2)
    pixels[:5] += torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0])[:, None, None, None, None]
    prompts = [
        [1, IMAGE, IMAGE, 4, 5],
        [1, IMAGE, IMAGE, 4, 6, 8],
        [1, IMAGE, IMAGE, 4, 5],
        [1, IMAGE, IMAGE, 9],
        [1, 4],
        [1, 4],
    ]
    found = beginnings(prompts, pixels, None, IMAGE)
    assert found is not None
    assert found.group == [0, 0, 1, 0, 2, 3]  # other pixels, or no image, are read alone
    assert found.rows == [0, 2, 4, 5]
    assert found.lengths == [3, 4, 1, 1]  # what all of a group share; alone, up to the last token
    assert beginnings([[1, IMAGE, 2], [1, 2, IMAGE]], pixels[:2], None, IMAGE) is None  # the image comes later
    assert beginnings([[1, IMAGE, 2], [1, IMAGE, 2]], pixels[1:3], None, IMAGE) is None
    masks = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    masks[1, 0, 0] = False
    assert beginnings([[1, IMAGE, 2], [1, IMAGE, 2]], pixels[:2], masks, IMAGE) is None
    assert beginnings([[1, IMAGE, 2], [1, IMAGE, 2]], pixels[:2], masks[:1].expand(2, -1, -1, -1), IMAGE) is not None


def test_frames_that_are_equal_are_found() -> None:
    frames = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [3.0, 0.0]])  # the second has the same sum as the first
    first, which = distinct(frames)
    assert (first.tolist(), which.tolist()) == ([0, 1, 3], [0, 1, 0, 2])


@pytest.fixture(scope="module")
def model() -> Any:
    made = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    perturb(made)
    return made.eval()


def asked(model: Any, questions: list[tuple[int, list[int]]]) -> dict[str, torch.Tensor]:
    """Prompts about pictures, by number, padded on the left."""
    token, side = model.config.image_token_id, model.config.vision_config.image_size
    rows = [[1, *[token] * model.config.tokens_per_image, 5, 6, *rest] for _, rest in questions]
    width = max(map(len, rows))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(4, 1, 3, side, side, generator=generator)
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pictures[[picture for picture, _ in questions]],
    }


QUESTIONS = [(0, [11, 12, 13]), (1, [14]), (0, [11, 15]), (0, [16, 17, 18, 19]), (1, [14, 12]), (2, [20, 21])]


def counted(model: Any) -> tuple[list[int], Any]:
    """How many images pass the vision tower, call by call: it is given their patches, or frames."""
    seen: list[int] = []
    config = model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2
    per_image = 1 if model.config.model_type == "idefics" else patches
    hook = model.model.vision_model.register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0]) // per_image)
    )
    return seen, hook


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_answers_are_those_to_each_question_alone(model: Any, settings: dict[str, int]) -> None:
    inputs = asked(model, QUESTIONS)
    seen, hook = counted(model)
    together = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, **settings)
    hook.remove()
    assert seen == [3]  # pictures, of six questions
    model.shares_beginnings = False
    try:
        apart = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, **settings)
    finally:
        del model.shares_beginnings
    assert torch.equal(together, apart)


def test_losses_of_options_pass_the_tower_once_an_image_too(model: Any) -> None:
    inputs = asked(model, QUESTIONS)
    options = [[[30], [31, 32], [33]]] * len(QUESTIONS)
    seen, hook = counted(model)
    together = answer_losses(model, inputs, options)
    hook.remove()
    assert seen == [3]
    for row, losses in enumerate(together):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert losses == pytest.approx(answer_losses(model, alone, options[:1])[0], rel=1e-4)


def test_ranks_that_share_the_weights_make_the_same_passes(model: Any) -> None:
    """One rank has prompts to share and the other has none: both read in two passes."""
    passes: list[int] = []
    for questions in (QUESTIONS, QUESTIONS[1:3]):
        inputs, calls = asked(model, questions), []
        hook = model.model.register_forward_pre_hook(lambda module, given, calls=calls: calls.append(1))
        somewhere = lambda here: False  # another rank shares, and none has ended
        found = model.generate(
            **inputs, max_new_tokens=3, eos_token_id=None, generation_config={"all_ended": somewhere}
        )
        hook.remove()
        passes.append(len(calls))
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=3, eos_token_id=None))
    assert passes == [4, 4]  # the beginnings, the rest with the first token, two more tokens


def test_a_sliding_window_shorter_than_a_prompt_shares_nothing() -> None:
    config = tiny_idefics3()
    config["text_config"] = {**config.get("text_config", {}), "model_type": "mistral", "sliding_window": 8}
    made = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config)).eval()
    if made.config.text_config.window is None:
        pytest.skip("this decoder has no window")
    seen, hook = counted(made)
    made.generate(**asked(made, QUESTIONS), max_new_tokens=2, eos_token_id=None)
    hook.remove()
    assert seen == [6]


def test_the_tower_of_idefics_sees_each_image_once() -> None:
    from m4train import IdeficsConfig

    made = IdeficsForVisionText2Text(IdeficsConfig.from_dict(tiny_idefics()))
    perturb(made)
    made.eval()
    side = made.config.vision_config.image_size
    pictures = torch.randn(2, 1, 3, side, side, generator=torch.Generator().manual_seed(1))[[0, 1, 0]]
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 8, 9], [1, 5, 10, 11]])
    inputs = {
        "input_ids": ids,
        "pixel_values": pictures,
        "image_attention_mask": torch.ones(3, 4, 1, dtype=torch.int64),
    }
    seen, hook = counted(made)
    together = made.generate(**inputs, max_new_tokens=4, eos_token_id=None)
    hook.remove()
    assert seen == [2]
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(together[row : row + 1], made.generate(**alone, max_new_tokens=4, eos_token_id=None))


def test_the_cache_is_allocated_once_and_never_copied(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first token that follows the prompts on, keys and values stay at one place in memory."""
    places: list[int] = []
    forward = DecodingSteps._pass

    def noted(self: DecodingSteps) -> torch.Tensor:
        logits = forward(self)
        assert self.cache is not None
        places.append(self.cache.keys[0].data_ptr())
        return logits

    monkeypatch.setattr(DecodingSteps, "_pass", noted)
    model.generate(**asked(model, QUESTIONS), max_new_tokens=6, eos_token_id=None)
    assert len(places) == 7  # the beginnings, the rest, five more tokens
    assert len(set(places[1:])) == 1


def test_decoding_stops_when_all_rows_have_ended(model: Any) -> None:
    inputs = asked(model, QUESTIONS)
    free = model.generate(**inputs, max_new_tokens=8, eos_token_id=None)[:, inputs["input_ids"].shape[1] :]
    ends = sorted(set(free[:, 1].tolist()))  # every row ends with its second token at the latest
    ended = model.generate(**inputs, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
    assert ended.shape[1] - inputs["input_ids"].shape[1] <= 2
