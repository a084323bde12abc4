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


def test_the_first_step_on_a_cpu_imports_no_compiler():
    """Also while its memory is measured: each would be a second before it."""
    code = (
        "import sys, torch\n"
        "from m4train.config import Config\n"
        "from m4train.estimation.step import BatchShape, worst_case\n"
        "from m4train.estimation.tracker import MemoryTracker\n"
        "from m4train.families import FAMILIES\n"
        "from m4train.training.engines.single import SingleEngine\n"
        "vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)\n"
        "text = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "text['num_key_value_heads'] = 1\n"
        "latents = dict(resampler_n_latents=2, resampler_depth=1, resampler_n_heads=4, num_key_value_heads=2, resampler_head_dim=4)\n"
        "sizes = dict(vision_config=vision, text_config=text, image_token_id=1)\n"
        "for family, more in (('idefics2', dict(perceiver_config=latents)), ('idefics3', dict(scale_factor=2))):\n"
        "    config = Config()\n"
        "    config.model.family, config.trainer.precision = family, 'fp32'\n"
        "    architecture = FAMILIES[family].load('Config').from_dict({**sizes, **more})\n"
        "    engine = SingleEngine(config, 'cpu')\n"
        "    engine.prepare(FAMILIES[family].model_class(architecture).train())\n"
        "    with MemoryTracker():\n"
        "        engine.backward(engine.forward(worst_case(architecture, BatchShape(16, 1, 4 * (family == 'idefics2')))).loss, True)\n"
        "    engine.update(1.0, 1.0)\n"
        "    print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n", done.stderr
