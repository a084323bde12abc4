import pytest
import torch

from m4train.errors import ConfigError
from m4train.training.neftune import EmbeddingNoise
from tests.helpers.training import HIDDEN, TinyModel, join, make_config, make_pack, make_trainer, read_metrics

PACKS = [make_pack(n)[0] for n in range(4)]


def _noise(batch, step=1, seed=0, alpha=5.0):
    model = TinyModel()
    noise = EmbeddingNoise(model, alpha, seed)
    plain = model.embed_tokens.weight[batch.input_ids]
    noise.prepare(batch, step)
    return (model.embed_tokens(batch.input_ids) - plain).detach()


def test_the_draw_depends_on_seed_step_and_sample_alone():
    together = _noise(join(PACKS))
    apart = torch.cat([_noise(join([pack])) for pack in PACKS])
    torch.testing.assert_close(together, apart)
    assert not torch.allclose(together, _noise(join(PACKS), step=2))
    assert not torch.allclose(together, _noise(join(PACKS), seed=1))


def test_the_amplitude_follows_the_length_of_the_document():
    lengths = [pack.tokens for pack in PACKS]
    for noise, length in zip(_noise(join(PACKS)).split(lengths), lengths):
        bound = 5.0 / (length * HIDDEN) ** 0.5
        assert noise.abs().max() <= bound
        assert noise.abs().max() > 0.9 * bound
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_no_noise_without_gradients_and_in_empty_batches():
    with torch.no_grad():
        assert not _noise(join(PACKS)).any()
    assert not _noise(join([])).any()


def test_a_model_without_embeddings_is_refused():
    model = TinyModel()
    model.parts = lambda: {"text": ("",)}
    with pytest.raises(ConfigError, match="neftune_alpha"):
        EmbeddingNoise(model, 1.0, 0)


def test_a_run_with_noise_does_not_depend_on_micro_batches(tmp_path):
    losses = []
    for micro in (8, 2):
        config = make_config(
            tmp_path / str(micro), max_steps=4, micro_batch_size=micro, neftune_alpha=5.0, eval_every=2
        )
        make_trainer(config, TinyModel()).train()
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(micro))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    make_trainer(make_config(tmp_path / "plain", max_steps=4), TinyModel()).train()
    assert losses[0] != pytest.approx([line["loss"] for line in read_metrics(tmp_path / "plain")], rel=1e-4)
