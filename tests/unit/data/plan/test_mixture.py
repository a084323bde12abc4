import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m4train.config import MixtureConfig, SourceConfig
from m4train.data.documents.pieces import loss_tokens
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader
from m4train.data.plan.mixture import Shares, source_size, weights_at
from m4train.data.plan.packing import Packer, Unit
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor, data_config, make_sources, write_shards

weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@given(weights, st.integers(1, 1000), st.integers(0, 2**32))
def test_every_prefix_is_within_one_sample_of_the_shares(values: list[float], largest: int, seed: int) -> None:
    shares = {str(number): value for number, value in enumerate(values)}
    total = sum(values)
    dealer, rounds = Shares(shares), 0
    sizes = {name: 1 + (seed * 31 + int(name) * 7) % largest for name in shares}
    for _ in range(300):
        name = dealer.next(sizes)
        dealer.add(name, sizes[name])
        rounds += sizes[name]
        sizes[name] = 1 + (sizes[name] * 7919 + seed) % largest
        for source, share in shares.items():
            assert abs(dealer.amounts[source] - share / total * rounds) <= largest + 1e-6


def entered(plan: Plan, steps: int, amount) -> list[dict[str, int]]:
    """What had entered the packer after each draw, per source."""
    totals, prefixes = dict.fromkeys((source.name for source in plan.sources), 0), []
    seen = set()
    units = [u for s, _ in zip(plan.steps(), range(steps)) for p in s.packs for u in p.units]
    for unit in units:
        totals[plan.sources[unit.source].name] += amount(plan, unit)
        seen.add(unit)
        prefixes.append(dict(totals))
    return prefixes


def images(plan: Plan, unit) -> int:
    shard, number = plan.sources[unit.source].index.locate(unit.sample)
    return shard.image_count(number) if unit.first == 0 else 0


def answers(plan: Plan, unit) -> int:
    source = plan.sources[unit.source]
    return loss_tokens(source.draw(unit.sample, plan.seed, unit.epoch).pieces, source.config.loss)


AMOUNTS = {"samples": lambda p, u: 1, "tokens": lambda p, u: u.tokens, "loss_tokens": answers, "images": images}


@pytest.mark.parametrize("by", list(AMOUNTS))
def test_what_leaves_the_packer_is_within_the_pool_of_the_target(tmp_path: Path, by: str) -> None:
    sources, data = make_sources(tmp_path, mixture=MixtureConfig(by=by), long_documents="drop")
    [*_, last] = entered(Plan(sources, data, 0, 8), 40, AMOUNTS[by])
    total = sum(last.values())
    content = {"samples": 14, "tokens": 14 * 256, "loss_tokens": 14 * 256, "images": 14 * 3}[by]
    assert abs(last["pages"] - 2 / 3 * total) < content


def test_temperature_raises_sizes_to_its_inverse(tmp_path: Path) -> None:
    sources, _ = make_sources(tmp_path)
    for by in ("samples", "tokens", "images"):
        sizes = {source.name: source_size(source, by) for source in sources}
        weighted = weights_at(1, sources, MixtureConfig(by=by, temperature=2.0))
        assert weighted == pytest.approx({"pages": 2 * sizes["pages"] ** 0.5, "digits": sizes["digits"] ** 0.5})
    assert source_size(sources[0], "samples") == 60


def test_a_schedule_changes_the_weights_at_its_step_and_survives_resume_there(tmp_path: Path) -> None:
    mixture = MixtureConfig(schedule={5: {"pages": 0.001}, 9: {"pages": 50.0, "digits": 1.0}})
    sources, data = make_sources(tmp_path, mixture=mixture, packing_pool=1)
    plan = Plan(sources, data, 0, 8)
    steps = [step for step, _ in zip(plan.steps(), range(14))]
    share = [
        sum(u.source == 0 for p in step.packs for u in p.units) / sum(len(p.units) for p in step.packs)
        for step in steps
    ]
    assert all(0.5 < value < 0.8 for value in share[:4])
    assert all(value < 0.1 for value in share[5:8])
    assert all(value > 0.85 for value in share[9:])
    for stop in range(3, 11):
        state = json.loads(json.dumps(steps[stop - 1].state))
        rest = [step for step, _ in zip(plan.steps(state), range(14 - stop))]
        assert rest == steps[stop:]


def test_a_source_that_ends_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, pages=100, chats=10, epochs=1, shuffle=False)
    units = [u for step in Plan(sources, data, 0, 4).steps() for p in step.packs for u in p.units]
    assert {u.sample for u in units if u.source == 1} == set(range(10))
    assert {u.sample for u in units if u.source == 0} == set(range(100))


@pytest.mark.parametrize("mixture", [{3: {"nothing": 1.0}}, {3: {"pages": 0.0}}, {0: {"pages": 1.0}}])
def test_a_schedule_that_cannot_work_is_refused(tmp_path: Path, mixture: dict) -> None:
    sources, data = make_sources(tmp_path, 2, 2)
    with pytest.raises(ConfigError, match=r"data\.mixture\.schedule"):
        Plan(sources, replace(data, mixture=MixtureConfig(schedule=mixture)), 0, 8)


def test_a_source_without_images_has_no_share_of_images(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", {"items": [{"text": "no picture"}]}, {})])
    data = data_config(mixture=MixtureConfig(by="images"))
    sources = build_sources({"text": SourceConfig(path=str(tmp_path / "*.tar"))}, data, FakeProcessor())
    with pytest.raises(ConfigError, match="holds no image"):
        Plan(sources, data, 0, 8)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("mixture"), pages=30, chats=25)


def entering(plan: Plan, steps: int, monkeypatch) -> list[tuple[int, Unit]]:
    """The step and unit of everything that is put into the packer, in order."""
    seen: list[tuple[int, Unit]] = []
    step = 1

    class Recording(Packer):
        def add(self, unit: Unit) -> list[list[Unit]]:
            seen.append((step, unit))
            return super().add(unit)

    with monkeypatch.context() as patch:
        patch.setattr("m4train.data.plan.plan.Packer", Recording)
        for planned, _ in zip(plan.steps(), range(steps)):
            step = planned.step + 1
    return seen


@pytest.mark.parametrize("by", list(AMOUNTS))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(pages=st.floats(0.05, 20), later=st.floats(0.05, 20), seed=st.integers(0, 99))
def test_what_enters_the_packer_is_within_one_document_of_the_target_at_any_prefix(
    two_sources, monkeypatch, by: str, pages: float, later: float, seed: int
) -> None:
    sources, data = two_sources
    mixture = MixtureConfig(by=by, schedule={1: {"pages": pages}, 5: {"pages": later}})
    plan = Plan(sources, replace(data, mixture=mixture, long_documents="drop"), seed, 8)
    units = entering(plan, 9, monkeypatch)
    amounts = [AMOUNTS[by](plan, unit) for _, unit in units]
    phases = [(pages, [n for n, (step, _) in enumerate(units) if step < 5])]
    phases.append((later, [n for n, (step, _) in enumerate(units) if step >= 5]))
    for weight, numbers in phases:
        share, had, total = weight / (weight + 1.0), 0, 0
        for number in numbers:
            total += amounts[number]
            had += amounts[number] if units[number][1].source == 0 else 0
            assert abs(had - share * total) <= max(amounts) + 1e-6
        assert total


def test_a_source_repeats_only_as_often_as_it_may(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, pages=20, chats=6)
    sources[1].config.epochs = 2
    units = [u for s, _ in zip(Plan(sources, data, 0, 4).steps(), range(60)) for p in s.packs for u in p.units]
    chats = Counter((u.epoch, u.sample) for u in units if u.source == 1)
    assert chats == {(epoch, sample): 1 for epoch in range(2) for sample in range(6)}
    pages = [u for u in units if u.source == 0]
    assert max(u.epoch for u in pages) > 3
    once = Counter((u.epoch, u.sample, u.first) for u in pages)
    assert max(once.values()) == 1
    assert {u.sample for u in pages if u.epoch == 1} == set(range(20))


def test_tiny_sources_feed_any_number_of_ranks(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, pages=2, chats=1, epochs=7)
    plan = Plan(sources, data, 0, 5)
    whole = list(Loader(plan, FakeProcessor(), data, seed=0, micro_batch_size=2))
    for world in (3, 8):
        place = {"seed": 0, "micro_batch_size": 2, "world_size": world}
        ranks = [list(Loader(plan, FakeProcessor(), data, rank=rank, **place)) for rank in range(world)]
        assert {len(steps) for steps in ranks} == {len(whole)}
        for steps in zip(whole, *ranks):
            hashes = [sum(batch.data_hash for batch in step.micro_batches) for step in steps]
            assert hashes[0] % 2**64 == sum(hashes[1:]) % 2**64
    assert sum(step.documents for step in whole) == 7 * 3


@pytest.mark.parametrize("loss", ["auto", "all", "last_turn"])
def test_loss_tokens_of_the_index_are_those_that_are_trained(tmp_path: Path, loss: str) -> None:
    sources, data = make_sources(tmp_path, long_documents="drop")
    for source in sources[loss == "last_turn" :]:
        source.config.loss = loss
    plan = Plan(sources[loss == "last_turn" :], data, 0, 4)
    collator = Collator(plan.sources, FakeProcessor(), data, 0)
    compared = 0
    for step, _ in zip(plan.steps(), range(4)):
        batch, _ = collator.batch(list(step.packs), 0)
        units = [unit for pack in step.packs for unit in pack.units]
        for unit, record in zip(units, batch.documents, strict=True):
            assert 0 <= answers(plan, unit) - record.loss_tokens <= 1  # the first token of a document is not predicted
            compared += 1
    assert compared > 20
