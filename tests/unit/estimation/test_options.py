"""Every option that changes what a rank needs changes what is expected of it, and in the right direction."""

import copy

import pytest

from m4train.config import AdapterConfig, FreezeRule
from m4train.estimation.needs import estimate
from tests.unit.estimation.test_needs import _subject


def _changed(subject, **values):
    """A copy with keys of its configuration set, `group__key`."""
    config = copy.deepcopy(subject.config)
    for name, value in values.items():
        group, key = name.split("__")
        setattr(getattr(config, group), key, value)
    return type(subject)(config, subject.architecture, subject.stored, subject.ranks, subject.gpu)


def _adapted(subject, kind):
    rules = [FreezeRule(trainable=False), FreezeRule(part="connector", trainable=True)]
    found = _changed(subject, freeze__rules=rules)
    found.config.adapter = AdapterConfig(kind=kind, rank=4, targets={"text": ["q_proj", "v_proj", "up_proj"]})
    return found


def _ranked(subject, ranks):
    return type(subject)(subject.config, subject.architecture, subject.stored, ranks, subject.gpu)


_KNOWN = {}


def _once(subject):
    """The memory of a subject that many tests begin from."""
    if id(subject) not in _KNOWN:
        _KNOWN[id(subject)] = subject.memory()
    return _KNOWN[id(subject)]


BASE = _subject(layers=2)
SHARDED = _subject(layers=2, ranks=16, engine="fsdp2", global_batch_size=16)

# What is changed, of what, and the components that must shrink (-1), grow (1) or stay (0).
OPTIONS = {
    "lora": (BASE, lambda s: _adapted(s, "lora"), {"gradients": -1, "optimizer": -1}),
    "checkpointing": (BASE, lambda s: _changed(s, trainer__gradient_checkpointing=True), {"activations": -1, "optimizer": 0}),
    "fp32": (_changed(BASE, trainer__gradient_checkpointing=True), lambda s: _changed(s, trainer__precision="fp32"), {"parameters": 0}),
    "8 bits": (BASE, lambda s: _changed(s, optimizer__name="adamw_8bit"), {"optimizer": -1, "parameters": 0}),
    "packs": (BASE, lambda s: _changed(s, trainer__micro_batch_size=2), {"activations": 1, "optimizer": 0}),
    "length": (BASE, lambda s: _changed(s, data__sequence_length=2048), {"activations": 1, "optimizer": 0}),
    "frames": (BASE, lambda s: _changed(s, data__images_per_pack=2), {"activations": -1, "parameters": 0}),
    "ranks": (SHARDED, lambda s: _ranked(s, 2), {"parameters": 1, "optimizer": 1, "gathered": 0}),
    "within a node": (SHARDED, lambda s: _changed(s, engine__shard_within_node=True), {"parameters": 1, "optimizer": 1}),
    "zero3": (SHARDED, lambda s: _changed(s, engine__name="zero3"), {"buckets": 1}),
    "zero2": (_changed(SHARDED, engine__name="zero3"), lambda s: _changed(s, engine__name="zero2"), {"parameters": 1}),
    "zero1": (_changed(SHARDED, engine__name="zero2", trainer__global_batch_size=32), lambda s: _changed(s, engine__name="zero1"), {"gradients": 1}),
    "ddp": (_changed(SHARDED, engine__name="zero1"), lambda s: _changed(s, engine__name="ddp"), {"optimizer": 1}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_option_changes_what_it_is_about(name):
    subject, change, directions = OPTIONS[name]
    before, after = _once(subject).components, change(subject).memory().components
    for part, direction in directions.items():
        more = after.get(part, 0.0) - before.get(part, 0.0)
        if direction:
            assert more * direction > 0, (part, before, after)
        else:
            assert abs(more) <= 0.01 * before[part], (part, before, after)


def test_frozen_weights_are_stored_as_asked():
    frozen = _adapted(BASE, "lora")
    wide = type(frozen)(frozen.config, frozen.architecture, None)  # of a file in fp32
    half = _changed(wide, freeze__frozen_dtype="bf16")
    saved = wide.memory().components["parameters"] - half.memory().components["parameters"]
    size = wide.sizes()
    assert saved == pytest.approx(2 * (size.parameters - size.trained), rel=0.01)


def test_four_bits_take_less_than_lora():
    plain, packed = _adapted(BASE, "lora"), _adapted(BASE, "qlora")
    saved = plain.memory().components["parameters"] - packed.memory().components["parameters"]
    assert saved == pytest.approx(3 * packed.sizes().whole_bytes, rel=0.01)  # two bytes of each become half a byte
    assert saved > 0


@pytest.mark.full
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_what_is_offloaded_is_on_the_host(engine):
    subject = _changed(SHARDED, engine__name=engine)
    plain, moved = subject.memory(), _changed(subject, engine__offload=True).memory()
    assert moved.host > 0
    assert moved.tensors + moved.host == pytest.approx(plain.tensors)
    assert "parameters" not in moved.components


@pytest.mark.full
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_offloaded_optimizers_leave_their_parameters_on_the_device(engine):
    subject = _changed(SHARDED, engine__name=engine)
    moved = _changed(subject, engine__offload=True).memory()
    plain = subject.memory().components
    left = {"optimizer", "master copy"}
    assert left & set(moved.components) == set()
    assert moved.components["parameters"] == plain["parameters"]
    trained = subject.sizes().trained_bytes
    # gradients of this rank's share are there too, where a parameter that ranks share is whole
    assert trained / SHARDED.ranks < moved.host - sum(plain[name] for name in left) < trained
    text = subject.architecture.text_config
    largest = 4 * text.vocab_size * text.hidden_size
    more = moved.tensors - sum(size for name, size in plain.items() if name not in left)
    assert more == pytest.approx(largest, abs=1e5)  # one on its way to the host


def test_the_chunk_of_logits_is_that_of_the_device():
    """A GPU computes the loss in larger chunks than a CPU."""
    cpu, gpu = (type(BASE)(BASE.config, BASE.architecture, BASE.stored, 1, None, on) for on in ("cpu", "cuda"))
    assert gpu.memory().tensors > cpu.memory().tensors


def test_a_share_of_the_peak_is_that_of_progress():
    """`--mfu` is what metrics.jsonl calls mfu: what checkpointing computes again takes time, and is in neither."""
    plain = _subject(gpu="h100")
    again = _subject(gpu="h100", gradient_checkpointing=True)
    assert estimate(plain, 0.4).speeds[0].step_seconds == pytest.approx(estimate(again, 0.4).speeds[0].step_seconds)
    assert estimate(again).speeds[1].mfu < estimate(plain).speeds[1].mfu == pytest.approx(0.40)


def test_what_it_takes_besides_memory_is_known():
    found = estimate(_subject(gpu="h100", ranks=8, engine="ddp", global_batch_size=64))
    usual = found.speeds[1]
    assert usual.frames_per_second == pytest.approx(64 * found.frames / usual.step_seconds)
    assert usual.cores == pytest.approx(usual.frames_per_second / 40)
    assert found.tokens == 64 * 1024 * 1000
    assert found.checkpoint_bytes == pytest.approx(3 * found.sizes.trained_bytes)
    assert found.checkpoint_seconds == pytest.approx(found.checkpoint_bytes / 1e9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("adamw_8bit", 0.24, 0.27), ("paged_adamw_8bit", 0.24, 0.27), ("muon", 0.5, 0.99), ("adafactor", 0.0, 0.05)],
)
def test_each_optimizer_keeps_its_own(name, least, most):
    whole = _once(BASE).components["optimizer"]
    assert least < _changed(BASE, optimizer__name=name).memory().components["optimizer"] / whole < most
