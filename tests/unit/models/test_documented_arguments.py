"""Every documented argument of a configuration does something: what it changes, for another value than the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import m4train
from m4train.errors import DataError
from m4train.models import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    IdeficsConfig,
    IdeficsForVisionText2Text,
)
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs

FAMILIES: dict[str, tuple[Any, Any, Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]] = {
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig, tiny_idefics, idefics_inputs),
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config, tiny_idefics2, idefics2_inputs),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config, tiny_idefics3, idefics3_inputs),
}

# family -> argument -> (what it changes, the arguments to set)
ARGUMENTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "idefics": {
        "vocab_size": ("shapes", {"vocab_size": 105}),
        "additional_vocab_size": ("shapes", {"additional_vocab_size": 3}),
        "hidden_size": ("shapes", {"hidden_size": 48}),
        "intermediate_size": ("shapes", {"intermediate_size": 60}),
        "num_hidden_layers": ("shapes", {"num_hidden_layers": 2}),
        "num_attention_heads": ("shapes", {"num_attention_heads": 8}),
        "dropout": ("training", {"dropout": 0.2}),
        "hidden_act": ("output", {"hidden_act": "gelu"}),
        "initializer_range": ("start", {"initializer_range": 0.05}),
        "alpha_initializer": ("start", {"alpha_initializer": "zeros"}),
        "alphas_initializer_range": ("start", {"alpha_initializer": "normal", "alphas_initializer_range": 0.1}),
        "alpha_type": ("shapes", {"alpha_type": "vector"}),
        "rms_norm_eps": ("output", {"rms_norm_eps": 0.1}),
        "use_cache": ("cache", {"use_cache": False}),
        "pad_token_id": ("start", {"pad_token_id": 5}),
        "bos_token_id": ("file", {"bos_token_id": 7}),
        "eos_token_id": ("generation", {"eos_token_id": list(range(99))}),
        "tie_word_embeddings": ("shapes", {"tie_word_embeddings": True}),
        "cross_layer_interval": ("shapes", {"cross_layer_interval": 1}),
        "qk_layer_norms": ("shapes", {"qk_layer_norms": False}),
        "freeze_text_layers": ("trainable", {"freeze_text_layers": True}),
        "freeze_text_module_exceptions": (
            "trainable",
            {"freeze_text_layers": True, "freeze_text_module_exceptions": ["RMSNorm"]},
        ),
        "freeze_lm_head": ("trainable", {"freeze_lm_head": True}),
        "freeze_vision_layers": ("trainable", {"freeze_vision_layers": True}),
        "freeze_vision_module_exceptions": (
            "trainable",
            {"freeze_vision_layers": True, "freeze_vision_module_exceptions": ["LayerNorm"]},
        ),
        "use_resampler": ("shapes", {"use_resampler": False}),
        "vision_config": ("shapes", {"vision_config": {"num_hidden_layers": 3}}),
        "perceiver_config": ("shapes", {"perceiver_config": {"resampler_depth": 1}}),
    },
    "idefics2": {
        "use_cache": ("cache", {"use_cache": False}),
        "image_token_id": ("output", {"image_token_id": 91}),
        "tie_word_embeddings": ("shapes", {"tie_word_embeddings": True}),
        "vision_config": ("output", {"vision_config": {"hidden_act": "quick_gelu"}}),
        "perceiver_config": ("output", {"perceiver_config": {"hidden_act": "gelu"}}),
        "text_config": ("output", {"text_config": {"sliding_window": 2}}),
    },
    "idefics3": {
        "use_cache": ("cache", {"use_cache": False}),
        "image_token_id": ("output", {"image_token_id": 91}),
        "tie_word_embeddings": ("shapes", {"tie_word_embeddings": True}),
        "vision_config": ("output", {"vision_config": {"hidden_act": "quick_gelu"}}),
        "text_config": ("output", {"text_config": {"rope_theta": 10.0}}),
        "scale_factor": ("shapes", {"scale_factor": 4}),
        "pad_token_id": ("padding", {"pad_token_id": 5}),
    },
}


def shapes(model: Any, family: str) -> Any:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def start(model: Any, family: str) -> Any:
    model.init_weights(torch.Generator().manual_seed(0))
    return {name: p.double().norm().item() for name, p in model.named_parameters()}


def output(model: Any, family: str) -> Any:
    perturb(model)
    try:
        return model(**inputs(family)).logits.double().norm().item()
    except DataError as error:
        return str(error)


def training(model: Any, family: str) -> Any:
    torch.manual_seed(0)
    return output(model.train(), family)


def trainable(model: Any, family: str) -> Any:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def cache(model: Any, family: str) -> Any:
    return model.eval()(torch.tensor([[5, 6]])).past_key_values is None


def file(model: Any, family: str) -> Any:
    return model.config.to_dict()


def generation(model: Any, family: str) -> Any:
    perturb(model)
    return model.eval().generate(torch.tensor([[5, 6]]), max_new_tokens=4).tolist()


def padding(model: Any, family: str) -> Any:
    """What follows the first row's end, of two rows of which the other goes on."""
    perturb(model)
    prompts = torch.tensor([[5, 6], [7, 8]])
    first = model.eval().generate(prompts, max_new_tokens=1)[0, 2].item()
    return model.generate(prompts, max_new_tokens=4, eos_token_id=[first])[0].tolist()


EFFECTS = {f.__name__: f for f in (shapes, start, output, training, trainable, cache, file, generation, padding)}


def inputs(family: str) -> dict[str, Any]:
    _, _, tiny, make = FAMILIES[family]
    return make(tiny())


@pytest.mark.parametrize(("family", "argument"), [(f, a) for f, arguments in ARGUMENTS.items() for a in arguments])
def test_an_argument_changes_what_it_says(family: str, argument: str) -> None:
    effect, changes = ARGUMENTS[family][argument]
    assert argument in changes
    kind, config, tiny, _ = FAMILIES[family]
    base = {key: value for key, value in tiny().items() if key != "eos_token_id"}
    if "exceptions" in argument:  # against frozen without exceptions
        base |= {key: value for key, value in changes.items() if key != argument}
    changed = tiny(**base | {key: {**tiny()[key], **v} if isinstance(v, dict) else v for key, v in changes.items()})
    models = [kind(config.from_dict(values)) for values in (base, changed)]
    before, after = (EFFECTS[effect](model, family) for model in models)
    assert before != after
    assert before == EFFECTS[effect](kind(config.from_dict(base)), family)  # and nothing else made the difference
    written = config.from_dict(changed).to_dict()[argument]
    assert written == changes[argument] or changes[argument].items() <= written.items()


# The signatures of the documentation pages; **kwargs aside.
DEFAULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "idefics": (
        IdeficsConfig,
        {
            "vocab_size": 32000,
            "additional_vocab_size": 0,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "alpha_initializer": "zeros",
            "alphas_initializer_range": 0.0,
            "alpha_type": "float",
            "rms_norm_eps": 1e-6,
            "use_cache": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "cross_layer_interval": 1,
            "qk_layer_norms": False,
            "freeze_text_layers": True,
            "freeze_text_module_exceptions": [],
            "freeze_lm_head": False,
            "freeze_vision_layers": True,
            "freeze_vision_module_exceptions": [],
            "use_resampler": False,
            "vision_config": None,
            "perceiver_config": None,
        },
    ),
    "idefics2": (
        Idefics2Config,
        {
            "use_cache": True,
            "image_token_id": 32001,
            "tie_word_embeddings": False,
            "vision_config": None,
            "perceiver_config": None,
            "text_config": None,
        },
    ),
    "idefics3": (
        Idefics3Config,
        {
            "use_cache": True,
            "image_token_id": 128257,
            "tie_word_embeddings": False,
            "vision_config": None,
            "text_config": None,
            "scale_factor": 2,
            "pad_token_id": 128002,
        },
    ),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_signature_is_the_documented_one(family: str) -> None:
    config, defaults = DEFAULTS[family]
    assert set(defaults) == set(ARGUMENTS[family])
    made, given = config(), config(**defaults)
    assert made == given
    for name, value in defaults.items():
        assert value is None or getattr(made, name) == value, name


FORWARD: dict[str, str] = {  # of the model with head; the one without has no labels
    "idefics": "input_ids attention_mask position_ids past_key_values inputs_embeds pixel_values image_encoder_embeddings "
    "perceiver_embeddings image_attention_mask labels use_cache output_attentions output_hidden_states "
    "interpolate_pos_encoding return_dict",
    "idefics2": "input_ids attention_mask position_ids past_key_values inputs_embeds pixel_values pixel_attention_mask "
    "image_hidden_states labels use_cache output_attentions output_hidden_states return_dict cache_position logits_to_keep",
    "idefics3": "input_ids attention_mask position_ids past_key_values inputs_embeds pixel_values pixel_attention_mask "
    "image_hidden_states labels use_cache output_attentions output_hidden_states return_dict",
}


@pytest.mark.parametrize("family", FORWARD)
def test_every_documented_argument_of_forward_may_be_left_at_none(family: str) -> None:
    kind, config, tiny, _ = FAMILIES[family]
    model = kind(config.from_dict(tiny())).eval()
    given = inputs(family)
    nothing = dict.fromkeys(FORWARD[family].split())
    if "logits_to_keep" in nothing:
        nothing["logits_to_keep"] = 0  # its documented default
    assert given.keys() <= nothing.keys()
    assert torch.equal(model(**nothing | given).logits, model(**given).logits)
    for name in ("labels", "logits_to_keep"):
        nothing.pop(name, None)
    assert torch.equal(model.model(**nothing | given)[0], model.model(**given)[0])
    with pytest.warns(
        UserWarning, match="has no argument head_mask, and ignores it"
    ):  # as transformers, but not silent
        assert torch.equal(model(**given, head_mask=None).logits, model(**given).logits)


def classes() -> list[tuple[str, str]]:
    """The eight model classes, with and without head."""
    heads = [(name, "ForVisionText2Text" if name == "Idefics" else "ForConditionalGeneration") for name in NAMES]
    return [(name, end) for name, head in heads for end in ("Model", head)]


NAMES = {"Idefics": "idefics", "Idefics2": "idefics2", "Idefics3": "idefics3", "SmolVLM": "idefics3"}


@pytest.mark.parametrize(("name", "end"), classes())
def test_every_argument_of_forward_by_position(name: str, end: str) -> None:
    family = NAMES[name]
    _, _, tiny, make = FAMILIES[family]
    kind = getattr(m4train, name + end)
    model = kind(getattr(m4train, f"{name}Config").from_dict(tiny() | {"model_type": name.lower()})).eval()
    perturb(model)
    order = FORWARD[family].split()
    if end == "Model":
        order = [one for one in order if one not in ("labels", "logits_to_keep")]
        if family == "idefics2" and name != "SmolVLM":  # its page has them the other way round
            order = [*order[:-2], "cache_position", "return_dict"]
    given = make(tiny())
    values: dict[str, Any] = {"use_cache": False, "output_hidden_states": True, "return_dict": True}
    values |= {"logits_to_keep": 2, "labels": given["input_ids"]} if end != "Model" else {}
    values = {key: value for key, value in values.items() if key in order} | given
    expected = model(**values)
    for count in range(len(order) + 1):  # so many by position, the others by name
        positional = [values.get(one) for one in order[:count]]
        out = model(*positional, **{key: value for key, value in values.items() if key not in order[:count]})
        assert list(out) == list(expected)
        for found, wanted in zip(out.to_tuple(), expected.to_tuple(), strict=True):
            assert isinstance(found, tuple) or torch.equal(found, wanted)
    with pytest.raises(TypeError, match=r"takes \d+ arguments by position, and 30 are given"):
        model(*[None] * 30)
    with pytest.raises(TypeError, match="is given pixel_values by position and by name"):
        model(*[None] * 6, pixel_values=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_arguments_of_forward_by_position(family: str) -> None:
    kind, config, tiny, _ = FAMILIES[family]
    model = kind(config.from_dict(tiny())).eval()
    perturb(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask, positions = torch.ones_like(ids), torch.arange(4)[None] + 3
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(model(ids, mask, positions).logits, expected)
    past = model(ids[:, :2], mask[:, :2], positions[:, :2], use_cache=True).past_key_values
    tail = model(None, mask, positions[:, 2:], past, model.model.embed(ids[:, 2:]), cache_position=torch.arange(2, 4))
    torch.testing.assert_close(tail.logits, expected[:, 2:], rtol=0, atol=1e-5)
    assert len(model.model(ids, mask, positions, None, None, return_dict=False)) > 0
