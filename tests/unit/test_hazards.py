"""Failures reported of other trainers (tests/HAZARDS.md): those with no better place are tested here, and the table is kept true."""

import ast
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m4train import Idefics3Config, Idefics3ForConditionalGeneration
from m4train.config import AdapterConfig
from m4train.data.documents.labels import trained_kinds
from m4train.data.documents.pieces import PIECE_KINDS
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.errors import M4Error
from m4train.training.adapters import apply_adapters
from m4train.training.gradient_checkpointing import checkpoint_blocks
from tests.helpers.data import FakeProcessor, make_sources
from tests.helpers.models import document, packed_batch, perturb, tiny_idefics3
from tests.helpers.processing import picture, tiny_idefics3_processor

TESTS = Path(__file__).parents[1]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 1, 3, 16, 16)


def _model(**changes) -> Idefics3ForConditionalGeneration:
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(tiny_idefics3(**changes)))
    perturb(model)
    return model


def _ids(length: int = 12) -> torch.Tensor:
    return document(torch.Generator().manual_seed(0), length, frames=1)[None]


def test_every_hazard_has_a_test_that_exists():
    rows = re.findall(r"^\| ([A-C]\d+) \|.*$", (TESTS / "HAZARDS.md").read_text(), flags=re.MULTILINE)
    assert rows == [f"A{n}" for n in range(1, 16)] + [f"B{n}" for n in range(1, 25)] + [f"C{n}" for n in range(1, 6)]
    for line in (TESTS / "HAZARDS.md").read_text().splitlines():
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", line)
        assert named or not re.match(rf"\| [{string.ascii_uppercase}]\d", line), line
        for path, name in named:
            functions = [
                node.name for node in ast.parse((TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)
            ]
            assert name in functions, f"{path}::{name} does not exist"


def test_A8_a_head_that_no_file_holds_is_not_left_random(tmp_path):
    """Tied by the text configuration, untied by the outer one: the file holds no head, so loading is refused, not guessed."""
    _model(tie_word_embeddings=True).save_pretrained(tmp_path)
    values = (
        (tmp_path / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    (tmp_path / "config.json").write_text(values)
    with pytest.raises(M4Error, match=r"lm_head\.weight"):
        Idefics3ForConditionalGeneration.from_pretrained(tmp_path)


def test_A8_a_tie_survives_loading_and_saving(tmp_path):
    _model(tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.text_model.embed_tokens.weight
    loaded(packed_batch([_ids()[0]], PIXELS[0], 1)).loss.backward()
    assert loaded.lm_head.weight.grad is loaded.model.text_model.embed_tokens.weight.grad is not None


def test_A11_every_rank_reads_its_own_packs_and_no_others(tmp_path, monkeypatch):
    sources, data = make_sources(tmp_path)
    read = {}
    for rank in range(3):
        keys = read[rank] = []
        for source in sources:
            plain = type(source).read
            monkeypatch.setattr(
                source, "read", lambda i, s=source, p=plain, k=keys: k.append((s.name, i)) or p(s, i), raising=False
            )
        loader = Loader(
            Plan(sources, data, 1, 9),
            FakeProcessor(),
            data,
            seed=1,
            micro_batch_size=1,
            rank=rank,
            world_size=3,
            stop_step=2,
        )
        documents = sum(step.documents for step in loader)
        assert len(keys) == documents > 0
    assert not set(read[0]) & set(read[1]) | set(read[1]) & set(read[2]) | set(read[0]) & set(read[2])


def test_B2_training_keeps_no_cache():
    model = _model().train()
    checkpoint_blocks(model.blocks())
    out = model(input_ids=_ids(), pixel_values=PIXELS, labels=_ids())
    assert out.past_key_values is None
    out.loss.backward()


def test_B4_ignored_labels_are_minus_100_in_every_door():
    """Through the padded door only -100 leaves out positions, as in transformers; packs never have an image token as target."""
    model, ids = _model(), _ids()
    image = ids == model.config.image_token_id
    padded = torch.cat([torch.full((1, 4), model.config.pad_token_id), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(ids)], 1)
    fewer = ids.masked_fill(image, -100)
    fewer[:, -3:] = -100
    front = torch.full((1, 4), -100)
    cases = [(ids, None, ids), (ids, None, ids.masked_fill(image, -100)), (ids, None, fewer)]
    cases += [(padded, mask, torch.cat([front, fewer], 1)), (padded, mask, padded)]
    losses = []
    for given, attended, labels in cases:
        output = model(input_ids=given, attention_mask=attended, pixel_values=PIXELS, labels=labels)
        expected = F.cross_entropy(output.logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
        losses.append(float(output.loss))
    assert len(set(losses[:3])) == 3
    said = np.array([False, True])
    kinds = np.array([PIECE_KINDS.index("image"), PIECE_KINDS.index("document")], np.uint8)
    assert np.array_equal(trained_kinds(kinds.repeat(2), np.zeros(4, int), "all"), said.repeat(2))


@pytest.mark.parametrize(("tiles", "frames"), [(4, 17), (1, 1)])
def test_B11_tokens_of_a_small_image_are_known_before_decoding(tiles, frames):
    """A square image becomes 17 frames where its longest side is brought to four tiles, however small it is."""
    processor = tiny_idefics3_processor(split=True, tiles=tiles)
    assert processor.frames_for(25, 25) == frames
    encoded = processor.encode_image(picture(25, 25))
    assert len(encoded.frames) == frames
    assert processor.tokens_for(25, 25) == len(encoded.ids)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_B16_adapters_learn_under_gradient_checkpointing(part):
    model = _model().train()
    model.requires_grad_(False)
    apply_adapters(model, AdapterConfig(kind="lora", rank=2, targets={part: ["q_proj", "v_proj"]}))
    checkpoint_blocks(model.blocks())
    model(packed_batch([_ids()[0]], PIXELS[0], 1)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_C5_a_grey_image_is_an_image():
    """Pixels that are exactly zero after normalisation are looked at like any others: counts are explicit in the packed form."""
    model, ids = _model(), torch.cat([_ids()[0], _ids()[0]])
    grey = torch.cat([torch.zeros_like(PIXELS[0]), PIXELS[0]])
    seen = model(packed_batch([ids], grey, 2), return_logits=True).logits
    first = int((ids == model.config.image_token_id).nonzero()[0])
    assert not torch.allclose(
        seen[first:], model(packed_batch([ids], PIXELS[0].expand(2, -1, -1, -1), 2), return_logits=True).logits[first:]
    )
    assert torch.isfinite(seen).all()
