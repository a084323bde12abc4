"""How answers are decoded: greedy whatever the model's folder says, ended as everywhere, and stated with the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from m4train import AutoModelForImageTextToText, Idefics3Config, Idefics3ForConditionalGeneration
from m4train.cli import main
from m4train.config import DecodingConfig
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.evaluation.decoding import Decoding
from m4train.evaluation.generation import Asked, answer_conversations
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.processing import tiny_idefics3_processor

ENDS = ["<|end_of_text|>", "<end_of_utterance>"]
HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 3,
    "top_p": 0.4,
    "num_beams": 4,
    "repetition_penalty": 7.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 7,
    "min_length": 40,
    "max_length": 5,
    "length_penalty": 3.0,
    "early_stopping": True,
    "num_return_sequences": 3,
    "use_cache": False,
    "pad_token_id": 9,
    "typical_p": 0.3,
}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    processor = tiny_idefics3_processor(image_size=16)
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.eos_id}
    config = tiny_idefics3(text_config=text, image_token_id=processor.image_token_id)
    model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(config))
    perturb(model)
    return model.eval(), processor


def answers(pair: tuple[Any, Any], stated: dict[str, Any], config: DecodingConfig | None = None, seed: int = 0):
    """What is said, with decoding stated, by a model whose folder states these settings."""
    model, processor = pair
    model.generation_config = stated
    asked = [
        Asked(n, str(n), [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}], [])
        for n in range(1, 4)
    ]
    decoding = Decoding.of(model, processor, config or DecodingConfig(), 6)
    said = answer_conversations(model, processor, asked, decoding, torch.device("cpu"), batch_size=2, seed=seed)
    return [answer.answer for answer in said], decoding


@pytest.mark.parametrize("name", HOSTILE)
def test_no_setting_of_a_folder_counts(pair: tuple[Any, Any], name: str, recwarn: pytest.WarningsRecorder) -> None:
    plain, decoding = answers(pair, {})
    assert answers(pair, {name: HOSTILE[name]})[0] == plain
    assert answers(pair, HOSTILE)[0] == plain
    assert not recwarn.list  # nothing of the folder was asked for, so nothing is in vain
    assert decoding.stated() == {"kind": "greedy", "max_new_tokens": 6, "ends": ENDS}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "do_sample": ({"do_sample": True}, "sampling"),
    "temperature": ({"do_sample": True, "temperature": 9.0}, "sampling"),
    "top_k": ({"do_sample": True, "temperature": 9.0, "top_k": 2}, "sampling"),
    "top_p": ({"do_sample": True, "temperature": 9.0, "top_p": 0.1}, "sampling"),
    "num_beams": ({"num_beams": 4}, "beam search"),
    "length_penalty": ({"num_beams": 4, "length_penalty": -9.0}, "beam search"),
    "repetition_penalty": ({"repetition_penalty": 50.0}, "greedy"),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, "greedy"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_asked_for_is_done_and_stated(pair: tuple[Any, Any], name: str) -> None:
    changes, kind = CHANGES[name]
    said, decoding = answers(pair, {}, DecodingConfig(**changes))
    without = {key: value for key, value in changes.items() if key != name}
    if name == "length_penalty":  # acts on sequences of different length: those that end
        ends = pair[1].tokenizer.convert_tokens_to_ids(["<end_of_utterance>"])
        assert decoding.settings().length_penalty == -9.0
        assert decoding.ends[-1:] == tuple(ends)
    else:
        assert said != answers(pair, {}, DecodingConfig(**without))[0]
    assert decoding.stated().items() >= {"kind": kind, **changes}.items()
    assert kind in decoding.line()
    assert answers(pair, {}, DecodingConfig(**changes))[0] == said  # the same seed draws the same


def test_another_seed_draws_others(pair: tuple[Any, Any]) -> None:
    drawn = DecodingConfig(do_sample=True, temperature=9.0)
    assert answers(pair, {}, drawn, 1)[0] != answers(pair, {}, drawn, 2)[0]


def test_the_ids_of_the_folder_end_answers_and_its_bad_words_stay_forbidden(pair: tuple[Any, Any]) -> None:
    model, processor = pair
    plain = answers(pair, {})[0]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "x"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.generation_config = {}
    new = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = new[2]
    stopped, decoding = answers(pair, {"eos_token_id": stop})
    assert decoding.ends[0] == stop
    assert stopped[0] == processor.decode(new[: new.index(stop) + 1], skip_special_tokens=True).strip()
    assert stopped[0] != plain[0]
    assert answers(pair, {"bad_words_ids": [[new[0]]]})[0][0] != plain[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["temperature=0.5"],
            "evaluation.decoding.temperature is 0.5, which acts with evaluation.decoding.do_sample=true",
        ),
        (["top_k=5"], "top_k is 5, which acts with evaluation.decoding.do_sample=true"),
        (["top_p=0.5"], "top_p is 0.5, which acts with"),
        (["length_penalty=2"], "length_penalty is 2.0, which acts with evaluation.decoding.num_beams above 1"),
        (["do_sample=true", "temperature=0"], "temperature is 0.0, but must be above 0"),
        (["do_sample=true", "top_p=1.5"], "top_p is 1.5, but must be above 0 and at most 1"),
        (["num_beams=0"], "num_beams is 0"),
        (["top_n=3"], "evaluation.decoding"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["experiment=digits_sft", *(f"evaluation.decoding.{one}" for one in overrides)])


def test_beams_do_not_end_together() -> None:
    beams = "evaluation.decoding.num_beams=2"
    load_config(["experiment=digits_sft", "engine=ddp", beams])
    for engine in ("fsdp2", "zero3"):
        with pytest.raises(ConfigError, match=f"num_beams is 2, but under engine.name={engine} the ranks share"):
            load_config(["experiment=digits_sft", f"engine={engine}", beams])


@pytest.mark.slow
def test_a_run_with_a_chat_template_of_its_own_stops_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The checkpoint, its evaluation, the export and `m4train generate` end answers with the same ids."""
    from m4train import build
    from m4train.commands.evaluate import evaluate
    from m4train.commands.export import export_checkpoint
    from m4train.config import SourceConfig
    from tests.helpers.checkpoints import saved_run
    from tests.helpers.data import conversations, write_shards
    from tests.unit.test_stops import CHATML, turn_end

    config, _ = saved_run(tmp_path / "first")
    processor = build.build_processor(config)
    processor.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    processor.chat_template = CHATML
    processor.save_pretrained(tmp_path / "tokenizer")
    config, _ = saved_run(tmp_path / "run", f"model.tokenizer={tmp_path / 'tokenizer'}")
    processor = build.build_processor(config)
    end = turn_end(processor)
    assert processor.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    write_shards(tmp_path / "talks", conversations(2))
    data = replace(
        config.data, validation={"talks": SourceConfig(path=str(tmp_path / "talks" / "*.tar"))}, prepare=None
    )
    config = replace(config, data=data)
    config.data.num_workers = 0
    capsys.readouterr()
    evaluate(config)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "answers: greedy, max_new_tokens 32, ended by <|end_of_text|> <|im_end|>"
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())["talks"]["decoding"]
    assert stored == {"kind": "greedy", "max_new_tokens": 32, "ends": ["<|end_of_text|>", "<|im_end|>"]}
    done = export_checkpoint(config)
    stated = json.loads((done.folder / "generation_config.json").read_text())["eos_token_id"]
    assert stated == [processor.eos_id, end]
    assert AutoModelForImageTextToText.from_pretrained(done.folder).stated_ends == stated
    Image.new("RGB", (20, 20)).save(tmp_path / "picture.png")
    assert main(["generate", str(done.folder), "What?", str(tmp_path / "picture.png")]) == 0
