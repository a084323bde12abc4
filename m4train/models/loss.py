"""Cross-entropy from hidden states, by chunks: the logits of a whole batch never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from m4train.errors import ConfigError
from m4train.models.fused_losses import choose_loss
from m4train.models.products import add_product, linear, product

# Elements of the logits of one chunk. Each chunk also adds to the whole weight gradient, so small ones are slow.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
# A head replaced by an adapter is called this many times whatever the batch holds, so that all ranks call it equally often.
_ADAPTED_CHUNKS = 8


class LMHead(nn.Linear):
    """The output projection; called with targets it returns losses instead of logits.

    The ids beyond `vocab` have rows of their own (Idefics), so that the others can be frozen.

    The loss is computed inside the module so that a wrapper which gathers the weight around its forward (ZeRO-3, FSDP)
    does so exactly once per forward pass.
    """

    additional_fc: nn.Linear | None

    def __init__(self, size: int, vocab: int, additional: int = 0) -> None:
        super().__init__(size, vocab, bias=False)
        self.additional_fc = nn.Linear(size, additional, bias=False) if additional else None

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        kind: str = "auto",
    ) -> Any:
        """(..., H) -> (..., V); or, with `targets` (L,), see `token_loss`."""
        more = None if self.additional_fc is None else self.additional_fc(hidden)
        if targets is None:
            logits = linear(hidden, self.weight)
            return logits if more is None else torch.cat((logits, more), dim=-1)
        # A function asks for the gradients of its inputs even if grad mode is off.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        dtype = _compute_dtype(hidden)
        wanted = {
            "a z-loss": z_loss != 0,
            "token weights": weights is not None,
            "additional token rows": more is not None,
        }
        fused = choose_loss(kind, hidden, dtype, wanted)
        if fused is None or not targets.shape[0]:
            return _ChunkedLoss.apply(hidden, weight, more, targets, weights, z_loss, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = _wide(fused(hidden.to(dtype), weight.to(dtype), targets))
        return (losses if weights is None else losses * weights).sum(), losses.detach()


def token_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    kind: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum of weight x (cross-entropy + z_loss x logsumexp squared) over tokens.

    Args:
        head: the output projection; an `LMHead`, or what an adapter made of it.
        hidden: (L, H) hidden states of the positions that predict something; L may be 0.
        targets: (L,) int64.
        weights: (L,) float32, or None for ones.
        kind: who computes it: auto, chunked, torch or liger; see `choose_loss`.

    Returns:
        the loss (), and the unweighted cross-entropy of each token (L,), detached; both fp32 (float64 for float64 logits).

    Raises:
        ConfigError: a loss named by `kind` that cannot work here.
    """
    if isinstance(head, LMHead):
        return head(hidden, targets, weights, z_loss, kind)
    if kind not in ("auto", "chunked"):
        raise ConfigError(
            f"model.loss is {kind}, but the head is a {type(head).__name__}, which an adapter put in its place: set "
            "model.loss to auto or chunked."
        )
    total, losses = hidden.sum() * 0.0, []
    for part in torch.arange(targets.shape[0], device=hidden.device).tensor_split(_ADAPTED_CHUNKS):
        loss, detail = checkpoint(
            _plain,
            head,
            hidden[part],
            targets[part],
            None if weights is None else weights[part],
            z_loss,
            use_reentrant=False,
        )
        total = total.to(loss.dtype) + loss
        losses.append(detail)
    return total, torch.cat(losses)


def _plain(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = _wide(head(hidden))
    normaliser = logits.logsumexp(-1)
    losses = normaliser - logits.gather(-1, targets[:, None])[:, 0]
    total = losses + z_loss * normaliser.square() if z_loss else losses
    return (total if weights is None else total * weights).sum(), losses.detach()


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk, while the logits of the chunk are there.

    That is three matrix products instead of the four of recomputing logits in the backward pass, which the losses of
    torch and Liger do if they give a loss per token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        more: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        z_loss: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum () and the loss of each of the L tokens (L,).

        `hidden` (L, H), `weight` (V, H), `more` (L, M) logits of further tokens, `targets` (L,), `weights` (L,); the logits of
        a chunk of rows are computed in `dtype`.
        """
        wants_hidden, wants_weight, wants_more = ctx.needs_input_grad[:3]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        more_grad = torch.zeros_like(more) if wants_more and more is not None else None
        losses = torch.empty(targets.shape[0], dtype=wide, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        table = weight.to(dtype)
        rows = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**25) // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, targets.shape[0], rows):
                part = slice(start, start + rows)
                states = hidden[part].to(dtype)
                scale = None if weights is None else weights[part].to(wide)
                logits = product(states, table.t())
                if more is not None:
                    logits = torch.cat((logits, more[part].to(dtype)), dim=1)
                loss, losses[part], gradient = _chunk(logits, targets[part], scale, z_loss)
                total += loss
                if more_grad is not None:
                    more_grad[part] = gradient[:, weight.shape[0] :]
                gradient = gradient[:, : weight.shape[0]]
                if hidden_grad is not None:
                    hidden_grad[part] = product(gradient, table)
                if weight_grad is not None:
                    _accumulate(weight_grad, gradient, states)
                del logits, gradient  # else they would still be there next to those of the next chunk
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), more_grad)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `hidden` (L, H), `weight` (V, H) and `more` (L, M), times that of the total ()."""
        # In place: the gradient of the head is as large as the head. A second backward pass is refused by torch.
        scaled = (None if gradient is None else gradient.mul_(total_grad) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


def _chunk(logits: Tensor, targets: Tensor, scale: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, token losses, and the gradient of the former by the logits, in their dtype."""
    dtype = logits.dtype
    logits = _wide(logits)
    largest = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(largest)
    wanted = shifted.gather(-1, targets[:, None])[:, 0]
    gradient = shifted.exp_()  # the one buffer becomes shifted logits, their exponentials, and the gradient
    sums = gradient.sum(-1, keepdim=True)
    gradient /= sums
    logarithm = sums.log()[:, 0]
    losses, normaliser = logarithm - wanted, logarithm + largest[:, 0]
    total = losses + z_loss * normaliser.square() if z_loss else losses
    if z_loss:
        gradient *= (1 + 2 * z_loss * normaliser)[:, None]
    gradient.scatter_add_(1, targets[:, None], torch.full_like(losses, -1.0)[:, None])
    if scale is not None:
        total = total * scale
        gradient *= scale[:, None]
    return total.sum(), losses, gradient.to(dtype)


def _accumulate(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """total += gradient^T states; in one product if the dtypes allow it."""
    if total.dtype == states.dtype:
        add_product(total, gradient.t(), states)
    else:
        total += gradient.t() @ states


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype matrix products run in here: that of autocast if it is on."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype
