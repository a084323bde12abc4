import pytest

from m4train.config import AdapterConfig, FreezeConfig, FreezeRule
from m4train.errors import ConfigError
from m4train.training.adapters import apply_adapters
from m4train.training.freezing import apply_freezing
from m4train.training.naming import canonical_name
from tests.helpers.training import TinyModel


def _trainable(model):
    return {canonical_name(name) for name, p in model.named_parameters() if p.requires_grad}


def _freeze(*rules, model=None):
    model = model or TinyModel()
    apply_freezing(model, FreezeConfig(list(rules)))
    return model


def test_without_rules_everything_trains():
    model = _freeze()
    assert len(_trainable(model)) == len(list(model.parameters()))


def test_later_rules_are_exceptions():
    model = _freeze(
        FreezeRule(part="text"),
        FreezeRule(part="text", module_types=["RMSNorm"], trainable=True),
        FreezeRule(names=["layers.1.norm.*"]),
    )
    text = {name for name in _trainable(model) if name.startswith(("layers.", "norm."))}
    assert text == {"layers.0.norm.weight", "norm.weight"}
    assert "lm_head.weight" in _trainable(model)


def test_names_are_globs_over_the_whole_name():
    model = _freeze(FreezeRule(names=["*"]), FreezeRule(names=["*.q_proj.weight"], part="vision", trainable=True))
    assert _trainable(model) == {"vision.layers.0.q_proj.weight", "vision.layers.1.q_proj.weight"}


@pytest.mark.parametrize(
    "rule",
    [
        FreezeRule(names=["*.nothing"]),
        FreezeRule(part="vision", module_types=["Embedding"]),
        FreezeRule(part="nowhere"),
        FreezeRule(names=["*"]),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rule):
    with pytest.raises(ConfigError, match=r"freeze\.rules"):
        _freeze(rule)


@pytest.mark.parametrize(
    ("part", "word"), [("norms", "[*]Norm"), ("new_tokens", "new_rows_from"), ("resampler", "connector")]
)
def test_a_part_by_another_name_is_explained(part, word):
    with pytest.raises(ConfigError, match=word):
        _freeze(FreezeRule(part=part))


def test_module_types_are_patterns():
    model = _freeze(FreezeRule(), FreezeRule(module_types=["*Norm"], trainable=True))
    assert _trainable(model) == {name for name, _ in model.named_parameters() if "norm" in name}


def test_adapters_leave_only_what_rules_ask_for():
    model = TinyModel()
    apply_adapters(model, AdapterConfig(kind="lora", rank=2, targets={"text": ["q_proj"]}))
    _freeze(FreezeRule(part="connector", trainable=True), model=model)
    assert {name for name in _trainable(model) if "lora" not in name} == {"connector.weight", "connector.bias"}
    assert "layers.0.q_proj.lora_A.weight" in _trainable(model)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (["connector", "norm"], None),
        (["layers.1.up_proj"], None),
        (["layers.*.down_proj"], None),
    ],
)
def test_modules_to_save_train_in_full_beside_an_adapter_after_all_rules(names, expected):
    model = TinyModel()
    apply_adapters(model, AdapterConfig(kind="lora", rank=2, targets={"text": ["q_proj"]}))
    apply_freezing(model, FreezeConfig([FreezeRule(part="lm_head")]), names)
    trained = {name for name in _trainable(model) if "lora" not in name}
    wanted = {
        ("connector", "norm"): {"connector.weight", "connector.bias"}
        | {name for name, _ in model.named_parameters() if "norm." in name},
        ("layers.1.up_proj",): {
            f"{tower}layers.1.up_proj.{leaf}" for tower in ("", "vision.") for leaf in ("weight", "bias")
        },
        ("layers.*.down_proj",): {name for name, _ in model.named_parameters() if ".down_proj." in name},
    }
    assert trained == (expected or wanted[tuple(names)])


def test_modules_to_save_that_match_nothing_are_refused():
    model = TinyModel()
    apply_adapters(model, AdapterConfig(kind="lora", rank=2, targets={"text": ["q_proj"]}))
    with pytest.raises(ConfigError, match=r"adapter\.modules_to_save\[1\].*lm_heads.*parts vision, connector"):
        apply_freezing(model, FreezeConfig(), ["lm_head", "lm_heads"])
    tied = TinyModel(tied=True)
    parts = {name: prefixes for name, prefixes in tied.parts().items() if name != "lm_head"}
    tied.parts = lambda: parts
    with pytest.raises(ConfigError, match=r"modules_to_save\[0\] is 'lm_head'.*tied to the embeddings"):
        apply_freezing(tied, FreezeConfig(), ["lm_head"])
