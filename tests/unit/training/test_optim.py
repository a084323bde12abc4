import pytest
import torch
from torch import nn

from m4train.config import OptimizerConfig, PartOptimizerConfig
from m4train.errors import ConfigError
from m4train.training import optim
from tests.helpers.training import TinyModel


def _groups(model, **options):
    config = OptimizerConfig(**options)
    named = dict(model.named_parameters())
    return optim.parameter_groups(named, optim.undecayed_names(model), model.parts(), config), config


def test_no_decay_on_norms_biases_gates_and_embeddings():
    model = TinyModel()
    model.connector.gate = nn.Parameter(torch.zeros(1, 1, 16))
    undecayed = optim.undecayed_names(model)
    expected = {n for n in dict(model.named_parameters()) if "norm" in n or "bias" in n or "gate" in n or "embed" in n}
    assert undecayed == expected


def test_a_tied_head_is_an_embedding():
    groups, _ = _groups(TinyModel(tied=True))
    (embeddings,) = [group for group in groups if "embed_tokens.weight" in group["names"]]
    assert embeddings["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["torch.optim:Adam", "torch.optim:NAdam", "torch.optim:Adagrad", "adamw", "muon"])
def test_state_is_allocated_as_it_begins(name):
    """Some optimizers add the decay to the gradients: it must not reach the moments before the first step."""
    groups, config = _groups(TinyModel(), name=name, weight_decay=0.1)
    optimizer = optim.build_optimizer(groups, config)
    state = [value for kept in optimizer.state.values() for key, value in kept.items() if key != "mu_product"]
    assert state
    assert not any(torch.as_tensor(value).any() for value in state)
    assert any(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_rates_and_decay_per_part():
    parts = {"vision": PartOptimizerConfig(lr=1e-5), "connector": PartOptimizerConfig(weight_decay=0.3)}
    groups, config = _groups(TinyModel(), lr=1e-3, weight_decay=0.1, parts=parts)
    optimizer = optim.build_optimizer(groups, config)
    optim.set_rates(optimizer, 0.5)
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert rates["vision"] == pytest.approx(5e-6)
    assert rates["text"] == pytest.approx(5e-4)
    decays = {group["part"]: group["weight_decay"] for group in optimizer.param_groups if group["weight_decay"]}
    assert decays == {"vision": 0.1, "connector": 0.3, "text": 0.1, "lm_head": 0.1}


def test_settings_for_a_part_that_does_not_train_are_refused():
    with pytest.raises(ConfigError, match="resampler"):
        _groups(TinyModel(), parts={"resampler": PartOptimizerConfig(lr=1.0)})


def test_update_equals_plain_adamw_and_can_be_skipped():
    ours, reference = TinyModel(), TinyModel()
    groups, config = _groups(ours, lr=1e-2, weight_decay=0.0)
    optimizer = optim.build_optimizer(groups, config)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0, fused=False, foreach=False)
    before = [p.detach().clone() for p in ours.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters())), "allocating state moved a parameter"
    for skip in (0.0, 1.0, 0.0):
        for mine, theirs in zip(ours.parameters(), reference.parameters()):
            gradient = torch.randn_like(mine)
            mine.grad = gradient * (float("nan") if skip else 1.0)
            theirs.grad = gradient.clone()
        optim.set_rates(optimizer, 1.0)
        optim.step_unless(optimizer, torch.tensor(skip))
        if not skip:
            plain.step()
    for mine, theirs in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    steps = {
        name: t.item() for name, t in optim.optimizer_tensors(optimizer).items() if name.startswith("optimizer/step")
    }
    assert set(steps.values()) == {2.0}


def test_eight_bit_adamw_learns_and_resumes_to_the_last_bit(tmp_path):
    from torch import nn

    from tests.helpers.training import make_config, make_trainer, read_metrics

    def wide():
        model = TinyModel()
        model.connector = nn.Sequential(nn.Linear(16, 512, bias=False), nn.Linear(512, 32))  # above 4096: 8-bit state
        return model

    for name, pieces in (("whole", (8,)), ("broken", (3, 5))):
        for steps in pieces:
            config = make_config(tmp_path / name, max_steps=8, stop_after=steps)
            config.optimizer.name = "adamw_8bit"
            torch.manual_seed(0)
            trainer = make_trainer(config, wide())
            trainer.train()
    kinds = {t.dtype for key, t in trainer.engine.tensors().items() if key.startswith("optimizer/state1/")}
    assert kinds == {torch.uint8, torch.float32}
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    plain = make_config(tmp_path / "plain", max_steps=8)
    torch.manual_seed(0)
    make_trainer(plain, wide()).train()
    assert whole[-1]["loss"] == pytest.approx(read_metrics(tmp_path / "plain")[-1]["loss"], rel=0.02)


def test_eight_bit_adamw_skips_a_bad_step():
    groups, config = _groups(TinyModel(), name="adamw_8bit")
    optimizer = optim.build_optimizer(groups, config)
    parameter = optimizer.param_groups[0]["params"][0]
    before = parameter.detach().clone()
    optim.set_rates(optimizer, 1.0)
    for skip, moved in ((1.0, False), (0.0, True)):
        for group in optimizer.param_groups:
            for member in group["params"]:
                member.grad = torch.ones_like(member)
        optim.step_unless(optimizer, torch.tensor(skip))
        assert torch.equal(before, parameter) != moved


def test_all_of_a_part_decays_where_asked():
    groups, _ = _groups(TinyModel(), parts={"embeddings": PartOptimizerConfig(weight_decay=0.2, decay_all=True)})
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["embed_tokens.weight"] == 0.2
    assert decays["norm.weight"] == 0.0


def test_betas_and_eps_reach_the_update():
    for name in ("adamw", "muon"):
        groups, config = _groups(TinyModel(), name=name, betas=[0.5, 0.6], eps=1e-3)
        optimizer = optim.build_optimizer(groups, config)
        adamw = [group for group in optimizer.param_groups if not group["matrices"]]
        assert adamw
        assert all((group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3) for group in adamw)


def test_muon_takes_the_hidden_matrices_and_updates_them_as_torch_does():
    ours, reference = TinyModel(), TinyModel()
    groups, config = _groups(ours, name="muon", lr=1e-2, momentum=0.9)
    matrices = {name for group in groups for name in group["names"] if group["matrices"]}
    assert matrices == {
        name for name, p in ours.named_parameters() if p.ndim == 2 and not name.startswith(("embed_tokens", "lm_head"))
    }
    optimizer = optim.build_optimizer(groups, config)
    named = dict(reference.named_parameters())
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    plain = torch.optim.Muon([named[name] for name in matrices], **options)
    for skip in (0.0, 1.0, 0.0):
        for name, mine in ours.named_parameters():
            mine.grad = torch.randn_like(mine)
            named[name].grad = mine.grad.clone()
        optim.set_rates(optimizer, 1.0)
        optim.step_unless(optimizer, torch.tensor(skip))
        if not skip:
            plain.step()
    for name in matrices:
        torch.testing.assert_close(dict(ours.named_parameters())[name], named[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours.lm_head.weight, TinyModel().lm_head.weight)


def test_muon_without_a_matrix_is_refused():
    model = TinyModel()
    named = {name: p for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    groups = optim.parameter_groups(named, optim.undecayed_names(model), model.parts(), OptimizerConfig(name="muon"))
    with pytest.raises(ConfigError, match="optimizer=adamw"):
        optim.make_optimizer(groups, OptimizerConfig(name="muon"))


def test_muon_learns_and_resumes_to_the_last_bit(tmp_path):
    from tests.helpers.training import make_config, make_trainer, read_metrics

    for name, pieces in (("whole", (8,)), ("broken", (3, 5))):
        for steps in pieces:
            config = make_config(tmp_path / name, max_steps=8, stop_after=steps)
            config.optimizer.name = "muon"
            make_trainer(config, TinyModel()).train()
    whole, broken = (read_metrics(tmp_path / name) for name in ("whole", "broken"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    assert whole[-1]["loss"] < whole[0]["loss"]
