"""What a command imports, and an optimizer: not what only a run that compiles, shards or reads a checkpoint needs."""

import subprocess
import sys

MODULES = (
    "m4train.build",
    "m4train.commands.estimate",
    "m4train.commands.evaluate",
    "m4train.commands.generate",
    "m4train.commands.inspect",
    "m4train.commands.train",
    "m4train.training.engines.single",
)
LATER = ("sympy", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")


def test_commands_and_optimizers_import_neither_the_compiler_nor_the_format_of_checkpoints():
    code = (
        "import sys, importlib, torch\n"
        "before = set(sys.modules)\n"
        f"for name in {MODULES}: importlib.import_module(name)\n"
        "from m4train.config import OptimizerConfig\n"
        "from m4train.training.optim import build_optimizer\n"
        "group = {'params': [torch.nn.Parameter(torch.ones(2))], 'names': ['w'], 'part': 'text', 'base_lr': 0.1}\n"
        "optimizer = build_optimizer([group], OptimizerConfig())\n"  # which makes an update as well
        "optimizer.zero_grad()\n"
        f"print([name for name in {LATER} if name in sys.modules.keys() - before])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
