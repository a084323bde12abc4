"""Benchmarks give the same answers and scores under every engine, questions shared unevenly, and a killed run goes on."""

import json
from pathlib import Path

import pytest

from m4train.cli import main
from m4train.evaluation.benchmarks.spec import benchmark_names
from tests.helpers.distributed import run_distributed
from tests.unit.evaluation.benchmarks.test_run import save_data, save_model

ENGINES = ["ddp", "fsdp2", "zero3"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model")), save_data(tmp_path_factory.mktemp("data"))


def _evaluated(places, out, engines, names, *more):
    """evaluation.json and all lines, by engine, the engines one after the other in the same processes."""
    import torch.distributed as dist

    if engines != ["single"]:
        dist.init_process_group("gloo")
    asked = [f"benchmarks=[{names}]", f"model={places[0]}", f"data={places[1]}", "batch_size=2", *more]
    for engine in engines:
        assert main(["evaluate", *asked, f"engine={engine}", f"out={out}/{engine}"]) == 0
    if engines != ["single"] and dist.get_rank() != 0:
        return None
    return {engine: _read(Path(f"{out}/{engine}")) for engine in engines}


def _read(folder):
    assert not list(folder.glob("*.rank-*"))
    lines = {path.name: [json.loads(line) for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}
    for each in lines.values():
        for line in each:  # sums of log-probabilities, which are rounded differently in other batches
            line["about"].pop("losses", None)
    return json.loads((folder / "evaluation.json").read_text()), lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    ["mmmu,docvqa", pytest.param(",".join(name for name in benchmark_names()), marks=pytest.mark.full)],
    ids=["two", "all"],
)
@pytest.mark.parametrize("scoring", ["generation", "likelihood"])
def test_every_engine_gives_the_same_scores(places, names, scoring, tmp_path):
    more = (f"scoring={scoring}", "max_samples=3")  # three samples on two ranks
    expected = _evaluated(places, tmp_path, ["single"], names, *more)["single"]
    found = run_distributed(_evaluated, 2, places, str(tmp_path), ENGINES, names, *more, timeout=600)[0]
    for engine in ENGINES:
        assert found[engine] == expected, engine


def _killed(places, out):
    """A run on two ranks of which each is cut after one answer, then the same on one."""
    import torch.distributed as dist

    from m4train.evaluation.benchmarks import asking

    dist.init_process_group("gloo")
    answers = asking._answers

    def cut(*given):
        yield next(answers(*given))
        raise KeyboardInterrupt

    asking._answers = cut
    asked = ["benchmarks=[textvqa]", f"model={places[0]}", f"data={places[1]}", "engine=ddp", f"out={out}"]
    return main(["evaluate", *asked])


@pytest.mark.slow
def test_what_ranks_had_answered_is_kept_on_another_number_of_ranks(places, tmp_path):
    assert run_distributed(_killed, 2, places, str(tmp_path / "single"), timeout=300) == [130, 130]
    held = [path for path in (tmp_path / "single").iterdir() if path.read_text()]
    assert sorted(path.name for path in held) == ["textvqa.jsonl", "textvqa.jsonl.rank-1"]
    resumed = _evaluated(places, tmp_path, ["single"], "textvqa")["single"]
    whole = _evaluated(places, tmp_path / "whole", ["single"], "textvqa")["single"]
    assert resumed == whole
