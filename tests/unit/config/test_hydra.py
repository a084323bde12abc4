"""Composing as Hydra documents it: own folders, experiments on experiments, the grammar of overrides, what is shown of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m4train import cli
from m4train.config import Config
from m4train.config.compose import groups, load_config, load_run_config, save_config
from m4train.config.elsewhere import WORDS
from m4train.config.loading import Where
from m4train.config.values import Reader, nested
from m4train.errors import ConfigError

SFT = "experiment=digits_sft"
OWN = {
    "model/mine/small.yaml": "family: idefics3\npretrained: mine/small\n",
    "data/receipts.yaml": "sources:\n  receipts: {path: 2025_01_15, weight: 2}\n",
    "experiment/receipts/base.yaml": """
        defaults:
          - override /data: receipts
          - override /adapter: lora
        name: 007
        trainer: {max_steps: 11, eval_every: 0}
        """,
    "experiment/receipts/lora.yaml": """
        defaults:
          - /experiment/receipts/base
          - override /model: mine/small
          - override /data: receipts
        optimizer: {lr: 1}
        """,
    "mine.yaml": "defaults: [train, _self_]\nseed: 9\n",
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of one's own configurations, in a working folder that is not a checkout."""
    for name, text in OWN.items():
        path = tmp_path / "configurations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path.write_text("\n".join(line[indent:] for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configurations"


def found_by(way: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Where]:
    if way == "option":
        return [], Where((str(own),))
    if way == "searchpath":
        return [f"hydra.searchpath=[file://{own}]"], Where()
    if way == "environment":
        monkeypatch.setenv("M4TRAIN_CONFIG_PATH", str(own))
    else:
        own.rename(own.parent / "conf")
    return [], Where()


# hydra.cc/docs/advanced/search_path: how a folder is named -> what names it
SEARCH_PATHS = {
    "file://": "hydra.searchpath=[file://{own}]",
    "a path": "hydra.searchpath=[{own}]",
    "pkg://": "hydra.searchpath=[pkg://configurations]",
    "several": "hydra.searchpath=[pkg://configurations.more,file://{own}]",
    "in the root": "--config-name",
}


@pytest.mark.parametrize("way", SEARCH_PATHS)
def test_folders_are_named_as_hydra_documents_it(way, own, monkeypatch):
    given, where = [SEARCH_PATHS[way].format(own=own)], Where()
    if way in ("pkg://", "several"):
        (own / "__init__.py").touch()
        (own / "more").mkdir()
        (own / "more" / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(own.parent))
    if way == "in the root":
        root = own.parent / "roots"
        root.mkdir()
        (root / "rooted.yaml").write_text(f"defaults: [train, _self_]\nhydra: {{searchpath: ['file://{own}']}}\n")
        given, where = [], Where((str(root),), "rooted")
    config = load_config([*given, "experiment=receipts/lora"], where)
    assert (config.model.pretrained, config.trainer.max_steps) == ("mine/small", 11)
    for name in ("configurations", "configurations.more"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("way", ["option", "searchpath", "environment", "working folder"])
def test_own_groups_and_nested_experiments_stand_next_to_the_packaged_ones(way, own, monkeypatch):
    given, where = found_by(way, own, monkeypatch)
    config = load_config([*given, "experiment=receipts/lora"], where)
    assert (config.model.pretrained, config.adapter.kind, config.trainer.max_steps) == ("mine/small", "lora", 11)
    assert (config.name, config.data.sources["receipts"].path, config.optimizer.lr) == ("007", "2025_01_15", 1.0)
    assert load_config([*given, SFT, "engine=ddp"], where).engine.name == "ddp"
    if not given:
        assert "receipts/lora" in groups(where)["experiment"]
        assert "digits_sft" in groups(where)["experiment"]


def test_an_experiment_and_data_are_files_anywhere(own):
    file = own / "experiment/receipts/base.yaml"
    (own.parent / "one.yaml").write_text(file.read_text().replace("override /data: receipts", "override /data: own"))
    source = ["data.sources.a.path=a.tar", "model.tokenizer=here"]
    for name in ("one.yaml", str(own.parent / "one.yaml")):
        assert load_config([f"experiment={name}", *source]).trainer.max_steps == 11
    assert list(load_config([SFT, f"data={own}/data/receipts.yaml", "trainer.eval_every=0"]).data.sources) == [
        "receipts"
    ]
    with pytest.raises(ConfigError, match=r"experiment=two\.yaml is not a file"):
        load_config(["experiment=two.yaml"])


def test_another_root_is_named(own):
    assert load_config([SFT], Where((str(own),), "mine")).seed == 9


def test_what_cannot_be_found_or_is_there_twice_is_refused(own, monkeypatch):
    with pytest.raises(ConfigError, match="--config-dir names nowhere"):
        load_config([SFT], Where(("nowhere",)))
    with pytest.raises(ConfigError, match=r"hydra\.searchpath names .*nowhere"):
        load_config([SFT, "hydra.searchpath=[nowhere]"])
    with pytest.raises(ConfigError, match=r"experiment=receipt/lora is not a choice \(did you mean receipts/lora"):
        load_config(["experiment=receipt/lora"], Where((str(own),)))
    (own / "experiment" / "digits_sft.yaml").write_text("seed: 5")
    with pytest.raises(ConfigError, match="experiment/digits_sft is there twice"):
        load_config([SFT], Where((str(own),)))


def test_a_wrong_key_in_a_file_names_the_file(own):
    (own / "experiment" / "wrong.yaml").write_text("trainer: {max_step: 3}")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: trainer\.max_step is not .*did you mean trainer\.max_steps"):
        load_config(["experiment=wrong"], Where((str(own),)))


# The examples of hydra.cc/docs/advanced/override_grammar/basic, with keys that there are here: override -> key, value
GRAMMAR = {
    "trainer.max_steps=7": ("trainer.max_steps", 7),
    "++trainer.max_steps=7": ("trainer.max_steps", 7),
    "+model.processor.more=1": ("model.processor.more", 1),
    "++model.processor.more=1": ("model.processor.more", 1),
    "+data.sources.docs.path=a.tar": ("data.sources.docs.path", "a.tar"),
    "model.tokenizer=": ("model.tokenizer", ""),
    "model.tokenizer=null": ("model.tokenizer", None),
    "model.tokenizer='null'": ("model.tokenizer", "null"),
    "name='hello, world'": ("name", "hello, world"),
    'name="hello, world"': ("name", "hello, world"),
    r"name='a \'quote\''": ("name", "a 'quote'"),
    r"name=a\,b": ("name", "a,b"),
    "name=hello world": ("name", "hello world"),
    "name=${trainer.precision}": ("name", "fp32"),
    "name=run-${seed}": ("name", "run-0"),
    "name=${oc.env:A_NAME}": ("name", "from the shell"),
    "optimizer.betas=[0.5,0.6]": ("optimizer.betas", [0.5, 0.6]),
    "optimizer.betas=[ 0.5 , 0.6 ]": ("optimizer.betas", [0.5, 0.6]),
    "adapter.targets.text=['q_proj',v_proj]": ("adapter.targets.text", ["q_proj", "v_proj"]),
    "model.processor={size:{longest_edge:64}}": ("model.processor.size.longest_edge", 64),
    "model.processor={a: 10, b c: 20}": ("model.processor", {"a": 10, "b c": 20}),
    "data.sources={docs: {path: a.tar}}": ("data.sources.docs.path", "a.tar"),
    "trainer.max_hours=1": ("trainer.max_hours", 1.0),
    "trainer.max_steps=int(7.9)": ("trainer.max_steps", 7),
    "name=str(7)": ("name", "7"),
    "optimizer.lr=1e-3": ("optimizer.lr", 1e-3),
    "trainer.max_grad_norm=inf": ("trainer.max_grad_norm", float("inf")),
    "trainer.compile=TRUE": ("trainer.compile", True),
    "optimizer=muon": ("optimizer.name", "muon"),
    "hydra.job.name=mine": ("name", "digits_sft"),
}


@pytest.mark.parametrize("override", GRAMMAR)
def test_overrides_mean_what_hydra_documents(override, monkeypatch):
    monkeypatch.setenv("A_NAME", "from the shell")
    key, expected = GRAMMAR[override]
    start = ["model.pretrained=start"] if key.startswith("model.") else []  # which brings what the others leave out
    value = load_config([SFT, "schedule.warmup_steps=5", *start, override])
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+trainer.max_steps=7", "An item is already at 'trainer.max_steps'"),
        ("~data.sources.nothing", "does not exist"),
        ("~trainer.max_step", "did you mean trainer.max_steps"),
        ("+trainer.max_step=7", "did you mean trainer.max_steps"),
        ("++trainer.max_step=7", "did you mean trainer.max_steps"),
        ("optimizer={lr: 1}", "optimizer is a group"),
        ("optimizer.lr=1,2", "with -m"),
        ("seed=range(1,3)", "with -m"),
        ("optimizer=glob(*)", "with -m"),
    ],
)
def test_what_hydra_refuses_is_refused_in_one_sentence(override, expected):
    with pytest.raises(ConfigError) as refusal:
        load_config([SFT, override])
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_source_is_taken_out_and_a_group_too():
    assert list(load_config([SFT, "~data.sources.single"]).data.sources) == ["multi"]
    config = load_config([SFT, "~experiment", "data=digits_documents", "model.tokenizer=here"])
    assert (config.name, list(config.data.sources)) == ("run", ["documents"])


def test_what_is_merged_is_said(capsys):
    load_config([SFT, "data.sources={mine: {path: a.tar}}"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "data.sources={mine: ...} is merged with what was there: single, multi (~data.sources.single takes" in said
    load_config([SFT, "~data.sources.single", "~data.sources.multi", "data.sources={mine: {path: a.tar}}"])
    assert capsys.readouterr().err == ""


NAMES = ["2025_01_15", "1e10", "1.10", "007", "true", "0x10", "+5", "1_0.5", "1:30", "off"]


@pytest.mark.parametrize("name", NAMES)
def test_text_is_what_was_written_wherever_it_is(name, tmp_path):
    config = load_config(
        [
            SFT,
            f"name={name}",
            f"data.sources={{a: {{path: {name}, fields: {{image: {name}}}}}}}"
            if ":" not in name
            else f"data.sources.a.path={name}",
            f"adapter.modules_to_save=[{name}]",
            f"++data.sources.b.path={name}",
        ]
    )
    assert (config.name, config.data.sources["a"].path, config.data.sources["b"].path) == (name, name, name)
    assert config.adapter.modules_to_save == [name]
    file = tmp_path / "written.yaml"
    file.write_text(f"name: {name}\nmodel: {{pretrained: {name}}}\nadapter: {{modules_to_save: [{name}]}}\n")
    config = load_config([f"experiment={file}", "adapter=lora", "data=own", "data.sources.a.path=a"])
    assert (config.name, config.model.pretrained, config.adapter.modules_to_save) == (name, name, [name])
    save_config(config, tmp_path / "config.yaml")
    assert load_run_config([f"run_dir={tmp_path}"]).model.pretrained == name


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main(["train", SFT, *arguments]) == 0
    return capsys.readouterr().out


def test_hydras_options_show_the_composition_and_how_it_came_about(capsys, own):
    job = yaml.safe_load(shown(capsys, "--cfg", "job"))
    assert (job["name"], job["run_dir"]) == ("digits_sft", "runs/${name}")
    assert yaml.safe_load(shown(capsys, "--cfg=job", "--resolve"))["run_dir"] == "runs/digits_sft"
    assert yaml.safe_load(shown(capsys, "-c", "job", "--package", "schedule"))["warmup_steps"] == 20
    assert yaml.safe_load(shown(capsys, "--cfg", "all"))["hydra"]["job"]["name"] == "m4train"
    assert "experiment/digits_sft" in shown(capsys, "--info", "defaults")
    searched = shown(capsys, "--info", "searchpath", "--config-dir", str(own))
    assert str(own) in searched
    assert cli.main(["train", SFT, "--cfg", "jobs"]) == cli.main(["train", SFT, "--resolve"]) == 2
    assert cli.main(["train", SFT, "--cfg", "job", "--package", "nothing"]) == 2
    assert "--package nothing" in capsys.readouterr().err


def test_every_word_of_another_tool_is_answered_with_keys_that_there_are():
    for word, answer in WORDS.items():
        for prefix in ("", "trainer.", "training_args."):
            with pytest.raises(ConfigError, match=f"^{prefix}{word} is not a configuration key: here it is") as refusal:
                Reader(Config).read(nested(f"{prefix}{word}".split("."), 1), None, [])
            assert answer in str(refusal.value)
    for key in ("learning_rate", "trainer.learning_rate", "training_args.learning_rate"):
        with pytest.raises(
            ConfigError, match=f"^{key} is not a configuration key: here it is {WORDS['learning_rate']}"
        ):
            load_config([SFT, f"{key}=1"])


def test_the_words_of_the_issue_carry_over():
    for word, ours in {
        "learning_rate": "optimizer.lr",
        "num_train_epochs": "trainer.epochs",
        "per_device_train_batch_size": "trainer.global_batch_size",
        "gradient_accumulation_steps": "trainer.global_batch_size / (ranks x trainer.micro_batch_size)",
        "model_name_or_path": "model.pretrained",
        "image_folder": "data.sources.NAME.image_folder",
        "output_dir": "run_dir",
        "lora_r": "adapter.rank",
        "report_to": "logging.trackers",
        "deepspeed": "engine=zero1",
    }.items():
        assert ours in WORDS[word]


def test_completions_of_a_group_and_startup_read_no_heavy_module():
    code = (
        "import sys; from m4train.config.compose import load_config; load_config(['experiment=digits_sft']);"
        "assert not {'torch', 'deepspeed', 'wandb', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_keys_that_the_answers_name_exist():
    import re

    from m4train.config.describe import find

    top = ("optimizer", "trainer", "data", "adapter", "model", "schedule", "logging", "engine", "launch", "evaluation")
    for answer in WORDS.values():
        for key in re.findall(rf"\b(?:{'|'.join(top)})\.[\w.]+\w", answer):
            assert find(key.removesuffix(".text")), key
        for group, choice in re.findall(r"\b(engine|adapter|freeze|schedule|optimizer|data|model)=(\w+)", answer):
            assert choice in groups()[group], (group, choice)
