"""One process, one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedOutput
from m4train.config import Config
from m4train.training import optim
from m4train.training.engines.base import Update
from m4train.training.gradient_checkpointing import checkpoint_blocks
from m4train.training.guard import StepGuard
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters, part_of
from m4train.training.precision import LossScale, half_of
from m4train.training.schedule_free import to_gradients, to_weights
from m4train.training.tensors import full, is_sharded, weight_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager


class SingleEngine:
    """The reference every other engine is measured against.

    Trainable parameters are stored in fp32; with trainer.precision bf16 or fp16 they are computed in that through autocast.
    """

    sharded = False

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        self.config = config
        self.rank, self.world_size, self.checkpoint_group = 0, 1, None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model: TrainableModel
        self.optimizer: torch.optim.Optimizer
        self.trainable: dict[str, nn.Parameter] = {}
        self.guard = StepGuard(config.trainer.skip_outliers, self.device)
        self.scale = LossScale(config.trainer.precision, self.device)
        self._stager: DefaultStager | None = None

    def prepare(self, model: TrainableModel) -> None:
        """Places the model, stores what trains in fp32, and builds the optimizer."""
        self.store(model)
        self.model = model.to(self.device)
        if self.config.trainer.gradient_checkpointing:
            checkpoint_blocks(model.blocks())
        self.optimise({name: p for name, p in canonical_parameters(model).items() if p.requires_grad})

    def place(self, model: TrainableModel) -> None:
        self.model = model.to(self.device)

    def store(self, model: TrainableModel) -> None:
        """Sets the dtype parameters are stored in: fp32 for what trains; for the rest what freeze.frozen_dtype asks, or fp32
        if all is computed in it; otherwise that of the file they were loaded from, or fp16 for bf16 if fp16 is computed in."""
        frozen = torch.bfloat16 if self.config.freeze.frozen_dtype == "bf16" else None
        if self.config.trainer.precision == "fp32":
            frozen = torch.float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
            elif frozen is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(frozen)
            elif self.config.trainer.precision == "fp16" and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.half()  # autocast to fp16 takes no operands in bf16

    def optimise(self, trainable: dict[str, nn.Parameter], updated: dict[str, nn.Parameter] | None = None) -> None:
        """Builds the optimizer over what trains, given by canonical name; `updated` is what it works on, if not that."""
        self.trainable = trainable
        parts = self.model.parts()
        self._part_of = {name: part_of(name, parts) for name in trainable}
        self._part_names = tuple(dict.fromkeys(self._part_of.values()))
        undecayed = optim.undecayed_names(self.model)
        groups = optim.parameter_groups(updated or trainable, undecayed, parts, self.config.optimizer)
        self.optimizer = optim.build_optimizer(groups, self.config.optimizer)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the forward pass."""
        half = half_of(self.config.trainer.precision)
        return torch.autocast(self.device.type, dtype=half or torch.bfloat16, enabled=half is not None)

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """See `Engine.forward`: loss (), token losses (L,)."""
        self.depart()
        with self.autocast():
            return self.model(batch, z_loss=z_loss)

    def depart(self) -> None:
        """Before a forward pass of training: the weights go where the optimizer wants their gradients."""
        if self.trainable and self.model.training:
            to_gradients(self.optimizer)

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`; `loss` ()."""
        self.scale.scaled(loss).backward()

    def update(self, factor: float, max_norm: float) -> Update:
        squares = []
        for part in self._part_names:
            grads = [p.grad for n, p in self.trainable.items() if self._part_of[n] == part and p.grad is not None]
            norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=self.device)]
            squares.append(torch.stack(norms).square().sum())
        by_part = self.sum_squares(torch.stack(squares))
        scale = self.scale.value.to(by_part.device)  # of these gradients
        total = by_part.sum().sqrt() / scale
        skipped = self.guard.judge(total)
        coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0) / scale
        torch._foreach_mul_([p.grad for p in self.trainable.values() if p.grad is not None], coefficient)
        optim.set_rates(self.optimizer, factor)
        optim.step_unless(self.optimizer, skipped)
        to_weights(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if factor:  # a rehearsal, at rate 0, leaves everything as it was
            self.scale.after(~torch.isfinite(total))
        return Update(total, by_part.sqrt() / scale, self._part_names, skipped, scale if self.scale.active else None)

    def sum_squares(self, squares: Tensor) -> Tensor:
        """Sum over the ranks that hold different shards of the gradients, of squared norms per part (P,)."""
        return squares

    def without_gradient(self) -> list[str]:
        return [name for name, parameter in self.trainable.items() if parameter.grad is None]

    def reduce(self, values: Tensor) -> Tensor:
        """See `Engine.reduce`: the same shape (...)."""
        return values

    def agree(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return

    def tensors(self) -> dict[str, Tensor]:
        return {
            **weight_tensors(self.model),
            **optim.optimizer_tensors(self.optimizer),
            **self.guard.tensors(),
            **self.scale.tensors(),
        }

    def live_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.live_parameters`."""
        for name, parameter in canonical_parameters(self.model).items():
            yield name, full(parameter)

    def staged(self) -> dict[str, Tensor]:
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            cuda = self.device.type == "cuda"
            pinned = StagingOptions(cuda, False, False, cuda)  # memory that is kept for the next time
            self._stager = DefaultStager(pinned)
        plain = {k: t if is_sharded(t) else t.detach().as_subclass(Tensor) for k, t in self.tensors().items()}
        return self._stager.stage(plain)

    @property
    def native_prefix(self) -> str | None:
        return None

    def load(self, read: Callable[[dict[str, Tensor]], None], native: bool = False) -> None:
        tensors = self.tensors()
        read(tensors)
        optim.take_step_counts(self.optimizer, tensors)

    def shutdown(self) -> None:
        return
