"""Outputs behave as the documentation says: as a dictionary, as a tuple, and as an object; each like transformers'."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.models.idefics3.modeling_idefics3 import Idefics3CausalLMOutputWithPast as Theirs

import m4train
from m4train.models.outputs import CausalLMOutput
from tests.helpers.models import perturb, tiny_idefics, tiny_idefics2, tiny_idefics3
from tests.parity.models_inputs import idefics2_inputs, idefics3_inputs, idefics_inputs

GIVEN = {
    "nothing": {},
    "logits": {"logits": torch.ones(2, 3)},
    "all": {
        "loss": torch.tensor(1.0),
        "logits": torch.ones(2, 3),
        "past_key_values": "cache",
        "hidden_states": (torch.ones(1),),
        "attentions": (torch.ones(2),),
        "image_hidden_states": torch.ones(3),
    },
}
DOINGS: dict[str, Any] = {
    "in": lambda out: ["logits" in out, "loss" in out, "nothing" in out],
    "names": list,
    "len": len,
    "keys": lambda out: list(out.keys()),
    "values": lambda out: len(out.values()),
    "items": lambda out: [key for key, _ in out.items()],
    "tuple": lambda out: len(out.to_tuple()),
    "first": lambda out: out[0] is out.to_tuple()[0],
    "slice": lambda out: len(out[:2]),
    "last": lambda out: out[-1] is out.to_tuple()[-1],
    "name": lambda out: out["logits"].shape,
    "missing": lambda out: out["nothing"],
    "none": lambda out: out["loss"],
    "get": lambda out: [out.get("loss") is None, out.get("nothing", 3)],
    "attribute": lambda out: [out.loss is None, out.logits is None],
    "spread": lambda out: sorted(dict(**out)),
    "dict": lambda out: isinstance(out, dict),
    "bool": bool,
    "set": lambda out: [setattr(out, "logits", torch.zeros(1)), [*out], out.logits.shape],
    "set item": lambda out: [out.__setitem__("loss", torch.zeros(1)), sorted(out), out.loss.shape],
    "delete": lambda out: out.__delitem__("logits"),
    "pop": lambda out: out.pop("logits"),
    "default": lambda out: out.setdefault("loss", 3),
    "copy": lambda out: [*copy.copy(out)],
    "pickle": lambda out: [*pickle.loads(pickle.dumps(out))],
    "map": lambda out: [*torch.utils._pytree.tree_map(lambda x: x, dict(out))],
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("doing", DOINGS)
def test_an_output_does_what_theirs_does(doing: str, given: str) -> None:
    results = []
    for kind in (Theirs, CausalLMOutput):
        out = kind(**GIVEN[given])
        try:
            results.append(DOINGS[doing](out))
        except Exception as error:
            results.append("refused" if doing in ("delete", "pop", "default") else type(error))
    assert results[0] == results[1]


MODELS = {
    "Idefics": ("ForVisionText2Text", tiny_idefics, idefics_inputs),
    "Idefics2": ("ForConditionalGeneration", tiny_idefics2, idefics2_inputs),
    "Idefics3": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
    "SmolVLM": ("ForConditionalGeneration", tiny_idefics3, idefics3_inputs),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_that_is_kept_on_a_hidden_state_comes_from_the_logits(name: str, side: str) -> None:
    head, tiny, make = MODELS[name]
    model = getattr(m4train, name + head)(
        getattr(m4train, f"{name}Config").from_dict(tiny() | {"model_type": name.lower()})
    )
    perturb(model)
    for asked in ({}, {"output_attentions": True}, {"every_column": True}):
        out = model(**make(tiny(), side), output_hidden_states=True, use_cache=False, **asked)
        plain = model(**make(tiny(), side), use_cache=False, **asked)
        assert torch.equal(out.logits, plain.logits)
        kept = [*out.hidden_states, *(out.attentions or ())]
        for state in kept:
            state.retain_grad()
        out.logits[0, 3, 0].backward()
        assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in kept)
