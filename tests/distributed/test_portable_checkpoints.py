"""A run moves between engines and numbers of processes through its checkpoints, and keeps its curve."""

import pytest
import torch

from m4train.config import AdapterConfig
from m4train.errors import CheckpointError
from m4train.training.checkpoints.weights import CheckpointWeights
from tests.distributed.cases import Case, build, run_case
from tests.helpers.distributed import run_distributed
from tests.helpers.training import full_parameters, make_trainer, read_metrics

# Every engine is left and entered, most of them with another number of processes, and with parts frozen.
ROUTES = [
    [("single", 1), ("zero3", 2), ("ddp", 3), ("fsdp2", 2), ("zero1", 4), ("single", 1)],
    [("fsdp2", 4), ("zero2", 3), ("zero3", 2), ("fsdp2", 2), ("single", 1), ("zero2", 2)],
]


def _segment(case: Case, run_dir: str, steps: int) -> dict[str, torch.Tensor]:
    """Trains `steps` more steps of the run in `run_dir`; returns the full parameters."""
    from m4train.training.engines import make_engine

    config, model, shape = build(case, run_dir)
    config.trainer.stop_after = steps
    engine = make_engine(config)
    make_trainer(config, model, engine, packs=case.packs, shape=shape).train()
    parameters = {name: tensor.clone() for name, tensor in full_parameters(engine).items()}
    engine.shutdown()
    return parameters


def _check(case, route, tmp_path, steps=3):
    case_steps = steps * len(route)
    whole = Case("single", case.model, case.tied, case.packs, case.packs, frozen=case.frozen, adapter=case.adapter)
    whole = Case(**{**whole.__dict__, "steps": case_steps})
    expected = run_case(whole)
    for engine, world in route:
        piece = Case(**{**case.__dict__, "engine": engine, "steps": case_steps})
        final = run_distributed(_segment, world, piece, str(tmp_path), steps, timeout=300)[0]
    got = read_metrics(tmp_path)
    assert [line["step"] for line in got] == list(range(1, case_steps + 1))
    for a, b in zip(expected, got, strict=True):
        assert b["data_hash"] == a["data_hash"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    return final


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES, ids=["-".join(f"{e}x{w}" for e, w in route) for route in ROUTES])
@pytest.mark.parametrize("train", ["frozen", "lora"])
def test_a_run_continues_under_other_engines(route, train, tmp_path):
    case = Case(model="idefics3", tied=True, packs=7, micro=2, frozen=train == "frozen")
    if train == "lora":
        case = Case(model="idefics3", packs=7, micro=2, adapter="lora")
    final = _check(case, route, tmp_path)
    _, model, _ = build(case, str(tmp_path))
    untouched = [name for name, p in model.named_parameters() if not p.requires_grad]
    from m4train.training.naming import canonical_name

    for name in untouched:
        assert torch.equal(final[canonical_name(name)], model.get_parameter(name)), f"frozen {name} moved"


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero3", "zero2-native"))]
)
def test_the_same_layout_continues_to_the_last_bit(engine, tmp_path):
    engine, _, native = engine.partition("-")
    case = Case(engine, "tiny", packs=6, micro=2, steps=6, native=bool(native))
    for name, pieces in (("whole", [6]), ("broken", [2, 4])):
        for steps in pieces:
            final = run_distributed(_segment, 2, case, str(tmp_path / name), steps, timeout=300)[0]
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    assert [line["grad_norm"] for line in whole] == [line["grad_norm"] for line in broken]
    _assert_stored(tmp_path / "broken", final)
    if native:
        _assert_bound_to_its_layout(tmp_path / "broken", case)


def _assert_bound_to_its_layout(run_dir, case):
    """One process cannot take the optimizer, and says what to do; it can go on with a fresh one."""
    config, model, shape = build(Case("single", "tiny", packs=6, steps=6), str(run_dir / "moved"))
    config.resume = str(run_dir / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match=r"as zero2 on 2 ranks keeps it.*resume_optimizer=fresh"):
        make_trainer(config, model, packs=6, shape=shape).train()
    config.resume_optimizer = "fresh"
    assert make_trainer(config, model, packs=6, shape=shape).train().step == 6


def _assert_stored(run_dir, parameters):
    """One process reads whole parameters out of the checkpoint, equal to those that trained."""
    weights = CheckpointWeights(run_dir / "checkpoints" / "step-000006", AdapterConfig())
    stored = weights.stored(weights.names)
    assert stored.keys() == parameters.keys()
    assert all(torch.equal(stored[name], parameters[name]) for name in stored)


def _refused(run_dir: str) -> str:
    from m4train.training.engines import make_engine

    config, model, _ = build(Case("ddp"), run_dir)
    config.seed = 5
    engine = make_engine(config)
    try:
        make_trainer(config, model, engine)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    engine.shutdown()
    return message


def test_a_refusal_reaches_every_rank(tmp_path):
    config, model, shape = build(Case("single", steps=2), str(tmp_path))
    make_trainer(config, model, shape=shape).train()
    for message in run_distributed(_refused, 2, str(tmp_path)):
        assert message.startswith("CheckpointError")
        assert "seed" in message
