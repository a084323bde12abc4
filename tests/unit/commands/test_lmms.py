"""The bridge to lmms-eval: its tasks ask our model, and give the scores that our metrics give the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from m4train.cli import main
from m4train.commands.lmms import M4Train, manifest
from m4train.evaluation.metrics.registry import METRICS
from m4train.evaluation.metrics.said import Said
from tests.unit.evaluation.benchmarks.test_run import rows_of, save_model

TASK = """
task: m4train_docvqa
dataset_path: parquet
dataset_kwargs: {{data_files: {{validation: {file}}}}}
test_split: validation
output_type: generate_until
doc_to_visual: !function own.pictures
doc_to_text: !function own.asked
doc_to_target: answers
process_results: !function own.scored
generation_kwargs: {{max_new_tokens: 5, do_sample: false, until: ["zzz"]}}
metric_list:
  - {{metric: anls, aggregation: mean, higher_is_better: true}}
  - {{metric: exact, aggregation: mean, higher_is_better: true}}
"""
OWN = """
import json
from pathlib import Path


def pictures(doc):
    return [doc["image"]["image"] if isinstance(doc["image"], dict) and "image" in doc["image"] else opened(doc["image"])]


def opened(value):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(value["bytes"])) if isinstance(value, dict) else value


def asked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def scored(doc, results):
    from lmms_eval.api.metrics import anls

    with Path(__file__).with_name("said.jsonl").open("a") as file:
        file.write(json.dumps({"answer": results[0], "references": doc["answers"]}) + "\\n")
    return {"anls": anls(doc["answers"], results)["anls"], "exact": float(results[0] in doc["answers"])}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def requests_of(model: M4Train, count: int, settings: dict[str, Any]) -> list[Any]:
    """As lmms-eval makes them for a simple model."""
    pictures = [Image.new("RGB", (16, 16), (40 * (number // 2), 9, 90)) for number in range(count)]
    model.task_dict = {"t": {"test": pictures}}
    return [
        SimpleNamespace(args=(f"<image>what is {n}?", settings, lambda picture: [picture], n, "t", "test"))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def bridge(model: Path) -> M4Train:
    return M4Train(str(model), batch_size=3, device="cpu")


def test_requests_are_answered_in_their_order_and_cut(bridge: M4Train) -> None:
    together = bridge.generate_until(requests_of(bridge, 5, {"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0}))
    alone = [
        bridge.generate_until([request])[0]
        for request in requests_of(bridge, 5, {"max_new_tokens": 4, "do_sample": False})
    ]
    assert together == alone
    assert len(set(together)) > 1
    first = next(text for text in together if len(text) > 1)
    cut = bridge.generate_until(requests_of(bridge, 5, {"max_new_tokens": 4, "until": first[1]}))
    assert cut[together.index(first)] == first[0].strip()


def test_likelihoods_are_losses_and_the_smallest_is_the_likeliest(bridge: M4Train) -> None:
    said = bridge.generate_until(requests_of(bridge, 1, {"max_new_tokens": 1}))[0]
    request = requests_of(bridge, 1, {})[0]
    losses = {}
    for target in {said, "A", "B"} - {""}:
        request.args = (request.args[0], f" {target}", *request.args[2:])
        losses[target] = bridge.loglikelihood([request])[0][0]
        request.args = (request.args[0], lambda document, target=target: target, *request.args[2:])
        assert bridge.loglikelihood([request])[0][0] == losses[target]  # also as a function of the document
    assert all(loss > 0 for loss in losses.values())


def test_without_lmms_eval_the_command_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m4train.config.packages.find_spec", lambda name: None)
    assert main(["evaluate", "lmms_tasks=[mmstar]", "model=x"]) == 2
    assert "lmms_eval is not installed, but evaluate lmms_tasks=... needs it" in capsys.readouterr().err


def installed() -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: see docs/evaluation.md")


@pytest.mark.slow
def test_a_task_gives_the_score_of_our_metric(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pa.parquet.write_table(pa.Table.from_pylist(rows_of("docvqa")), tmp_path / "rows.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.py").write_text(OWN)
    (tmp_path / "tasks" / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.parquet"))
    place = [f"model={model}", f"include={tmp_path / 'tasks'}", "device=cpu", f"out={tmp_path / 'out.json'}"]
    assert main(["evaluate", "lmms_tasks=[m4train_docvqa]", *place]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["m4train_docvqa"]
    said = [json.loads(line) for line in (tmp_path / "tasks" / "said.jsonl").read_text().splitlines()]
    answers = [Said(each["answer"], tuple(each["references"])) for each in said]
    assert len(answers) == 4
    values = {key.partition(",")[0]: value for key, value in found.items() if isinstance(value, float)}
    assert values["anls"] == pytest.approx(METRICS["anls"](answers).value)
    assert values["exact"] == pytest.approx(METRICS["exact_match"](answers).value)


def test_the_same_strings_score_the_same_in_both() -> None:
    installed()
    from lmms_eval.api.metrics import anls as theirs

    from tests.helpers import answer_pairs

    pairs = answer_pairs.text_pairs()[:500]
    ours = METRICS["anls"](pairs).samples
    differ = [
        (pair, one, other)
        for pair, one in zip(pairs, ours)
        if abs(one - (other := theirs(list(pair.references), [pair.answer])["anls"])) > 1e-9
    ]
    assert not differ, differ[:3]


def test_the_entry_point_names_the_model() -> None:
    installed()
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    resolved = registry.resolve("m4train")
    assert resolved.class_path == f"{M4Train.__module__}.M4Train"
    assert M4Train.is_simple
