"""What `generate` promises in addition to equality with the reference (tests/parity)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from m4train.errors import DataError
from m4train.models import Idefics3Config, Idefics3ForConditionalGeneration
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.synchronisation import Synchronisations


@pytest.fixture
def model() -> Idefics3ForConditionalGeneration:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3()))
    perturb(model)
    return model.eval()


PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(model: Idefics3ForConditionalGeneration) -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [30, 31], [40]]
    alone = [model.generate(torch.tensor([p]), max_new_tokens=8)[0, len(p) :].tolist() for p in prompts]
    ids = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(ids, mask, max_new_tokens=8)[:, 6:].tolist()
    assert together == alone
    beams = [model.generate(torch.tensor([p]), max_new_tokens=8, num_beams=3)[0, len(p) :].tolist() for p in prompts]
    assert model.generate(ids, mask, max_new_tokens=8, num_beams=3)[:, 6:].tolist() == beams


def test_every_step_but_the_first_takes_one_token_a_row(model: Idefics3ForConditionalGeneration) -> None:
    sizes: list[int] = []
    model.model.text_model.layers[0].register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    model.generate(PROMPT.repeat(3, 1), max_new_tokens=4)
    assert sizes == [12, 3, 3, 3]


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_the_host_waits_once_for_a_token(
    how: dict[str, Any], model: Idefics3ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To see whether it was the last; what the prompt takes besides does not grow with the answer."""
    read, lists = torch.Tensor.tolist, list[str]()

    def noted(tensor: torch.Tensor) -> Any:
        lists.append("tolist")
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    waits = []
    for new in (3, 8):
        lists.clear()
        with Synchronisations() as seen:
            model.generate(PROMPT.repeat(2, 1), max_new_tokens=new, eos_token_id=[], **how)
        # Ids are looked at on a CPU only, and lists of its tensors are made without an operation.
        waits.append([wait for wait in seen.found if "models/checks.py" not in wait] + lists)
    assert len(waits[1]) - len(waits[0]) == 8 - 3, "\n".join(waits[1])


def test_rows_end_at_any_of_several_ids(model: Idefics3ForConditionalGeneration) -> None:
    free = model.generate(PROMPT, max_new_tokens=8)[0, 4:].tolist()
    stop = free[3]
    ended = model.generate(PROMPT, max_new_tokens=8, eos_token_id=[96, stop], pad_token_id=1)[0, 4:].tolist()
    assert ended == free[: free.index(stop) + 1]
    model.generation_config = {"eos_token_id": [stop]}
    assert model.generate(PROMPT, max_new_tokens=8)[0, 4:].tolist() == ended
    assert model.generate(PROMPT, max_new_tokens=8, eos_token_id=[])[0, 4:].tolist() == free


def test_lengths(model: Idefics3ForConditionalGeneration) -> None:
    assert model.generate(PROMPT, eos_token_id=[]).shape == (1, 24)
    assert model.generate(PROMPT, max_length=9, eos_token_id=[]).shape == (1, 9)
    assert model.generate(PROMPT, max_new_tokens=3, max_length=5, eos_token_id=[]).shape == (1, 7)


def test_drawing_follows_the_generator(model: Idefics3ForConditionalGeneration) -> None:
    def draw(seed: int, **settings: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(PROMPT, do_sample=True, max_new_tokens=6, generator=generator, **settings).tolist()

    assert draw(0) == draw(0)
    assert len({tuple(draw(seed)[0]) for seed in range(8)}) > 4
    several = draw(0, num_return_sequences=5)
    assert len(several) == 5
    assert len({tuple(row) for row in several}) > 2
    greedy = model.generate(PROMPT, max_new_tokens=6).tolist()
    assert draw(0, top_k=1) == greedy
    assert draw(0, top_p=1e-6) == greedy


def test_drawn_frequencies(model: Idefics3ForConditionalGeneration) -> None:
    logits = model(PROMPT).logits[0, -1].double()
    expected = (logits / 1.3).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(
        PROMPT,
        do_sample=True,
        temperature=1.3,
        top_k=0,
        max_new_tokens=1,
        num_return_sequences=20000,
        generator=generator,
        eos_token_id=[],
    )[:, -1]
    found = torch.bincount(drawn, minlength=97) / 20000
    assert (found - expected).abs().max() < 4 * (0.25 / 20000) ** 0.5


def test_beams_are_at_least_as_likely_as_greedy(model: Idefics3ForConditionalGeneration) -> None:
    def likelihood(ids: torch.Tensor) -> float:
        scores = model(ids).logits.log_softmax(-1)[0, 3:-1].detach()
        return float(scores.gather(1, ids[0, 4:, None]).sum())

    greedy = model.generate(PROMPT, max_new_tokens=6, eos_token_id=[])
    beams = model.generate(PROMPT, max_new_tokens=6, eos_token_id=[], num_beams=97)
    assert likelihood(beams) >= likelihood(greedy)


def test_settings_that_do_not_go_together(model: Idefics3ForConditionalGeneration) -> None:
    with pytest.raises(
        ValueError, match="max_length is 3, which leaves no token to a prompt of 4: give more, or set max_new"
    ):
        model.generate(PROMPT, max_length=3)
    with pytest.raises(DataError, match="num_return_sequences=2 is more than num_beams=1"):
        model.generate(PROMPT, num_return_sequences=2)
    with pytest.raises(DataError, match=r"temperature 0.0 is not positive"):
        model.generate(PROMPT, do_sample=True, temperature=0.0)
    with pytest.raises(DataError, match=r"bad_words_ids holds \[97\]"):
        model.generate(PROMPT, bad_words_ids=[[97]])
    with pytest.warns(UserWarning, match="a prompt ends in padding"):
        model.generate(PROMPT, torch.tensor([[1, 1, 1, 0]]))
    with pytest.raises(DataError, match=r"repetition_penalty is 0.0, but must be positive"):
        model.generate(PROMPT, repetition_penalty=0.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pixels", 3, "^generate has no argument pixels: give fields of GenerationSettings, or image_hidden_states, "),
        ("position_ids", PROMPT, "^generate has no argument position_ids"),
        ("typical_p", 0.9, r"^generate does not implement typical_p, which is 0.9: leave it out$"),
        ("penalty_alpha", 0.6, "^generate does not implement penalty_alpha"),
        ("prefix_allowed_tokens_fn", print, "^generate does not implement prefix_allowed_tokens_fn"),
        (
            "generation_config",
            3,
            "^generation_config is a int: give GenerationSettings, a mapping, or a GenerationConfig",
        ),
    ],
)
def test_arguments_that_cannot_be_honoured(
    model: Idefics3ForConditionalGeneration, name: str, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(PROMPT, **{name: value})


def test_values_that_ask_for_nothing(model: Idefics3ForConditionalGeneration) -> None:
    plain = model.generate(PROMPT, max_new_tokens=6).tolist()
    nothing = {"typical_p": 1.0, "num_beam_groups": 1, "stop_strings": None, "renormalize_logits": False, "min_p": None}
    rest = {"pixel_values": None, "labels": PROMPT, "cache_implementation": "static", "early_stopping": None}
    assert model.generate(PROMPT, max_new_tokens=6, **nothing, **rest).tolist() == plain
    draws = {}
    for off in (None, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}):
        off = off or dict.fromkeys(("temperature", "top_k", "top_p"))
        generator = torch.Generator().manual_seed(3)
        drawn = model.generate(PROMPT, do_sample=True, max_new_tokens=30, eos_token_id=[], generator=generator, **off)
        draws[str(off)] = drawn.tolist()
    first, second = draws.values()
    assert first == second


def test_what_a_folder_states_in_vain_is_named(model: Idefics3ForConditionalGeneration) -> None:
    model.generation_config = {"typical_p": 0.5, "top_h": 0.1, "bos_token_id": 1, "transformers_version": "4.46.3"}
    with pytest.warns(UserWarning, match=r"generation_config.json says by typical_p=0.5, top_h=0.1$") as caught:
        model.generate(PROMPT, max_new_tokens=1)
    assert caught[0].filename == __file__
    model.generation_config = {"typical_p": 1.0, "output_attentions": False, "use_cache": False, "num_beam_groups": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(PROMPT, max_new_tokens=1)
    model.generation_config = {"repetition_penalty": 1e6}
    assert not set(model.generate(PROMPT, max_new_tokens=6, eos_token_id=[])[0, 4:].tolist()) & set(PROMPT[0].tolist())


def test_end_ids_of_any_type(model: Idefics3ForConditionalGeneration) -> None:
    stop = model.generate(PROMPT, max_new_tokens=8)[0, 6].item()
    ended = model.generate(PROMPT, max_new_tokens=8, eos_token_id=stop).tolist()
    for ids in (torch.tensor([stop]), torch.tensor(stop), np.int64(stop), (stop,)):
        assert model.generate(PROMPT, max_new_tokens=8, eos_token_id=ids).tolist() == ended


def test_without_a_cache_every_step_takes_all_tokens(model: Idefics3ForConditionalGeneration) -> None:
    sizes: list[int] = []
    model.model.text_model.layers[0].register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[0]))
    model.generate(PROMPT, max_new_tokens=4, use_cache=False, eos_token_id=[])
    assert sizes == [4, 5, 6, 7]
    images = {"image_hidden_states": torch.zeros(1, 4, 32)}
    prompt = torch.tensor([[5, 90, 90, 90, 90, 6]])
    assert model.generate(prompt, max_new_tokens=3, use_cache=False, eos_token_id=[], **images).shape == (1, 9)
    with pytest.raises(
        DataError, match="image_hidden_states are given for several sequences per prompt without a cache"
    ):
        model.generate(prompt, max_new_tokens=3, use_cache=False, num_beams=2, **images)


def test_rows_that_make_no_tensor(model: Idefics3ForConditionalGeneration) -> None:
    with pytest.raises(DataError, match="input_ids is a list that cannot become a tensor: give rows of equal length"):
        model.generate([[5, 6], [7]])
