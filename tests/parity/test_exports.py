"""What `m4train export` writes is read by transformers and peft, whoever saved the model a run began with.

Each interpreter with another transformers (PYTHON_TRANSFORMERS_446, and those of `make test-vintages`, separated by colons,
in PYTHON_TRANSFORMERS_VINTAGES) is started twice in all: to save the models to begin with, and to read what was exported.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from m4train import AutoProcessor
from m4train.commands.export import export_checkpoint
from m4train.positions import patch_position_ids
from m4train.restore import restore_model
from m4train.training.checkpoints.find import find_checkpoint
from tests.helpers.checkpoints import saved_run

pytestmark = pytest.mark.slow
FAMILIES = (
    "tiny_idefics3",
    *(pytest.param(name, marks=pytest.mark.full) for name in ("tiny_idefics2", "tiny_idefics")),
)
FULL = bool(os.environ.get("M4TRAIN_FULL_MATRIX"))
HEADS = {"true": "tied", "false": "untied"}
_OTHERS = [
    python
    for python in [
        os.environ.get("PYTHON_TRANSFORMERS_446", ""),
        *os.environ.get("PYTHON_TRANSFORMERS_VINTAGES", "").split(":"),
    ]
    if python
]
INTERPRETERS = [sys.executable, *_OTHERS]
AS_TENSORS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
PICTURE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")

# Reads tasks from standard input: folders to save again with this transformers, and folders to read.
_TASKS = """
import json, sys, numpy as np, torch, transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor
kind = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
tasks = json.load(sys.stdin)
unsaved = {}
for folder, target in tasks["save"]:
    model = kind.from_pretrained(folder)
    try:
        model.save_pretrained(target)
    except RuntimeError as error:
        unsaved[target] = str(error)
        continue
    AutoProcessor.from_pretrained(folder).save_pretrained(target)
image = Image.fromarray(np.load(tasks["image"]))
found = {"version": transformers.__version__}
for folder in tasks["read"]:
    config = None
    if tasks["apart"]:
        from peft import PeftModel
        config = json.load(open(folder + "/adapter_config.json"))
    model, info = kind.from_pretrained(config["base_model_name_or_path"] if config else folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model = PeftModel.from_pretrained(model, folder).eval() if config else model.eval()
    inputs = load_file(folder + "/inputs.safetensors")
    processor = AutoProcessor.from_pretrained(folder)
    prompt, ids = None, None
    if getattr(processor, "chat_template", None) or type(processor).__name__ != "IdeficsProcessor":  # which has none
        prompt = processor.apply_chat_template(tasks["messages"], add_generation_prompt=True)
    if type(processor).__name__ != "IdeficsProcessor":  # whose prompts are lists
        bos = not prompt.startswith(processor.tokenizer.bos_token)
        ids = processor(text=[prompt], images=[[image]], add_special_tokens=bos)["input_ids"]
    with torch.no_grad():
        logits = model(**inputs).logits
    np.save(folder + "/logits.npy", logits.float().numpy())
    found[folder] = {"prompt": prompt, "ids": ids}
print(json.dumps(found | {"unsaved": unsaved}))
"""


def _ask(python: str, **tasks: object) -> dict:
    given = {"save": [], "read": [], "apart": False, "messages": MESSAGES, **tasks}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _TASKS], input=json.dumps(given), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _logits(live: Any, inputs: dict, release: tuple[int, ...]) -> torch.Tensor:
    """The logits of a model that fits grids of patches into its table of positions as that release of transformers does."""
    rounding = "4.46" if release < (4, 50) else "4.57" if release < (5, 0) else "exact"
    model = copy.deepcopy(live)
    if hasattr(model.model, "position_rounding"):
        model.model.position_rounding = rounding
    elif "Idefics3" in type(model).__name__:  # whose grids are as large as the table
        side, table = model.config.vision_config.grid, model.model.vision_model.embeddings.position_embedding
        table.weight.copy_(table.weight[patch_position_ids(side, side, side, rounding)])
    return model(**inputs).logits


def _ids(folder: str, release: tuple[int, ...]) -> torch.Tensor:
    """The ids of the prompt, for Idefics2 with the space after an image that transformers 5 puts there."""
    processor = AutoProcessor.from_pretrained(folder)
    if hasattr(processor, "space_after_image"):
        processor.space_after_image = release >= (5, 0)
    return processor.apply_chat_template(MESSAGES, images=[PICTURE], add_generation_prompt=True, **AS_TENSORS)[
        "input_ids"
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def matrix(request, tmp_path_factory):
    """Runs that began with a model of each origin, tied and untied, exported merged and apart: what they answer."""
    root = tmp_path_factory.mktemp(request.param)
    np.save(root / "image.npy", np.asarray(PICTURE))
    starts: dict[tuple[str, str], Path] = {}
    for tied in HEADS:
        config, _ = saved_run(
            root / f"m4train-{tied}", f"model.architecture.tie_word_embeddings={tied}", model=request.param
        )
        starts["m4train", tied] = export_checkpoint(config).folder
    for number, python in enumerate(INTERPRETERS):
        saved = {tied: root / f"start-{number}-{tied}" for tied in HEADS}
        said = _ask(
            python,
            save=[[str(starts["m4train", tied]), str(saved[tied])] for tied in HEADS],
            image=str(root / "image.npy"),
        )
        for folder, why in said["unsaved"].items():
            # transformers 4 itself cannot save an Idefics whose additional rows are tied: there is nothing to begin with
            assert (request.param, folder) == ("tiny_idefics", str(saved["true"])), why
            assert "shared tensors" in why
            assert said["version"].startswith("4.")
        starts |= {(python, tied): folder for tied, folder in saved.items() if str(folder) not in said["unsaved"]}
    if not FULL:  # each origin once, and both kinds of head
        starts = {key: start for number, (key, start) in enumerate(starts.items()) if number % 4 in (0, 3)}
    exported = {}
    for number, ((origin, tied), start) in enumerate(starts.items()):
        whole = "embeddings" if tied == "true" else "lm_head"
        given = ["adapter=lora", "adapter.rank=4", "adapter.targets={text: [q_proj], vision: [q_proj]}"]
        given += [f"model.pretrained={start}", f"adapter.modules_to_save=[{whole}]"]
        config, live = saved_run(root / f"run-{number}", *given, model=request.param, moved="trained")
        config.export.verify = False  # what is exported is read below, by others
        for adapters in ("merge", "apart"):
            config.export.adapters, config.export.folder = adapters, str(root / f"{adapters}-{number}")
            exported[origin, tied, adapters] = str(export_checkpoint(config).folder), live.eval()
    return root, exported


@pytest.mark.parametrize("adapters", ["merge", "apart"])
@pytest.mark.parametrize("python", INTERPRETERS, ids=lambda path: Path(path).parents[1].name)
def test_exports_answer_everywhere_as_the_run_does(matrix, python, adapters):
    root, exported = matrix
    mine = {key: value for key, value in exported.items() if key[2] == adapters}
    prompts = {}
    for folder, _ in mine.values():
        processor = AutoProcessor.from_pretrained(folder)
        prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        inputs = processor.apply_chat_template(MESSAGES, images=[PICTURE], add_generation_prompt=True, **AS_TENSORS)
        save_file(dict(inputs), Path(folder) / "inputs.safetensors")
        prompts[folder] = prompt, inputs
    image = str(root / "image.npy")
    found = _ask(python, read=list(prompts), apart=adapters == "apart", image=image)
    for key, (folder, live) in mine.items():
        prompt, inputs = prompts[folder]
        release = tuple(int(number) for number in found["version"].split(".")[:2])
        # transformers 4 and 5 give the processor of Idefics no template
        untold = live.config.model_type == "idefics" and found[folder]["prompt"] is None
        assert untold or found[folder]["prompt"] == prompt, key
        assert found[folder]["ids"] in (None, _ids(folder, release).tolist()), key
        ours = _logits(live, inputs, release)
        theirs = torch.from_numpy(np.load(Path(folder) / "logits.npy"))
        assert (theirs - ours).abs().max() < 1e-4, key


def test_a_run_that_began_with_a_checkpoint_names_a_base_that_others_can_load(tmp_path):
    """Another run's checkpoint is not a folder of transformers: the base is exported along, and found by peft."""
    import peft
    import transformers

    saved_run(tmp_path / "first", "adapter=lora", "adapter.rank=2")
    for number, start in enumerate((tmp_path / "first", tmp_path / "first" / "checkpoints" / "step-000003")):
        given = ["adapter=lora", "adapter.rank=4", f"model.pretrained={start}"]
        config, _ = saved_run(tmp_path / f"second-{number}", *given, moved="trained")
        config.export.adapters = "apart"
        done = export_checkpoint(config)
        stated = json.loads((done.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert stated == str(done.folder / "base")
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForImageTextToText.from_pretrained(stated), done.folder
        ).eval()
        processor = AutoProcessor.from_pretrained(done.folder)
        inputs = processor.apply_chat_template(MESSAGES, images=[PICTURE], **AS_TENSORS)
        live = restore_model(config, find_checkpoint(config).folder)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, live(**inputs).logits, rtol=0, atol=1e-4)


def test_files_have_the_modes_the_umask_gives(tmp_path):
    config, _ = saved_run(tmp_path / "run", "adapter=lora", "adapter.rank=4")
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            for adapters in ("merge", "apart"):
                config.export.adapters, config.export.verify = adapters, False
                folder = export_checkpoint(config).folder
                files = [path for path in folder.rglob("*") if path.is_file()]
                assert {path.stat().st_mode & 0o777 for path in files} == {mode}
        finally:
            os.umask(before)
