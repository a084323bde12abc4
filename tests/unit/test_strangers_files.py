"""No file of a stranger runs code: one hostile file, or several, for every door through which files come in.

Shards have a file of their own (data/sources/test_crafted_tars.py), and so have chat templates
(processing/test_hostile_templates.py).
"""

import contextlib
import io
import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from m4train import AutoModelForImageTextToText, AutoProcessor, cli
from m4train.commands.export import export_checkpoint
from m4train.config import Config
from m4train.config.compose import load_config, load_run_config, save_config, stored_config
from m4train.config.trust import code_named
from m4train.data.loading.shard_stream import _opened
from m4train.data.storage.arrays import read_arrays, write_arrays
from m4train.errors import CheckpointError, ConfigError, DataError, M4Error, StaleIndexError
from m4train.inspection import replay
from m4train.restore import merged_model, restore_model
from m4train.run_files import load_yaml, read_run
from m4train.training.checkpoints.files import write_manifest
from m4train.training.checkpoints.state import open_checkpoint
from m4train.training.checkpoints.tensor_files import read_tensors
from m4train.training.checkpoints.tensor_reader import TensorReader
from m4train.training.checkpoints.weights import CheckpointWeights
from tests.helpers.checkpoints import saved_run
from tests.helpers.training import TinyModel, make_config, make_trainer
from tests.unit.data.sources.test_crafted_tars import END, member, sample


class Evil:
    """Unpickled by an unpickler that obeys, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """The file that no code may have made when a test is over."""
    path = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()  # the weapon works
    path.unlink()
    yield path
    assert not path.exists()


# Checkpoints


def _table(folder):
    return TensorReader(folder).table


def _evil_whole(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))


def _evil_inside(folder, mark):
    table = _table(folder)
    table.planner_data = Evil(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _bytes_for_a_tensor(folder, mark):
    """DCP reads entries of bytes by torch.load(weights_only=False), whatever they are called."""
    table = _table(folder)
    name = next(iter(table.state_dict_metadata))
    table.state_dict_metadata[name] = BytesStorageMetadata()
    index, place = next((i, p) for i, p in table.storage_data.items() if i.fqn == name)
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    (folder / place.relative_path).write_bytes(buffer.getvalue())
    table.storage_data = {type(index)(name): type(place)(place.relative_path, 0, len(buffer.getvalue()))}
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _evil_tensors(folder, mark):
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    table = _table(folder)
    for place in table.storage_data.values():
        (folder / place.relative_path).write_bytes(buffer.getvalue() + bytes(10**6))
        place.offset, place.length = 0, len(buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _outside(folder, mark):
    table = _table(folder)
    for place in table.storage_data.values():
        place.relative_path = "../../../other"
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _huge(folder, mark):
    table = _table(folder)
    entry = next(iter(table.state_dict_metadata.values()))
    entry.size = torch.Size([2**50])
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _nothing_of_the_kind(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=None)))


HOSTILE = [_evil_whole, _evil_inside, _bytes_for_a_tensor, _evil_tensors, _outside, _huge, _nothing_of_the_kind]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run with one checkpoint, and the folder it exports."""
    root = tmp_path_factory.mktemp("published")
    config, _ = saved_run(root / "run")
    config.export.folder, config.export.verify = str(root / "model"), False
    export_checkpoint(config)
    return root


def _poisoned(published, tmp_path, hostile, mark):
    """A copy of the run whose checkpoint is hostile, and whole by its manifest."""
    shutil.copytree(published / "run", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    hostile(folder / "tensors", mark)
    (folder / "manifest.json").unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["digest"], state["files"]  # as a stranger writes it
    (folder / "state.json").write_text(json.dumps({**state, "version": 1}))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_checkpoint(hostile, published, tmp_path, mark):
    folder = _poisoned(published, tmp_path, hostile, mark)
    checkpoint = open_checkpoint(folder)
    config = stored_config(checkpoint.state["config"], folder)
    config.run_dir, config.resume = str(tmp_path / "run"), str(folder)
    config.export.folder, config.export.verify = str(tmp_path / "out"), False
    for door in (
        lambda: restore_model(config, folder),  # evaluate
        lambda: merged_model(checkpoint),  # model.pretrained=RUN
        lambda: export_checkpoint(config),
        lambda: _read_whole(folder, config),
    ):
        with pytest.raises(CheckpointError) as refusal:
            door()
        assert str(folder) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def _read_whole(folder, config):
    weights = CheckpointWeights(folder, config.adapter)
    return weights.stored(weights.names)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_checkpoint_to_go_on_from(hostile, tmp_path, mark):
    run_dir = tmp_path / "run"
    make_trainer(make_config(run_dir, stop_after=4), TinyModel()).train()
    (folder,) = (run_dir / "checkpoints").iterdir()
    hostile(folder / "tensors", mark)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps({**{key: value for key, value in state.items() if key not in ("digest", "files")}, "version": 1})
    )
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"tensors|does not fit"):
        make_trainer(make_config(run_dir), TinyModel()).train()


def test_an_honest_table_is_read_as_torch_reads_it(published):
    folder = published / "run" / "checkpoints" / "step-000003" / "tensors"
    with (folder / ".metadata").open("rb") as file:
        trusting = pickle.load(file)
    assert _table(folder).state_dict_metadata == trusting.state_dict_metadata
    assert _table(folder).storage_data == trusting.storage_data
    name, entry = next(iter(trusting.state_dict_metadata.items()))
    tensor = torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
    read_tensors(folder, {name: tensor})
    assert not tensor.isnan().any()


# Models, adapters, tokenizers


def _copy(published, tmp_path):
    return Path(shutil.copytree(published / "model", tmp_path / "model"))


@pytest.mark.parametrize("allowed", [False, True])
def test_weights_that_are_a_pickle(allowed, published, tmp_path, mark):
    folder = _copy(published, tmp_path)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"lm_head.weight": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((M4Error, pickle.UnpicklingError)):
        AutoModelForImageTextToText.from_pretrained(folder, allow_pickle=allowed)


CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_code_next_to_a_model(file, published, tmp_path, mark, monkeypatch):
    """`auto_map`, class names and paths of modules in any JSON of a model are not followed, not even from its own folder."""
    folder = _copy(published, tmp_path)
    (folder / "evil.py").write_text(CODE.format(str(mark)))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    keys = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    values["auto_map"] = dict.fromkeys(keys, "evil.Evil")
    for key in ("tokenizer_class", "image_processor_type", "processor_class", "custom_pipelines", "trust_remote_code"):
        if file != "config.json":
            values[key] = "evil.Evil"
    path.write_text(json.dumps(values))
    for door in (AutoProcessor, AutoModelForImageTextToText):
        with contextlib.suppress(M4Error):  # to refuse such a folder is as good
            door.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"\x80\x04.", b'{"a": ' + b"[" * 100_000, b'{"version": "1.0", "model": {"type": "evil"}}']
)
def test_a_tokenizer(content, published, tmp_path, mark):
    folder = _copy(published, tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(M4Error) as refusal:
        AutoProcessor.from_pretrained(folder)
    assert "tokenizer.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_adapter(published, tmp_path, mark, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save({"base_model.model.lm_head.lora_A.weight": Evil(mark)}, adapter / "adapter_model.bin")
    values = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
    }
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    given = [f"model.pretrained={published / 'model'}", "adapter=lora", f"adapter.start_from={adapter}", "logging=none"]
    assert cli.main(["train", "experiment=digits_pretrain", f"run_dir={tmp_path / 'r'}", *given]) == 2
    assert "must be a folder with adapter_model.safetensors" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.bin").read_bytes())
    assert cli.main(["train", "experiment=digits_pretrain", f"run_dir={tmp_path / 'r'}", *given]) == 1
    said = capsys.readouterr().err
    assert "adapter_model.safetensors" in said
    assert "Traceback" not in said


# Configurations


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(load_config(["experiment=digits_sft", f"run_dir={folder}"]), folder / "config.yaml")
    return folder


def _changed(run_dir, change):
    values = load_yaml(run_dir / "config.yaml")
    change(values)
    (run_dir / "config.yaml").write_text(json.dumps(values))  # JSON is YAML


CODES = {
    "data.prepare": lambda values: values["data"].update(prepare="evil:run"),
    "evaluation.metric": lambda values: values["evaluation"].update(metric="evil:run"),
    "evaluation.metrics.single": lambda values: values["evaluation"].update(metrics={"single": "os:system"}),
    "data.sources.single.path": lambda values: values["data"]["sources"]["single"].update(
        path="pipe:touch x", stream=True
    ),
    "data.validation.single.path": lambda values: values["data"]["validation"]["single"].update(path="x::pipe:y"),
}


@pytest.mark.parametrize("key", CODES)
def test_the_configuration_of_a_run_names_no_code_without_the_users_word(key, run_dir, capsys):
    _changed(run_dir, CODES[key])
    with pytest.raises(ConfigError) as refusal:
        load_run_config([f"run_dir={run_dir}"])
    assert str(run_dir / "config.yaml") in str(refusal.value)
    word = str(refusal.value).split("'")[1]
    assert word.startswith(f"{key}=")
    if ".path" not in key:  # whose samples have to be streamed, all of them
        assert code_named(load_run_config([f"run_dir={run_dir}", word]))[key] == word.partition("=")[2]
    commands = ("plan", "preview", "validate", "evaluate", "train", "export", "replay")
    for command in commands if key == "evaluation.metric" else ("plan", "train"):  # all read it by one function
        options = ["step=1"] if command == "replay" else []
        assert cli.main([command, f"run_dir={run_dir}", *options]) == 2, command
        assert key in capsys.readouterr().err


@pytest.mark.parametrize("key", CODES)
def test_nor_does_that_of_a_checkpoint_alone(key, tmp_path, run_dir):
    values = load_yaml(run_dir / "config.yaml")
    CODES[key](values)
    alone = tmp_path / "alone" / "checkpoints" / "step-000003"
    alone.mkdir(parents=True)
    (alone / "state.json").write_text(json.dumps({"config": values}))
    with pytest.raises(ConfigError, match=r"state\.json names code") as refusal:
        load_run_config([f"resume={alone}"])
    assert key in str(refusal.value)


def test_nor_do_the_starts_of_a_run(run_dir):
    values = load_yaml(run_dir / "config.yaml")
    CODES["data.prepare"](values)
    (run_dir / "starts.jsonl").write_text(json.dumps({"step": 0, "config": values}) + "\n")
    with pytest.raises(DataError, match=r"starts\.jsonl names code"):
        replay.stored_config(run_dir, 1)
    assert replay.stored_config(run_dir, 1, {"data.prepare": "evil:run"}).data.prepare == "evil:run"


def test_what_the_installation_names_itself_needs_no_word(run_dir):
    config = load_run_config([f"run_dir={run_dir}"])
    assert code_named(config) == {"data.prepare": config.data.prepare}  # conf/data/digits_*.yaml


SECRETS = (
    "${oc.env:M4TRAIN_SECRET}",
    "a ${oc.env:M4TRAIN_SECRET} b",
    "${oc.env:NOTHING,${oc.env:M4TRAIN_SECRET}}",
    "\\\\${oc.env:M4TRAIN_SECRET}",
)


@pytest.mark.parametrize("text", SECRETS)
def test_an_interpolation_in_a_stored_configuration_is_text(text, run_dir, monkeypatch):
    monkeypatch.setenv("M4TRAIN_SECRET", "hunter2")
    _changed(run_dir, lambda values: values.update(name=text))
    values = load_yaml(run_dir / "config.yaml")
    (run_dir / "starts.jsonl").write_text(json.dumps({"step": 0, "config": values}) + "\n")
    for config in (
        load_run_config([f"run_dir={run_dir}"]),
        stored_config(values, run_dir),
        replay.stored_config(run_dir, 1),
        read_run(run_dir).config,
    ):
        assert config.name == text
    again = load_run_config([f"run_dir={run_dir}"])
    save_config(again, run_dir / "config.yaml")  # and stays what it is when the run goes on
    assert load_run_config([f"run_dir={run_dir}"]).name == text
    cli.main(["report", f"run_dir={run_dir}"])
    for path in run_dir.iterdir():
        assert "hunter2" not in path.read_text(), path


def test_an_interpolation_in_a_state_does_not_reach_what_is_said(monkeypatch, tmp_path):
    from m4train.training.checkpoints.changes import completed

    monkeypatch.setenv("M4TRAIN_SECRET", "hunter2")
    stored = asdict(make_config(tmp_path))
    stored["name"], stored["optimizer"]["lr"] = SECRETS[0], SECRETS[0]
    with pytest.raises(Exception, match=r"oc\.env") as refusal:
        completed(stored)
    assert "hunter2" not in str(refusal.value)


def test_an_interpolation_of_the_command_is_resolved_when_the_run_is_composed(tmp_path, monkeypatch):
    monkeypatch.setenv("M4TRAIN_NAME", "first")
    config = load_config(["experiment=digits_sft", "name=${oc.env:M4TRAIN_NAME}"])
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setenv("M4TRAIN_NAME", "second")
    assert load_run_config([f"run_dir={tmp_path}"]).name == "first"


ODD = {
    "python/object": "name: !!python/object/apply:os.system ['touch {mark}']\n",
    "python/name": "name: !!python/name:os.system\n",
    "python/object/new": "name: !!python/object/new:subprocess.Popen [[touch, '{mark}']]\n",
    "own tag": "name: !evil x\n",
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    "alias of itself": "name: &a [*a]\n",
    "depth": "name: " + "[" * 20_000 + "\n",
    "NUL": "name: a\0b\n",
    "a list": "- a\n",
    "a repeated key": "name: a\nname: b\n",
}


@pytest.mark.parametrize("how", ODD)
def test_odd_yaml_is_one_sentence(how, run_dir, mark, capsys):
    (run_dir / "config.yaml").write_text(ODD[how].replace("{mark}", str(mark)))
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        load_yaml(run_dir / "config.yaml")
    for command in ("report", "export", "plan", "evaluate"):
        assert cli.main([command, f"run_dir={run_dir}"]) in (1, 2)
        said = capsys.readouterr().err.strip()
        assert "config.yaml" in said
        assert len(said.splitlines()) == 1


def test_what_a_run_writes_is_no_odd_yaml(tmp_path):
    """A saved configuration holds no alias and comes back as it was, whatever its texts are."""
    config = load_config(["experiment=digits_sft"])
    config.adapter.targets = {"text": (same := ["q_proj"]), "vision": same}
    texts = ["1e-3", "2025-01-15", "no", "${a}", "a: b", "!tag", "*x", "&y", "12:30", "a\nb", "'", "\\", "0x1f", "~"]
    config.evaluation.metrics = dict(zip("abcdefghijklmn", texts, strict=True))
    save_config(config, tmp_path / "config.yaml")
    assert stored_config(load_yaml(tmp_path / "config.yaml"), tmp_path) == config
    assert isinstance(config, Config)


# Indexes and shards


HEADERS = {
    "a list": [],
    "no arrays": {"meta": {}, "bytes": 0},
    "objects": {"meta": {}, "bytes": 8, "arrays": {"a": {"dtype": "O", "shape": [1], "offset": 0}}},
    "beyond the end": {"meta": {}, "bytes": 8, "arrays": {"a": {"dtype": "<i8", "shape": [2**40], "offset": 0}}},
    "before the start": {"meta": {}, "bytes": 8, "arrays": {"a": {"dtype": "<i8", "shape": [1], "offset": -64}}},
    "a negative shape": {"meta": {}, "bytes": 8, "arrays": {"a": {"dtype": "<i8", "shape": [-1, -1], "offset": 0}}},
    "no type": {"meta": {}, "bytes": 8, "arrays": {"a": {"dtype": "evil:run", "shape": [1], "offset": 0}}},
    "no numbers": {"meta": {}, "bytes": "many", "arrays": {}},
    "no mapping": {"meta": [], "bytes": 0, "arrays": {}},
}


@pytest.mark.parametrize("how", [*HEADERS, "a size beyond the file", "a pickle", "depth"])
def test_an_index(how, tmp_path, mark):
    path = tmp_path / "index"
    write_arrays(path, {}, {"a": np.arange(3)})
    magic = path.read_bytes()[:8]
    raw = (
        pickle.dumps(Evil(mark))
        if how == "a pickle"
        else b"[" * 100_000
        if how == "depth"
        else json.dumps(HEADERS.get(how)).encode()
    )
    size = 2**62 if how == "a size beyond the file" else len(raw)
    path.write_bytes(
        magic
        + size.to_bytes(8, "little")
        + raw
        + bytes(
            (HEADERS.get(how) or {}).get("bytes", 0)
            if isinstance(HEADERS.get(how), dict) and how != "no numbers"
            else 0
        )
    )
    with pytest.raises(StaleIndexError) as refusal:
        read_arrays(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_pickles_in_a_streamed_shard_stay_bytes(tmp_path, mark):
    """webdataset would decode such members, if it were asked to."""
    evil = pickle.dumps(Evil(mark))
    names = ("a.pyd", "a.pickle", "a.pth", "a.npy", "a.ten")
    (tmp_path / "shard.tar").write_bytes(sample("a") + b"".join(member(name, evil) for name in names) + END)
    (stored,) = _opened(str(tmp_path / "shard.tar"))
    assert stored["pickle"] == evil
