import pytest

from m4train.errors import TrainingError
from m4train.training.naming import canonical_name, canonical_parameters, is_adapter, part_of
from tests.helpers.training import TinyModel


@pytest.mark.parametrize(
    ("wrapped", "canonical"),
    [
        ("model.q_proj.weight", "model.q_proj.weight"),
        ("module.model.q_proj.weight", "model.q_proj.weight"),
        ("a.module.weight", "a.module.weight"),
        ("a._orig_mod.q_proj.base_layer.weight", "a.q_proj.weight"),
        ("a.q_proj.lora_A.default.weight", "a.q_proj.lora_A.weight"),
        ("a.default.weight", "a.default.weight"),
    ],
)
def test_canonical_name(wrapped, canonical):
    assert canonical_name(wrapped) == canonical
    assert is_adapter(wrapped) == ("lora" in wrapped)


def test_tied_parameters_appear_once():
    names = canonical_parameters(TinyModel(tied=True))
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_longest_prefix_decides_the_part():
    parts = {"text": ("model.",), "vision": ("model.vision.",)}
    assert part_of("model.vision.x", parts) == "vision"
    assert part_of("model.x", parts) == "text"
    with pytest.raises(TrainingError, match="other"):
        part_of("other", parts)
