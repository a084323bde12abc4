"""Every command that is given a missing, empty, truncated or foreign file says so in one sentence, without a traceback."""

import json
import os
import shutil

import pytest

from m4train import cli
from m4train.commands.export import export_checkpoint
from tests.helpers.checkpoints import saved_run
from tests.helpers.data import conversations, write_shards
from tests.helpers.processing import tokenizer_folder

DAMAGE = {"empty": b"", "list": b"[1]", "binary": b"\x00\xff\xfe", "null": b"null", "text": b"hello"}
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
VALUES = {
    "model_type": "llava",
    "text_config": [1],
    "vision_config": "x",
    "scale_factor": "x",
    "image_token_id": {"a": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    config, _ = saved_run(root / "run")
    config.export.folder, config.export.verify = str(root / "good"), False
    export_checkpoint(config)
    (root / "empty").mkdir()
    (root / "text.txt").write_text("hello")
    (root / "picture.png").write_bytes(b"\x89PNG\r\n")
    (root / "no_checkpoint").mkdir()
    shutil.copy(root / "run" / "config.yaml", root / "no_checkpoint")
    (root / "empty.json").write_text("")
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_text(
        '{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}'
    )
    (root / "foreign" / "tokenizer.json").write_text("[1]")
    (root / "list.yaml").write_text("[1, 2]")
    shutil.copytree(root / "no_checkpoint", root / "lines_of_nothing")
    (root / "lines_of_nothing" / "metrics.jsonl").write_text("hello\n[1]\n")
    (root / "no_answers").mkdir()
    (root / "no_answers" / "evaluation.json").write_text('{"textvqa": [1]}')
    (root / "records" / "textvqa").mkdir(parents=True)
    (root / "records" / "textvqa" / "test.json").write_text('[1, "x", {"question": 5}]')
    write_shards(root / "shards", conversations(4))
    whole = next((root / "shards").glob("*.tar")).read_bytes()
    (root / "cut.tar").write_bytes(whole[:700])
    return root


def _with(root, name, content):
    """The good model folder with one other file."""
    folder = root / f"{name}-{abs(hash(content))}"
    folder.mkdir(exist_ok=True)
    for path in (root / "good").iterdir():
        if path.name != name and not (folder / path.name).exists():
            os.symlink(path, folder / path.name)
    (folder / name).write_bytes(content)
    return folder


def _refused(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip()
    assert code in (1, 2)
    assert "Traceback" not in said
    assert "M4TRAIN_DEBUG" not in said, said  # which is said of what nothing here foresaw
    assert len(said.splitlines()) == 1, said
    return said


GIVEN = ("nowhere", "empty", "text.txt", "picture.png", "no_checkpoint")
COMMANDS = ("evaluate", "export", "report", "replay", "generate")
WITHOUT_CHECKPOINT = ("report", "replay")  # which need none


@pytest.mark.parametrize(
    ("command", "given"),
    [(c, g) for c in COMMANDS for g in GIVEN if g != "no_checkpoint" or c not in WITHOUT_CHECKPOINT],
)
def test_what_is_no_run_or_model(command, given, folders, capsys):
    own = {"generate": [folders / given, "What?"], "replay": ["--step", "1", f"run_dir={folders / given}"]}
    assert str(folders / given) in _refused(capsys, command, *own.get(command, [f"run_dir={folders / given}"]))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_model(name, damage, folders, capsys):
    assert name in _refused(capsys, "generate", _with(folders, name, DAMAGE[damage]), "What?")


@pytest.mark.parametrize("key", VALUES)
def test_a_foreign_value_in_config_json(key, folders, capsys):
    values = json.loads((folders / "good" / "config.json").read_text()) | {key: VALUES[key]}
    assert "config.json" in _refused(
        capsys, "generate", _with(folders, "config.json", json.dumps(values).encode()), "What?"
    )


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_truncated_weights(size, folders, capsys):
    whole = (folders / "good" / "model.safetensors").read_bytes()
    folder = _with(folders, "model.safetensors", whole[:size])
    assert "model.safetensors" in _refused(capsys, "generate", folder, "What?")


# What a key that names a file or folder of each kind may be given; `{}` is the place.
PLACES = ("nowhere", "empty", "text.txt", "picture.png", "empty.json", "foreign", "cut.tar", "no_checkpoint")
LOOKING = ("plan", "preview", "validate", "bench", "data stats", "data index", "data convert")
REPORTING = (
    "validate",
    "data stats",
    "data index",
)  # which count a file that cannot be read as a bad sample, and go on
FILES_OF_DATA = ("text.txt", "picture.png", "empty.json", "cut.tar")
MODEL_KEYS = {
    "model.pretrained": ["model.pretrained={}"],
    "model.tokenizer": ["model.tokenizer={}"],
    "resume": ["resume={}"],
    "adapter.start_from": ["adapter=lora", "adapter.start_from={}"],
    "engine.deepspeed": ["engine=zero1", "engine.deepspeed={}"],
    "backbones": ["model=backbones", "model.vision_pretrained={}", "model.text_pretrained={}"],
}


def _run(root):
    """A run of conversations that would begin, but for what a test gives it."""
    return [
        "experiment=digits_pretrain",
        "data.prepare=null",
        f"model.tokenizer={tokenizer_folder()}",
        f"run_dir={root / 'new'}",
        "logging=none",
        "data.num_workers=0",
        "trainer.max_steps=1",
        f"data.sources.documents.path={root}/shards/*.tar",
        f"data.validation.documents.path={root}/shards/*.tar",
        "schedule.warmup_steps=0",
        "trainer.eval_every=0",
        "trainer.hang_timeout=0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "given"),
    [
        pytest.param(command, given, marks=() if quick else pytest.mark.full)
        for command in LOOKING
        for given in PLACES
        for quick in [command in ("plan", "data index") or given in ("nowhere", "cut.tar")]
    ],
)
def test_data_that_are_none(command, given, folders, capsys):
    extra = ["--out", folders / "out"] if command == "data convert" else []
    arguments = [*command.split(), *extra, *_run(folders), f"data.sources.documents.path={folders / given}"]
    if command not in REPORTING or given not in FILES_OF_DATA:
        _refused(capsys, *arguments)
        return
    assert cli.main([str(argument) for argument in arguments]) in (0, 1)
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    # an index that another command built already is not built again
    assert "damaged_shard" in said or "samples cannot be used" in said or command == "data index"


@pytest.mark.slow
@pytest.mark.parametrize("given", PLACES)
@pytest.mark.parametrize("key", MODEL_KEYS)
def test_a_run_that_is_given_something_else(key, given, folders, capsys):
    _refused(capsys, "train", *_run(folders), *(text.format(folders / given) for text in MODEL_KEYS[key]))


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize("given", ["foreign", "empty.json", "cut.tar"])
def test_another_model_or_none(command, given, folders, capsys):
    own = {
        "generate": [folders / given, "What?"],
        "evaluate": [f"run_dir={folders / 'run'}", f"evaluation.model={folders / given}"],
    }
    _refused(capsys, command, *own[command])


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "no.such.key"],
        ["config", "trainer.max_steps=x"],
        ["pipeline", "{}/text.txt"],
        ["pipeline", "{}/picture.png"],
        ["pipeline", "{}/nowhere.yaml"],
        ["generate", "{}/good", "--questions", "{}/text.txt"],
        ["generate", "{}/good", "--questions", "{}/picture.png"],
        ["generate", "{}/good", "--questions", "{}/empty"],
        ["generate", "{}/good", "--questions", "{}/nowhere"],
        ["generate", "{}/good", "What?", "{}/text.txt"],
        ["generate", "{}/good", "What?", "{}/picture.png"],
        ["generate", "{}/good", "What?", "{}/empty"],
        ["generate", "{}/good", "What?", "{}/nowhere.png"],
        ["estimate", "--gpu", "no such", "experiment=digits_pretrain"],
        ["train", "experiment=nowhere"],
        ["train", "{}/text.txt"],
        ["launch", "slurm", "--nodes", "x"],
        ["launch", "nowhere"],
        ["launch", "check", "run_dir={}/text.txt"],
        ["launch", "check", "run_dir={}/new", "no.such.key=1"],
        ["compare", "{}/nowhere"],
        ["compare", "{}/text.txt"],
        ["compare", "{}/picture.png"],
        ["compare", "{}/empty"],
        ["compare", "{}/run", "--mode", "best"],
        ["compare", "{}/run", "--metric", "no such"],
        ["compare", "{}/lines_of_nothing"],
        ["evaluate", "compare", "{}/nowhere", "{}/empty"],
        ["evaluate", "compare", "{}/text.txt", "{}/picture.png"],
        ["evaluate", "compare", "{}/foreign"],
        ["evaluate", "compare", "{}/no_answers", "{}/no_answers"],
        ["evaluate", "benchmarks=[no_such]", "model={}/good", "data={}/empty"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/good", "data={}/nowhere"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/good", "data={}/text.txt"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/foreign", "data={}/records"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/picture.png", "data={}/records"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/good", "data={}/records"],
        ["evaluate", "benchmarks=[{}/text.txt]", "model={}/good", "data={}/empty"],
        ["evaluate", "benchmarks=[{}/picture.png]", "model={}/good", "data={}/empty"],
        ["evaluate", "benchmarks=[textvqa]", "model={}/good", "data={}/records", "batch_size=x"],
        ["init", "{}/text.txt"],
        ["init", "{}/text.txt/inside"],
        ["init", "{}/run"],
        ["init", "{}/new_project", "--model", "no such"],
        ["init", "{}/new_project", "--epochs", "x"],
        ["init"],
        ["estimate", "experiment=digits_pretrain", "model.pretrained={}/nowhere"],
        ["estimate", "experiment=digits_pretrain", "model.pretrained={}/text.txt"],
        ["estimate", "experiment=digits_pretrain", "model.pretrained={}/foreign"],
        ["estimate", "experiment=digits_pretrain", "--ranks", "x"],
        ["estimate", "experiment=digits_pretrain", "--mfu", "x"],
        ["replay", "--step", "x", "run_dir={}/run"],
        ["replay", "run_dir={}/run"],
        ["replay", "--step", "1", "run_dir={}/run/config.yaml"],
        ["pipeline", "{}/empty"],
        ["pipeline", "{}/list.yaml"],
        ["pipeline", "digits", "no.such.key=1"],
        ["completion", "no_shell"],
        ["data", "index", "data.sources={}/text.txt"],
        ["data", "nowhere"],
    ],
    ids=" ".join,
)
def test_other_arguments(arguments, folders, capsys):
    _refused(capsys, *(argument.format(folders) for argument in arguments))


def test_what_nothing_foresaw_is_one_sentence_and_its_traceback_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "command_of", lambda arguments: 1 / 0)
    assert cli.main(["generate"]) == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "Traceback" not in said
    (kept,) = tmp_path.iterdir()
    assert "Traceback" in kept.read_text()
    monkeypatch.setenv("M4TRAIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate"])
