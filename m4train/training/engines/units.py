"""The units in which a model is sharded."""

from __future__ import annotations

from torch import nn

from m4train.training.model_protocol import TrainableModel


def sharded_units(model: TrainableModel, blocks: dict[str, list[nn.Module]]) -> list[nn.Module]:
    """What is sharded as one unit, inner ones first: blocks, towers (a part whose prefix is a module with blocks), the root."""
    inner = [block for members in blocks.values() for block in members]
    known, towers = {id(block) for block in inner}, []
    for part, prefixes in model.parts().items():
        for prefix in prefixes:
            tower = _submodule(model, prefix.rstrip("."))
            if tower is None or isinstance(tower, nn.ModuleList) or id(tower) in known:
                continue
            if any(module in blocks.get(part, []) for module in tower.modules()):
                towers.append(tower)
    return [*inner, *towers, model]


def _submodule(model: TrainableModel, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
