import pytest
import torch

from m4train.config import AdapterConfig, FreezeConfig, FreezeRule
from m4train.training.adapters import apply_adapters
from m4train.training.freezing import apply_freezing
from m4train.training.throughput import Throughput, pass_factors, peak_flops
from tests.helpers.training import TinyModel, join, make_pack


def _factors(*rules, adapter=None):
    model = TinyModel()
    apply_adapters(model, AdapterConfig(kind="lora", targets=adapter) if adapter else AdapterConfig())
    apply_freezing(model, FreezeConfig(list(rules)))
    return pass_factors(model)


def test_full_training_costs_three_passes():
    assert {k: v for k, v in _factors().items() if k != "embeddings"} == dict.fromkeys(
        ("vision", "text", "connector", "lm_head"), 3.0
    )


def test_a_frozen_tower_costs_one_pass_and_frozen_text_behind_a_connector_two():
    factors = _factors(FreezeRule(names=["*"]), FreezeRule(part="connector", trainable=True))
    assert factors["vision"] == 1.0
    assert factors["connector"] == 3.0
    assert factors["lm_head"] == 2.0


def test_adapters_cost_no_gradients_of_the_weights_under_them():
    factors = _factors(adapter={"text": ["q_proj"]})
    assert factors["vision"] == 1.0
    assert factors["text"] == factors["lm_head"] == 2.0


def test_rates_follow_the_batches():
    model = TinyModel()
    throughput = Throughput(model)
    batch = join([make_pack(n)[0] for n in range(3)])
    throughput.add(batch)
    rates = throughput.rates(2.0, torch.device("cpu"))
    assert rates["tflops/text"] == pytest.approx(3 * 1e3 * batch.tokens / 2.0 / 1e12)
    assert rates["tflops"] == pytest.approx(rates["tflops/text"] + rates["tflops/vision"])
    assert "mfu" not in rates
    assert peak_flops(torch.device("cpu")) is None
    assert throughput.rates(1.0, torch.device("cpu"))["tflops"] == 0.0


def test_shares_of_the_peak_add_up(monkeypatch):
    from m4train.training import throughput

    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e6)
    counter = Throughput(TinyModel())
    counter.add(join([make_pack(n)[0] for n in range(3)]))
    rates = counter.rates(0.5, torch.device("cpu"))
    assert rates["mfu"] == pytest.approx(rates["tflops"] * 1e12 / 1e6)
    assert rates["mfu"] == pytest.approx(rates["mfu/text"] + rates["mfu/vision"])


def test_parts_that_take_turns_and_tables_of_their_own():
    """Gated cross-attention alone trains: gradients pass through all of the decoder, none through the tower."""
    from tests.distributed.cases import Case, build

    _, model, _ = build(Case(model="idefics", rows=True), "unused")
    apply_freezing(model, FreezeConfig([FreezeRule(), FreezeRule(part="cross_attention", trainable=True)]))
    factors = pass_factors(model)
    assert {part: factors[part] for part in ("vision", "connector", "embeddings", "new_tokens")} == {
        "vision": 1.0, "connector": 1.0, "embeddings": 1.0, "new_tokens": 1.0
    }  # fmt: skip
    assert (factors["cross_attention"], factors["text"], factors["lm_head"]) == (3.0, 2.0, 2.0)
    apply_freezing(model, FreezeConfig([FreezeRule(), FreezeRule(part="text", trainable=True)]))
    assert pass_factors(model)["cross_attention"] == 2.0


def test_a_tied_head_costs_the_gradient_of_the_table():
    from tests.distributed.cases import Case, build

    _, model, _ = build(Case(model="idefics3", tied=True), "unused")
    assert pass_factors(model)["lm_head"] == 3.0
    apply_freezing(model, FreezeConfig([FreezeRule(part="embeddings")]))
    assert pass_factors(model)["lm_head"] == 2.0
