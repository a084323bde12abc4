"""A run that needs a package which is not installed is refused in one sentence, before torch is loaded; others do not need it."""

import subprocess
import sys

import pytest

from m4train.cli import main
from m4train.config import packages
from m4train.config.compose import load_config, save_config
from m4train.errors import ConfigError
from m4train.training.callbacks import default_callbacks
from tests.helpers import warm

PACKAGES = ("deepspeed", "bitsandbytes", "wandb", "tensorboard", "peft", "pyarrow")
PARQUET = "data.sources={c: {path: rows.parquet, format: parquet}}"
# What a run asks for, the package that takes, and what the sentence must name.
NEEDS = [
    ("deepspeed", "engine.name=zero1", "engine=fsdp2", ["engine=zero1"]),
    ("deepspeed", "engine.name=zero2", "engine=fsdp2", ["engine=zero2_offload"]),
    ("deepspeed", "engine.name=zero3", "single", ["engine=zero3", "launch.processes=2"]),
    ("bitsandbytes", "optimizer.name=adamw_8bit", "optimizer=adamw", ["optimizer=adamw_8bit"]),
    ("bitsandbytes", "adapter.kind=qlora", "adapter=lora", ["adapter=qlora"]),
    ("wandb", "logging.trackers=wandb", "logging=none", ["logging=offline"]),
    ("wandb", "logging.trackers=wandb", "logging=none", ["logging=online"]),
    ("tensorboard", "logging.trackers=tensorboard", "logging=none", ["logging=tensorboard"]),
    ("peft", "adapter.kind=lora", "adapter=none", ["adapter=lora"]),
    ("peft", "adapter.kind=dora", "adapter=none", ["adapter=dora"]),
    ("pyarrow", "data.sources.c.format=parquet", "m4train data convert", ["data=own", PARQUET, "trainer.eval_every=0"]),
]
PLAIN = ["experiment=digits_pretrain", "logging=none"]


@pytest.fixture(autouse=True)
def _a_key(monkeypatch):
    """What `logging=online` needs besides the package."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


@pytest.fixture
def without(monkeypatch):
    """Hides packages: importing them fails, and nothing of them is found."""

    def hide(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.fixture
def nothing_runs(monkeypatch):
    """Commands end where their function would be loaded, and no processes are started."""
    reached = []
    loaded = lambda *_, **__: reached.append(1) or 0
    monkeypatch.setattr("m4train.commands.arguments.Command.load", lambda self, place=None: loaded)
    monkeypatch.setattr("m4train.launching.launch", lambda *_: reached.append(1))
    return reached


@pytest.mark.parametrize(("package", "key", "way_out", "overrides"), NEEDS)
@pytest.mark.parametrize("command", ["train", "launch check"])
def test_training_says_what_to_install(without, nothing_runs, capsys, command, package, key, way_out, overrides):
    without(package)
    assert main([*command.split(), *PLAIN, *overrides]) == 2
    said = capsys.readouterr().err
    assert f"{package} is not installed, but {key} needs it: pip install {package}" in said
    assert way_out in said
    assert said.count("\n") == 1
    assert not nothing_runs


@pytest.mark.parametrize(("package", "key", "way_out", "overrides"), NEEDS)
def test_with_the_package_it_runs(nothing_runs, package, key, way_out, overrides):
    assert main(["train", *PLAIN, *overrides]) == 0
    assert nothing_runs


@pytest.mark.parametrize(("package", "key", "way_out", "overrides"), NEEDS)
@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_who_does_not_need_it_runs_without(without, nothing_runs, command, package, key, way_out, overrides):
    """Every other package may be missing; and a command that does not train needs none of those that only training needs."""
    keeps = {"peft", "bitsandbytes"} if "qlora" in key else {package}
    without(*set(PACKAGES) - keeps)
    assert main([command, *PLAIN, *overrides]) == 0
    if package == "wandb" if command == "evaluate" else command == "plan" and package != "pyarrow":
        without(*PACKAGES)
        assert main([command, *PLAIN, *overrides]) == 0


@pytest.mark.parametrize("command", ["export", "report", "preview", "validate", "bench"])
def test_other_commands_need_none_of_what_only_training_needs(without, nothing_runs, command):
    without(*PACKAGES)
    online = ["logging=online"] if command == "export" else ["logging=online", "optimizer=adamw_8bit", "adapter=lora"]
    assert main([command, *PLAIN, *online]) == 0


def test_a_run_that_was_trained_elsewhere(without, nothing_runs, capsys, tmp_path):
    config = load_config(["experiment=digits_sft", "adapter=qlora", "engine=zero2", f"run_dir={tmp_path}"])
    save_config(config, tmp_path / "config.yaml")
    without("deepspeed", "wandb")
    assert main(["evaluate", f"run_dir={tmp_path}"]) == 2
    assert "engine=fsdp2, ddp or single" in capsys.readouterr().err
    assert main(["evaluate", f"run_dir={tmp_path}", "engine=single"]) == 0
    assert main(["export", f"run_dir={tmp_path}"]) == 0
    without("bitsandbytes")
    assert main(["export", f"run_dir={tmp_path}"]) == 2


def test_submitting_a_job_checks_it_too(without, capsys):
    without("deepspeed")
    assert main(["launch", "slurm", "nodes=2", "launch.processes=2", "engine=zero1", *PLAIN]) == 2
    assert "pip install deepspeed" in capsys.readouterr().err


def test_the_functions_say_it_too(without):
    """Python users get the same sentence as the command line."""
    from torch import nn

    from m4train.config import AdapterConfig, Config, OptimizerConfig
    from m4train.models import Idefics3ForConditionalGeneration
    from m4train.training.adapters import apply_adapters
    from m4train.training.callbacks.wandb import Wandb
    from m4train.training.engines import deepspeed
    from m4train.training.optim import make_optimizer

    without(*PACKAGES)
    targets = {"text": ["q_proj"]}
    calls = {
        "wandb": lambda: Wandb(Config()),
        "deepspeed": deepspeed._library,
        "bitsandbytes": lambda: make_optimizer([], OptimizerConfig("adamw_8bit")),
        "bitsandbytes ": lambda: Idefics3ForConditionalGeneration.from_pretrained(
            "x", quantization_config={"load_in_4bit": True}
        ),
        "peft": lambda: apply_adapters(nn.Linear(2, 2), AdapterConfig("lora", targets=targets)),
    }
    for package, call in calls.items():
        with pytest.raises(ConfigError, match=f"pip install {package.strip()}"):
            call()


@pytest.mark.slow
def test_a_process_without_them_pretrains_evaluates_and_exports(digits_root, tmp_path):
    """Everything that no key asks for may be missing: nothing imports it on the way."""
    code = (
        "import sys\n"
        f"for name in {(*PACKAGES, 'sklearn')}: sys.modules[name] = None\n"
        "from m4train.cli import main\n"
        "for command in ('train', 'evaluate', 'export', 'report', 'plan'):\n"
        "    code = main([command, *sys.argv[1:]])\n"
        "    assert code == 0, command\n"
    )
    overrides = [
        *PLAIN,
        f"data.root={digits_root}",
        f"run_dir={tmp_path / 'run'}",
        "trainer.max_steps=2",
        "schedule.warmup_steps=1",
        "trainer.eval_every=0",
        "trainer.global_batch_size=1",
        "trainer.micro_batch_size=1",
        "evaluation.max_samples=2",
        "data.num_workers=0",
        "threads=1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides], capture_output=True, text=True, cwd=warm.ROOT, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_DISABLED"])
def test_wandb_that_its_own_variables_disable_is_not_needed(name, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda package: None)
    config = load_config(["experiment=digits_pretrain"])
    monkeypatch.setenv(name, "disabled" if name == "WANDB_MODE" else "true")
    packages.check_packages(config, ["logging"])
    assert not any(type(callback).__name__ == "Wandb" for callback in default_callbacks(config))
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        packages.check_packages(config, ["logging"])


def test_wandb_online_without_a_key_is_refused(monkeypatch, tmp_path):
    config = load_config(["experiment=digits_pretrain", "logging=online"])
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"there is no W&B key: run `wandb login`"):
        packages.check_packages(config, ["logging"])
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    packages.check_packages(config, ["logging"])
