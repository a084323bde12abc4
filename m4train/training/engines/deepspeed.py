"""ZeRO-1, 2 and 3 through DeepSpeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m4train.batch import PackedBatch, PackedOutput
from m4train.config.deepspeed import STAGES, deepspeed_config
from m4train.config.packages import need
from m4train.run_files import DEEPSPEED
from m4train.training import optim
from m4train.training.checkpoints.files import write_json
from m4train.training.engines.base import Update
from m4train.training.engines.distributed import DistributedEngine
from m4train.training.engines.extensions import compile_in_turn
from m4train.training.gradient_checkpointing import checkpoint_blocks
from m4train.training.model_protocol import TrainableModel
from m4train.training.naming import canonical_parameters
from m4train.training.quantization import is_quantized
from m4train.training.tensors import NATIVE, PARAMETER, buffer_tensors

# Only the root returns a PackedOutput, and no parameter is its own; skipped steps are counted and reported here.
_NOISE = ("unknown inputs or outputs type", "OVERFLOW! Skipping step")


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)


def _library() -> Any:
    """DeepSpeed, set up for the device of this process, and with its log messages reduced to warnings."""
    need("deepspeed", "engine.name=zero1 to zero3")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On a CPU it would first compile a kernel that only inference calls: half a minute, and a compiler, for nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    compile_in_turn()
    deepspeed.logger.setLevel("WARNING")
    deepspeed.logger.addFilter(_worth_saying)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)  # how it calls torch
    return deepspeed


class DeepSpeedEngine(DistributedEngine):
    """Optimizer state (1), gradients (2) and parameters (3) split over ranks.

    Checkpoints are gathered into full tensors on rank 0 through DeepSpeed's own accessors, so that any engine reads them.
    """

    _engine: Any = None  # until prepare, and when a model that is not split only evaluates

    def prepare(self, model: TrainableModel) -> None:
        """Wraps the model; the complete DeepSpeed configuration is written to run_dir/deepspeed.json."""
        deepspeed = _library()
        self.stage = STAGES[self.config.engine.name]
        self.store(model)
        if self.config.trainer.gradient_checkpointing:
            checkpoint_blocks(model.blocks())
        parts = model.parts()
        self.trainable = {name: p for name, p in canonical_parameters(model).items() if p.requires_grad}
        groups = optim.parameter_groups(self.trainable, optim.undecayed_names(model), parts, self.config.optimizer)
        self._group_of = {name: i for i, group in enumerate(groups) for name in group["names"]}
        settings = deepspeed_config(self.config, self.world_size)
        if self.rank == 0:
            Path(self.config.run_dir).mkdir(parents=True, exist_ok=True)
            write_json(Path(self.config.run_dir) / DEEPSPEED, settings)
        self._distribute(model, settings)
        self._watch_gradients()
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optim.make_optimizer(groups, self.config.optimizer),
            config=settings,
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer
        self._zero.torch_autocast_gradscaler = None  # the scale is kept here, as under every engine
        self._zero.loss_scaler.cur_scale = self.scale.value.item()
        self.optimizer = self._zero.optimizer
        self._allocate_state()
        self._remember_norms()

    def place(self, model: TrainableModel) -> None:
        """Splits the parameters over ranks under ZeRO-3; under the others every rank has them all."""
        settings = deepspeed_config(self.config, self.world_size)
        self._distribute(model, settings)
        if self.sharded:
            self._engine, *_ = _library().initialize(model=model, config=settings, dist_init_required=False)

    def _distribute(self, model: TrainableModel, settings: dict[str, Any]) -> None:
        """Puts the model on the device; under ZeRO-3 parameter by parameter, so that none ever holds more than its share."""
        self.model = model
        if not self.sharded:
            model.to(self.device)
            return
        for module in model.modules():
            if is_quantized(module):  # its scales are not parameters
                module.to(self.device)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        deepspeed = _library()
        deepspeed.init_distributed(dist_init_required=False)
        own = {key: settings[key] for key in ("train_micro_batch_size_per_gpu", "zero_optimization")}
        deepspeed.zero.Init(module=model, config_dict_or_path=own, dtype=torch.float32)

    @property
    def sharded(self) -> bool:  # type: ignore[override]  # which ZeRO stage decides
        return STAGES[self.config.engine.name] == 3

    def _allocate_state(self) -> None:
        """Creates the optimizer state of every flat partition at once.

        DeepSpeed would create it group by group in the first step, and link only the first group's to its accessors.
        """
        groups, flats = self.optimizer.param_groups, self._flats()
        members, gradients = [group["params"] for group in groups], [flat.grad for _, flat in flats]
        for number, group in enumerate(groups):
            group["params"] = [flat for owner, flat in flats if owner == number]
        optim.allocate_state(self.optimizer)
        for (_, flat), gradient in zip(flats, gradients, strict=True):
            flat.grad = gradient
        for group, parameters in zip(groups, members, strict=True):
            group["params"] = parameters
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[tuple[int, Tensor]]:
        """The flat fp32 partitions of this rank, each with the number of its parameter group."""
        if self.stage < 3:
            return list(enumerate(self._zero.single_partition_of_fp32_groups))
        owners = self._zero.sub_group_to_group_id
        return [(owners[number], flat) for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat)]

    def _watch_gradients(self) -> None:
        """Notes which parameters get a gradient in the first backward pass, since ZeRO takes it away at once."""
        self._without = set(self.trainable)
        self._hooks = [p.register_hook(self._noting(name)) for name, p in self.trainable.items()]

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self._without.discard(name)

    def without_gradient(self) -> list[str]:
        for hook in self._hooks:
            hook.remove()
        return sorted(self._without)

    def forward(self, batch: PackedBatch, z_loss: float = 0.0) -> PackedOutput:
        """See `Engine.forward`: loss (), token losses (L,)."""
        if self._engine is None:
            return super().forward(batch, z_loss)
        cached = torch.is_autocast_cache_enabled()
        # Under ZeRO-3 a weight is whole only while its layer runs: a cast that is kept for a second use outlives it.
        torch.set_autocast_cache_enabled(cached and not self.sharded)
        try:
            return self._engine(batch, z_loss=z_loss)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def accumulation(self, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`; `loss` ()."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def update(self, factor: float, max_norm: float) -> Update:
        """DeepSpeed skips an update whose norm is not finite; an update that the guard refuses is skipped by the same means.

        All ranks see the same norm, so that they decide the same; the decision waits for the device.
        """
        optim.set_rates(self.optimizer, factor)
        norm, refused = None, False
        self._norms.clear()
        if self.guard.deviations:
            norm = self._norm()
            refused = bool(self.guard.judge(norm).item())
        with self._overflowing() if refused else nullcontext():
            self._engine.step()
        if norm is None:
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self.device)
        skipped = torch.tensor(float(self._zero.overflow), device=self.device)
        used = self.scale.value
        if factor:  # a rehearsal, at rate 0, leaves everything as it was
            self.scale.after(skipped.bool() & (not refused or ~torch.isfinite(norm)))
            self._zero.loss_scaler.cur_scale = self.scale.value.item()
        return Update(norm, *self._norms_by_part(used), skipped, used if self.scale.active else None)

    def _remember_norms(self) -> None:
        """Keeps the norm of every flat partition that DeepSpeed computes on its way to the global one."""
        self._norms: list[Any] = []

        def kept(function: Callable[..., Any]) -> Callable[..., Any]:
            def remembering(*args: Any, **options: Any) -> Any:
                self._norms.append(function(*args, **options))
                return self._norms[-1]

            return remembering

        for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            setattr(self._zero, name, kept(getattr(self._zero, name)))

    def _norms_by_part(self, scale: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Gradient norms (P,) of the last update, made with `scale`, and the parts they belong to."""
        owners = [self.optimizer.param_groups[number]["part"] for number, _ in self._flats()]
        norms = [torch.as_tensor(norm, device=self.device).float() for norm in self._norms[: len(owners)]]
        parts = tuple(dict.fromkeys(owners))
        if not norms:
            return torch.full((len(parts),), torch.inf, device=self.device), parts
        squares = torch.stack([torch.where(norm < 0, torch.inf, norm) for norm in norms]).square()
        by_part = [squares[[owner == part for owner in owners]].sum() for part in parts]
        return torch.stack(by_part).sqrt() / scale, parts

    def _norm(self) -> Tensor:
        """The global gradient norm before the update; not finite if DeepSpeed marks it as -1."""
        if self.stage < 3:
            norm = torch.as_tensor(self._zero.scaled_global_norm(), device=self.device)
        else:
            groups = [torch.as_tensor(group, device=self.device) for group in self._zero._get_norm_groups()]
            norm = torch.stack(groups).norm() if min(groups) >= 0 else torch.tensor(-1.0, device=self.device)
        return torch.where(norm < 0, torch.inf, norm).float() / self.scale.value

    @contextmanager
    def _overflowing(self) -> Iterator[None]:
        """Within it, DeepSpeed finds a norm that is not finite, and skips the update in its own orderly way."""
        name = "scaled_global_norm" if self.stage < 3 else "_get_norm_groups"
        infinite = torch.tensor(torch.inf, device=self.device)
        setattr(self._zero, name, lambda: infinite if self.stage < 3 else [infinite])
        try:
            yield
        finally:
            delattr(self._zero, name)

    def tensors(self) -> dict[str, Tensor]:
        """Copies gathered on rank 0; with engine.checkpoint=native the optimizer's stay as each rank holds them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        native = self.config.engine.checkpoint == "native"
        tensors: dict[str, Tensor] = {}
        for name, parameter in canonical_parameters(self.model).items():
            if name not in self.trainable:
                tensors[f"{PARAMETER}{name}"] = self._gathered(parameter)
                continue
            tensors[f"{PARAMETER}{name}"] = self._kept(safe_get_full_fp32_param(parameter))
            if native:
                continue
            for kind, value in self._state_of(name).items():
                full = safe_get_full_optimizer_state(parameter, kind) if value.ndim else value.detach()
                tensors[f"optimizer/{kind}/{name}"] = self._kept(full)
        for key, live in {**buffer_tensors(self.model), **self.guard.tensors(), **self.scale.tensors()}.items():
            tensors[key] = self._kept(live)
        own = {key: value.detach().cpu().clone() for key, value in self._partitions().items()} if native else {}
        return {**tensors, **own} if self.rank == 0 else own

    def live_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.live_parameters`; under ZeRO-3 each is gathered in turn."""
        for name, parameter in canonical_parameters(self.model).items():
            with self._whole([parameter]):
                yield name, parameter

    @property
    def native_prefix(self) -> str | None:
        return f"{NATIVE}{self.config.engine.name}/{self.world_size}/"

    def _partitions(self) -> dict[str, Tensor]:
        """The live optimizer state of this rank's flat partitions."""
        return {
            f"{self.native_prefix}{self.rank}/{kind}/{number}": value
            for number, (_, flat) in enumerate(self._flats())
            for kind, value in self.optimizer.state[flat].items()
            if isinstance(value, Tensor)
        }

    def staged(self) -> dict[str, Tensor]:
        return self.tensors()  # gathered, and so copies already

    def _kept(self, full: Tensor) -> Tensor:
        return full.detach().cpu().clone() if self.rank == 0 else torch.empty(0)

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        with self._whole([parameter]):
            return self._kept(parameter)

    def _whole(self, parameters: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
        """Within it, parameters are whole; what rank `writer` puts into them reaches every rank."""
        import deepspeed

        if self.stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state tensors of the flat partition that holds a parameter."""
        if self.stage < 3:
            number = self._group_of[name]
        else:
            number = self._zero.grad_position[self._zero.get_param_id(self.trainable[name])][0]
        state = self.optimizer.state[self._flats()[number][1]]
        return {kind: value for kind, value in state.items() if isinstance(value, Tensor)}

    def load(self, read: Callable[[dict[str, Tensor]], None], native: bool = False) -> None:
        parameters = canonical_parameters(self.model)
        counts: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in parameters.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            full = {f"{PARAMETER}{name}": torch.empty(shape, dtype=parameter.dtype)}
            if name in self.trainable and not native:
                for kind, value in self._state_of(name).items():
                    full[f"optimizer/{kind}/{name}"] = torch.zeros(shape if value.ndim else (), dtype=value.dtype)
            read(full)
            self._set(name, parameter, full, counts)
        kept = {**buffer_tensors(self.model), **self.guard.tensors(), **self.scale.tensors()}
        if live := {**kept, **(self._partitions() if native else {})}:
            read(live)
        self._zero.loss_scaler.cur_scale = self.scale.value.item()

    def _set(
        self, name: str, parameter: nn.Parameter, full: dict[str, Tensor], counts: dict[int, tuple[str, Tensor]]
    ) -> None:
        """Sets a parameter and its optimizer state from the full values; `counts` holds what was set of whole flat partitions.

        Raises ValueError if the parameters of one partition have counted other numbers of steps.
        """
        value = full.pop(f"{PARAMETER}{name}")
        with torch.no_grad(), self._whole([parameter], writer=0):
            parameter.copy_(value)
        if name not in self.trainable:
            return
        self._set_flat(parameter, value, None)
        for key, state in full.items():
            kind = key.split("/", 2)[1]
            if state.ndim:
                self._set_flat(parameter, state, kind)
            else:
                live = self._state_of(name)[kind]
                other, value = counts.setdefault(id(live), (name, state))
                if not torch.equal(value, state):
                    raise ValueError(
                        f"optimizer/{kind} is {state.item():g} of {name} but {value.item():g} of {other}, and ZeRO keeps one number "
                        "for both: go on under engine=single, ddp or fsdp2, or set resume_optimizer=fresh"
                    )
                live.copy_(state)

    def _set_flat(self, parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
        """Sets this rank's part of the fp32 master (kind None) or of an optimizer state from the full value."""
        from deepspeed import utils

        value = value.to(self.device)
        if self.stage == 3:
            size = parameter.ds_tensor.numel()
            padded = torch.zeros(size * self.world_size, dtype=value.dtype, device=value.device)
            padded[: value.numel()] = value.flatten()
            value = padded[size * self.rank : size * (self.rank + 1)]
        if self.stage == 3 and kind is None:
            utils.safe_set_local_fp32_param(parameter, value)
        elif self.stage == 3:
            utils.safe_set_local_optimizer_state(parameter, value, kind)
        elif kind is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
        super().shutdown()
