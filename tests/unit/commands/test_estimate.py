"""`m4train estimate` at the command line, without a network or a file of a model."""

import json

import pytest

from m4train.cli import main
from m4train.estimation.ranks import RankMemory
from m4train.estimation.subject import Subject
from m4train.gpus import GPUS, Gpu
from tests.helpers.processing import tokenizer_folder

OWN = ["data=own", "data.sources={mine: {path: /no/such/shards}}", "model=smolvlm_256m", "trainer.micro_batch_size=1"]


def test_a_published_model_is_estimated_without_a_download(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["estimate", "--gpu", "h100", "--ranks", "2", "engine=fsdp2", *OWN]) == 0
    printed = capsys.readouterr().out
    assert "0.256 B parameters" in printed
    assert "2 x h100: fits" in printed
    assert "h100, by its data sheet: 989 TFLOP/s in half precision, 79.2 GiB" in printed
    assert "trainer.compile: this is of the code as it is written" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_what_does_not_fit_is_an_exit_code_and_a_way_out(capsys, monkeypatch):
    monkeypatch.setitem(GPUS, "t4", Gpu(65e12, 40 * 2**20, 320e9))
    tiny = ["data=own", "data.sources={mine: {path: /no/such/shards}}", "model=tiny_idefics3"]
    tiny += ["optimizer=adamw", f"model.tokenizer={tokenizer_folder()}"]
    assert main(["estimate", "--json", "--gpu", "t4", *tiny]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["memory"]["low"] < found["memory"]["expected"] < found["memory"]["high"]
    assert found["changes"]


def test_two_published_towers_are_estimated_without_a_download_or_a_tokenizer(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(Subject, "memory", lambda self: RankMemory({"parameters": 2.0**30}, 0.0, True))
    towers = ["model.vision_pretrained=google/siglip-base-patch16-512"]
    towers += ["model.text_pretrained=HuggingFaceTB/SmolLM2-135M-Instruct", "model.architecture={scale_factor: 4}"]
    assert main(["estimate", "model=backbones", "data=own", *towers, "--gpu", "h100"]) == 0
    assert "B parameters" in capsys.readouterr().out
    assert main(["train", "model=backbones", "data=own", *towers]) == 2
    assert "set model.tokenizer to a folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["experiment=sft/smolvlm_256m_full", "model=smolvlm_256m data=own"])
def test_data_need_not_be_named_yet(given, capsys, monkeypatch):
    def by_packs(subject):  # the real step has tests of its own, and takes its time
        return RankMemory({"activations": 12e9 * subject.config.trainer.micro_batch_size}, 0.0, True)

    monkeypatch.setattr(Subject, "memory", by_packs)
    assert main(["estimate", *given.split(), "trainer.micro_batch_size=1", "--gpu", "rtx4090"]) == 0
    assert "1 x rtx4090: fits" in capsys.readouterr().out
    assert main(["estimate", *given.split(), "trainer.micro_batch_size=8", "--gpu", "rtx4090"]) == 1
    assert "It would fit with:\n  trainer.micro_batch_size=1: 12.5 GiB expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--gpu=h10", "--gpu h10 is not known: choose a10,"),
        ("--mfu=40", "--mfu 40 is not a share of the peak"),
        ("--mfu=0.4", "--mfu 0.4 is a share of the peak of a GPU, and none is named"),
        ("--ranks=8", "--ranks 8 cannot share the work under engine.name=single"),
    ],
)
def test_a_wrong_argument_is_one_sentence(given, said, capsys):
    assert main(["estimate", given, *OWN]) == 2
    assert said in capsys.readouterr().err
