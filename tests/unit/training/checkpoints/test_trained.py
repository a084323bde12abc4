"""A run that goes on with other rules of what trains keeps the moments of what trains on: torch's own AdamW says what that means."""

import pytest
import torch

from m4train.config import FreezeConfig, FreezeRule
from m4train.errors import CheckpointError
from m4train.training.freezing import apply_freezing
from tests.helpers.training import FakeLoader, TinyModel, make_config, make_trainer, read_metrics

STOP, STEPS = 4, 8
RULES = {
    "all": [FreezeRule(trainable=True)],
    "without vision": [FreezeRule(trainable=True), FreezeRule(part="vision")],
    "without a block": [FreezeRule(trainable=True), FreezeRule(names=["layers.0.*"])],
    "vision alone": [FreezeRule(), FreezeRule(part="vision", trainable=True)],
}


def config_of(run_dir, rules, **trainer):
    config = make_config(run_dir, max_steps=STEPS, save_every=100, max_grad_norm=1e9, **trainer)
    config.schedule.name, config.schedule.warmup_steps = "constant", 0
    config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay = 1e-3, 1e-6, 0.0
    config.freeze = FreezeConfig(RULES[rules])
    return config


def model_of(config):
    model = TinyModel()
    apply_freezing(model, config.freeze)
    return model


def by_hand(before, after):
    """The losses of a loop of torch's AdamW in one process, whose parameters change after step STOP."""
    model, losses = TinyModel(), []
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, eps=1e-6, weight_decay=0.0)
    for number, step in zip(range(STEPS), FakeLoader(micro=8)):
        if number in (0, STOP):
            apply_freezing(model, FreezeConfig([FreezeRule(trainable=True), *RULES[before if number == 0 else after]]))
            trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer.param_groups[0]["params"] = trains
            optimizer.state = type(optimizer.state)(
                dict, {p: optimizer.state[p] for p in trains if p in optimizer.state}
            )
        (batch,) = step.micro_batches
        loss = model(batch).loss / batch.targets.numel()
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


CHANGES = [
    ("without vision", "all", "14 more parameters train, whose moments begin at zero"),
    ("all", "without vision", "14 train no longer, and lose their moments"),
    ("without a block", "without vision", "6 more parameters train, whose moments begin at zero; 14 train no longer"),
]


def _run(run_dir, before, after, **trainer):
    for rules, stop_after in ((before, STOP), (after, None)):
        config = config_of(run_dir, rules, stop_after=stop_after, **trainer)
        trained = make_trainer(config, model_of(config))
        trained.train()
    return trained, [line["loss"] for line in read_metrics(run_dir)]


@pytest.mark.parametrize(("before", "after", "said"), CHANGES)
def test_moments_of_what_trains_on_are_kept(before, after, said, tmp_path):
    trainer, losses = _run(tmp_path, before, after)
    assert losses == pytest.approx(by_hand(before, after), rel=1e-6)
    assert "freeze.rules" in trainer.continued
    assert said in trainer.continued


def test_what_trains_on_counts_on_and_what_joins_counts_from_zero(tmp_path):
    trainer, _ = _run(tmp_path, "without vision", "all")
    counts = {name: t.item() for name, t in trainer.engine.tensors().items() if name.startswith("optimizer/step/")}
    joined = {name for name in counts if "/vision." in name}
    assert {counts[name] for name in joined} == {STEPS - STOP}
    assert {counts[name] for name in counts.keys() - joined} == {STEPS}
    assert trainer.saved_step == STEPS
    again = config_of(tmp_path, "all")  # and so does a start after this one, with the same rules
    again.trainer.max_steps = STEPS + 1
    trainer = make_trainer(again, model_of(again))
    trainer.train()
    tensors = trainer.engine.tensors()
    assert {tensors[name].item() - counts[name] for name in counts} == {1}


def test_nothing_kept_is_said_of_a_fresh_optimizer(tmp_path):
    config = config_of(tmp_path, "vision alone", stop_after=STOP)
    make_trainer(config, model_of(config)).train()
    config = config_of(tmp_path, "all")
    config.resume_optimizer = "fresh"
    trainer = make_trainer(config, model_of(config))
    assert "moments begin" not in trainer.continued
    assert "the optimizer starts again, without its moments" in trainer.continued
    assert trainer.train().step == STEPS


def test_moments_that_should_be_there_and_are_not_are_refused(tmp_path):
    """Only a change of the rules lets a parameter begin without moments."""
    config = config_of(tmp_path, "without vision", stop_after=STOP)
    make_trainer(config, model_of(config)).train()
    with pytest.raises(CheckpointError, match=r"does not fit this model: .*optimizer/.*vision"):
        make_trainer(config, TinyModel()).train()


@pytest.mark.parametrize("deviations", [(0.0, 6.0), (6.0, 0.0)])
def test_a_run_may_begin_and_end_to_watch_for_outliers(deviations, tmp_path):
    for value, stop_after in zip(deviations, (STOP, None), strict=True):
        trainer = make_trainer(config_of(tmp_path, "all", skip_outliers=value, stop_after=stop_after), TinyModel())
        assert trainer.train().step in (STOP, STEPS)
    assert "trainer.skip_outliers" in trainer.continued
    guard = trainer.engine.tensors().get("guard/count")
    assert (guard is None) if deviations[1] == 0.0 else guard.item() == STEPS - STOP


def test_frozen_weights_may_be_stored_in_half_the_memory_from_here_on(tmp_path):
    for dtype, stop_after in (("bf16", STOP), (None, None)):
        config = config_of(tmp_path, "without vision", precision="bf16", stop_after=stop_after)
        config.freeze.frozen_dtype = dtype
        trainer = make_trainer(config, model_of(config))
        assert trainer.train().step in (STOP, STEPS)
        tensors = trainer.engine.tensors()
        stored = {t.dtype for name, t in tensors.items() if name.startswith("parameter/vision.")}
        assert stored == {torch.bfloat16 if dtype else torch.float32}
