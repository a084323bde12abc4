"""What is Idefics' own: frozen parts, gates, additional ids, old configuration keys, tokens that see images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from m4train.batch import CrossSegments
from m4train.errors import ConfigError, DataError
from m4train.models import IdeficsConfig, IdeficsForVisionText2Text
from m4train.models.token_rows import DecoupledEmbedding
from tests.helpers.models import packed_batch, perturb, tiny_idefics


def make(**changes: Any) -> IdeficsForVisionText2Text:
    return IdeficsForVisionText2Text(IdeficsConfig.from_dict(tiny_idefics(**changes)))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_configuration_freezes() -> None:
    frozen = make(freeze_text_layers=True, freeze_vision_layers=True, freeze_lm_head=True)
    free = trainable(frozen)
    expected = (
        "model.perceiver_resampler.",
        "model.gated_cross_attn_layers.",
        "model.embed_tokens.additional_embedding.",
    )
    assert {name for name in free if not name.startswith(expected)} == {"lm_head.additional_fc.weight"}
    assert all(any(name.startswith(start) for name in free) for start in expected)
    assert trainable(make()) == {name for name, _ in make().named_parameters()}


@pytest.mark.parametrize(
    ("name", "part", "among"),
    [
        ("RMSNorm", "text", "model.norm.weight"),
        ("Linear", "text", "model.layers.0.mlp.up_proj.weight"),
        ("LayerNorm", "vision", "model.vision_model.pre_layrnorm.bias"),
        ("Conv2d", "vision", "model.vision_model.embeddings.patch_embedding.weight"),
        ("Embedding", "vision", "model.vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_exceptions_by_module_type(name: str, part: str, among: str) -> None:
    settings = {"freeze_text_layers": part == "text", "freeze_vision_layers": part == "vision"}
    frozen = make(**settings)
    excepted = make(**settings, **{f"freeze_{part}_module_exceptions": [name]})
    gained = trainable(excepted) - trainable(frozen)
    assert among in gained
    kinds = {n: {k.__name__ for k in type(m).__mro__} for n, m in excepted.named_modules()}
    assert all(name in kinds[key.rpartition(".")[0]] for key in gained)


def test_an_exception_that_names_nothing() -> None:
    with pytest.raises(ConfigError, match=r"freeze_text_module_exceptions names 'Norm'.*there are Linear, RMSNorm"):
        make(freeze_text_layers=True, freeze_text_module_exceptions=["Norm"])


def test_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    for initializer, alpha_type in (("zeros", "float"), ("ones", "vector"), ("normal", "vector")):
        model = make(alpha_initializer=initializer, alpha_type=alpha_type, alphas_initializer_range=0.3)
        model.init_weights(generator)
        alphas = torch.cat([p.flatten() for name, p in model.named_parameters() if "alpha_" in name])
        assert alphas.numel() == 4 * (1 if alpha_type == "float" else 32)
        if initializer == "normal":
            assert 0.2 < alphas.std() < 0.4
        else:
            assert bool((alphas == float(initializer == "ones")).all())


def test_initialisation_follows_the_table() -> None:
    model = make(hidden_size=128, intermediate_size=512, vocab_size=999)
    layer = model.model.gated_cross_attn_layers[0]
    deviations = {
        layer.cross_attn.q_proj.weight: (0.4 / 128) ** 0.5,
        layer.cross_attn.k_proj.weight: (0.4 / 24) ** 0.5,
        layer.mlp.down_proj.weight: (0.4 / (512 * 2 * 4)) ** 0.5,
        model.model.perceiver_resampler.blocks[0][1].c_proj.weight: (0.4 / (24 * 2 * 4)) ** 0.5,
        model.model.perceiver_resampler.blocks[0][0].q_proj.weight: (0.4 / 24) ** 0.5,
        model.model.embed_tokens.weight[1:]: 128**-0.5,
        model.model.layers[0].mlp.up_proj.weight: 0.02,
    }
    for weight, expected in deviations.items():
        assert abs(weight.std().item() / expected - 1) < 0.1
    assert not model.model.embed_tokens.weight[0].any()


def test_additional_rows_train_while_the_others_are_frozen() -> None:
    embedding = DecoupledEmbedding(7, 2, 3)
    embedding.weight.requires_grad_(False)
    ids = torch.tensor([0, 6, 7, 8, 8])
    out = embedding(ids)
    assert torch.equal(out[:2], embedding.weight[[0, 6]])
    assert torch.equal(out[2:], embedding.additional_embedding.weight[[0, 1, 1]])
    out.sum().backward()
    assert embedding.weight.grad is None
    assert embedding.additional_embedding.weight.grad.tolist() == [[1.0] * 3, [2.0] * 3]


def test_old_configuration_keys() -> None:
    old = {
        "vision_embed_dim": 1280,
        "vision_image_size": 448,
        "resampler_depth": 3,
        "qk_layer_norms_perceiver": True,
        "max_sequence_length": 99,
        "vision_model_name": "x",
    }
    config = IdeficsConfig.from_dict({**old, "vision_config": {"patch_size": 28}})
    assert (config.vision_config.embed_dim, config.vision_config.image_size, config.vision_config.grid) == (
        1280,
        448,
        16,
    )
    assert config.perceiver_config.resampler_depth == 3
    assert config.perceiver_config.qk_layer_norms_perceiver
    assert IdeficsConfig.from_dict(config.to_dict()) == config


def test_impossible_configurations() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers 4 is not a multiple of cross_layer_interval 3"):
        make(cross_layer_interval=3)
    with pytest.raises(ConfigError, match=r"IdeficsConfig.alpha_type is 'matrix', but only float or vector"):
        make(alpha_type="matrix")


def test_a_packed_token_sees_just_its_images() -> None:
    model = make()
    perturb(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (12,), generator=generator)
    frames = torch.randn(3, 3, 16, 16, generator=generator)
    batch = replace(packed_batch([ids], frames, 3), cross=CrossSegments.of([2, 3, 3, 4], [[], [0], [1, 2], []]))

    def first_change(image: int) -> int:
        changed = frames.clone()
        changed[image] += 1
        other = replace(batch, images=replace(batch.images, pixels=changed))
        difference = (model(other, return_logits=True).logits != model(batch, return_logits=True).logits).any(1)
        return int(difference.nonzero()[0])

    assert [first_change(image) for image in range(3)] == [2, 5, 5]
    with pytest.raises(DataError, match="has 3 images but does not say which tokens see them"):
        model(replace(batch, cross=None))


def test_a_tower_of_its_own() -> None:
    tower = make(freeze_vision_layers=False).model.vision_model
    weights = [p.detach().clone() for p in tower.parameters()]
    model = IdeficsForVisionText2Text(
        IdeficsConfig.from_dict(tiny_idefics(freeze_vision_layers=True)), vision_model=tower
    )
    assert model.model.vision_model is tower
    assert all(torch.equal(p, weight) for p, weight in zip(tower.parameters(), weights, strict=True))
    assert not any(p.requires_grad for p in tower.parameters())
