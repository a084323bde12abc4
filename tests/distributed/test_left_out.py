"""What a run on several ranks leaves out is counted once, whichever rank met it."""

import contextlib
import io
import json
from collections import Counter

import pytest

from m4train.commands.train import train
from m4train.config.compose import load_config
from tests.helpers.data import conversations, write_shards
from tests.helpers.distributed import run_distributed
from tests.helpers.processing import tokenizer_folder


def _trained(config) -> list[str]:
    """What this rank says at the end of the run."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(config)
    return [line for line in said.getvalue().splitlines() if line.startswith("left out: ")]


def _config(folder, world):
    overrides = [
        "experiment=digits_pretrain", "data=own", f"model.tokenizer={tokenizer_folder()}", "model=tiny_idefics3", "logging=none",
        f"data.sources={{talks: {{path: '{folder}/talks/*.tar'}}, web: {{path: '{folder}/web/*.tar'}}}}",
        f"run_dir={folder}/run-{world}", f"engine={'ddp' if world > 1 else 'single'}", "data.epochs=1", "trainer.max_steps=60",
        "data.sequence_length=512", "data.num_workers=0", "data.prepare=null", "data.max_dropped_fraction=0.9", "data.max_bad_fraction=0.9",
        "trainer.global_batch_size=4", "trainer.micro_batch_size=1", "trainer.log_every=1", "trainer.save_every=1000", "trainer.eval_every=0", "trainer.precision=fp32",
    ]  # fmt: skip
    return load_config(overrides)


@pytest.mark.full
def test_two_ranks_say_together_what_one_says_alone(tmp_path):
    long = {"messages": [{"role": "user", "content": "long " * 3000}, {"role": "assistant", "content": "No."}]}
    blind = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": ""}]}
    talks = [("long" + str(n), long, {}) for n in range(3)] + [("blind" + str(n), blind, {}) for n in range(2)]
    write_shards(tmp_path / "talks", [*conversations(11), *talks])
    write_shards(tmp_path / "web", [("long", long, {}), *(("web" + key, *rest) for key, *rest in conversations(5))])
    alone = _trained(_config(tmp_path, 1))
    together, nothing = run_distributed(_trained, 2, _config(tmp_path, 2), timeout=300)
    assert together[-len(alone) :] == alone
    assert not [line for line in nothing if "documents used" in line]
    at_end = [line for line in alone if "documents used" in line]
    assert at_end[0].startswith("left out: talks: ")
    assert {line.split(" (")[0] for line in at_end} >= {"left out: talks: 3 too_long", "left out: web: 1 too_long"}
    for world in (1, 2):
        last = json.loads((tmp_path / f"run-{world}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["too_long/talks"], last["too_long/web"]) == pytest.approx((3 / 14, 1 / 6))
        entries = [
            json.loads(line) for line in (tmp_path / f"run-{world}" / "quarantine.jsonl").read_text().splitlines()
        ]
        assert Counter(entry["reason"] for entry in entries) == {"too_long": 4, "empty_answer": 2}
