"""What is said before a run starts about its length."""

from dataclasses import replace

import pytest

from m4train.data.plan.plan import Plan
from m4train.inspection.outlook import outlook
from tests.helpers.data import make_sources
from tests.helpers.training import make_config

SCHEDULE = {"name": "cosine", "warmup_steps": 10, "final_fraction": 0.0}


@pytest.mark.parametrize(
    ("max_steps", "epochs", "schedule", "expected"),
    [
        (40, None, {}, []),
        (40, 20, {}, []),
        (4000, None, {}, ["passes over source pages about", "passes over source digits about"]),
        (4000, 1, {}, ["steps, before its warm-up of 10 is over"]),
        (4000, 1, {"warmup_steps": 0}, ["schedule=cosine ends at 100.0% of the peak rate: the run has"]),
        (4000, 1, {"warmup_steps": 0, "name": "constant"}, []),
        (12, None, {"warmup_steps": 12}, ["ends after 12 steps, before its warm-up of 12"]),
    ],
)
def test_a_run_of_an_odd_length_says_so(max_steps, epochs, schedule, expected, tmp_path):
    sources, data = make_sources(tmp_path, epochs=epochs)
    config = make_config(tmp_path, max_steps=max_steps)
    config.schedule = replace(config.schedule, **{**SCHEDULE, **schedule})
    batch, *said = outlook(Plan(sources, data, 0, 4), config)
    assert batch.startswith("batch: ")
    assert len(said) == len(expected)
    assert all(part in sentence for part, sentence in zip(expected, said, strict=True))


def test_the_estimate_is_near_what_the_plan_does(tmp_path):
    sources, data = make_sources(tmp_path, epochs=4)
    plan = Plan(sources, data, 0, 2)
    config = make_config(tmp_path, max_steps=4000)
    config.schedule = replace(config.schedule, **{**SCHEDULE, "warmup_steps": 400})
    _, said = outlook(plan, config)
    assert int(said.split("about ")[1].split()[0]) == pytest.approx(len(list(plan.steps())), rel=0.15)
