"""Teaches an action policy: the losses, over the very model that serves, and the step that lowers them.

:func:`flow_loss` is what a policy is for: flow matching (Beta-distributed times as in reference/model.md §6, several draws of noise and time
per observation, as the prefix costs most). :func:`readout_loss` gives a new vision tower sight first: a handful of learnt queries read facts
about the picture off the image tokens, which takes minutes where learning to see through actions or words takes hours. Nothing here is
imported by a server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action.gemma import Attended, Rope
from action.model import Pi0Model, PrefixContext, StepCondition
from action.siglip import VisionTower


@dataclass
class _Prefix:
    """The prefix's keys and values of one layer, ``[B, K, P, H]``, and what follows: a new tensor each time, so that gradients can flow."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> Attended:
        return Attended(torch.cat([self.keys, k.transpose(1, 2)], dim=2), torch.cat([self.values, v.transpose(1, 2)], dim=2))


class Readout(nn.Module):
    """Learnt queries over the image tokens ``[B, T, W]``, each with a point and one of ``classes`` to tell; dropped after training."""

    def __init__(self, width: int, queries: int, classes: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width, generator=generator))
        self.kernel = nn.Parameter(torch.randn(queries, width, 2 + classes, generator=generator) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(queries, 2 + classes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``[B, Q, 2]`` and class logits ``[B, Q, classes]``."""
        weights = (self.queries @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5).softmax(-1)
        told = torch.einsum("bqw,qwo->bqo", weights @ tokens, self.kernel) + self.bias
        return told[..., :2], told[..., 2:]


def readout_loss(tokens: Tensor, readout: Readout, points: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the points, times 10, and cross-entropy of the classes.

    Args:
        tokens: ``[B, T, W]``, the tower's.
        points: ``[B, Q, 2]``, NaN where there is none.
        classes: ``[B, Q]`` int64, -1 where there is none.

    Returns:
        the loss; ``rms``, the root of the points' mean squared error per axis; ``right``, the share of right classes.
    """
    told_points, told_classes = readout(tokens)
    there, known = ~points.isnan(), classes >= 0
    point_loss = (told_points - points)[there].square().mean()
    loss = 10 * point_loss + F.cross_entropy(told_classes[known], classes[known])
    right = (told_classes.argmax(-1) == classes)[known].float().mean()
    return loss, {"loss": loss.item(), "rms": math.sqrt(point_loss.item()), "right": right.item()}


def flow_loss(
    model: Pi0Model, images: Tensor, tokens: Tensor, token_mask: Tensor, actions: Tensor, *, draws: int, generator: torch.Generator
) -> Tensor:
    """The mean squared error of the velocity at random points of the flow from noise to ``actions``.

    Args:
        images: uint8 ``[B, C, side, side, 3]``, every camera there.
        tokens: int ``[B, L]``; ``token_mask`` bool ``[B, L]``.
        actions: float32 ``[B, H, A]``, normalised.
        draws: how many noises and times each observation gets.
    """
    batch, horizon, _ = actions.shape
    masks = torch.ones(images.shape[:2], dtype=torch.bool)
    state = torch.zeros(batch, actions.shape[-1])  # pi0.5 reads it in the prompt
    context = model.encode(images, masks, tokens, token_mask, state, horizon)
    prefix = images.shape[1] * model.dims.backbone.vision.tokens + tokens.shape[1]
    cache = [
        _Prefix(keys[:, :, :prefix].repeat_interleave(draws, 0), values[:, :, :prefix].repeat_interleave(draws, 0))
        for keys, values in context.cache  # type: ignore[misc, attr-defined]
    ]
    rope = Rope(*(part.repeat_interleave(draws, 0) for part in context.rope))
    wanted = actions.repeat_interleave(draws, 0)
    noise = torch.randn(wanted.shape, generator=generator)
    times = _times(len(wanted), generator)
    x_t = times[:, None, None] * noise + (1 - times[:, None, None]) * wanted
    spread = PrefixContext(cache, rope, context.mask.repeat_interleave(draws, 0), None)
    return F.mse_loss(model.velocity(x_t, spread, _conditions(model, times)), noise - wanted)


def _times(count: int, generator: torch.Generator) -> Tensor:
    """``[count]`` flow times, Beta(1.5, 1) · 0.999 + 0.001: of that law, u^(2/3) of a uniform u."""
    return torch.rand(count, generator=generator) ** (2 / 3) * 0.999 + 0.001


def _conditions(model: Pi0Model, times: Tensor) -> StepCondition:
    """One condition whose rows differ along the batch: gains, shifts and gates ``[R, B, 1, D]``."""
    rows = model.condition(times)

    def stacked(parts: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([part for part in parts if part is not None], dim=1)[:, :, None]

    return StepCondition(stacked([row.gains for row in rows]), stacked([row.shifts for row in rows]), stacked([row.gates for row in rows]), None)


class Trainer:
    """Adam with decoupled weight decay on matrices, norm 1 clipping, linear warm-up, cosine to 0, and a running average of the weights.

    Args:
        modules: what is trained; parameters that need no gradient are left alone.
        averaging: how much of the average stays at each step; less at the beginning, where the average would be of nothing.
    """

    def __init__(self, modules: Iterable[nn.Module], steps: int, *, rate: float, warm_up: int = 100, averaging: float = 0.998) -> None:
        self._parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in self._parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self._parameters if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        warm_up = min(warm_up, max(1, steps // 10))

        def share(step: int) -> float:
            return step / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, share)
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._averaging = averaging
        self.steps = 0

    def step(self, loss: Tensor) -> None:
        """Lowers ``loss``."""
        self.steps += 1
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad()
        keep = min(self._averaging, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, 1 - keep)

    def take_averages(self) -> None:
        """The modules get the averaged weights; there is no going on from here."""
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                parameter.copy_(average)


def shrink_patches(model: Pi0Model, scale: int) -> None:
    """Sets the tower of ``model`` up for pictures that are smaller by ``scale`` on each side: its patch convolution, summed over
    ``scale`` × ``scale`` pixels. What it gives is what it gave on the same pictures at full size, each pixel repeated."""
    tower = model.vision
    small = tower.patch // scale
    kernel = tower.patch_embedding.weight.detach().unflatten(1, (small, scale, small, scale, 3)).sum(dim=(2, 4))
    _set_patches(tower, kernel.flatten(1), small)


def grow_patches(model: Pi0Model, scale: int) -> None:
    """The inverse of :func:`shrink_patches`: on a full picture, ``model`` gives what it gave on the average over ``scale`` × ``scale`` pixels."""
    tower = model.vision
    kernel = tower.patch_embedding.weight.detach().unflatten(1, (tower.patch, tower.patch, 3))
    kernel = kernel.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2) / scale**2
    _set_patches(tower, kernel.flatten(1), tower.patch * scale)


def _set_patches(tower: VisionTower, weight: Tensor, patch: int) -> None:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(tower.patch_embedding.bias)
    tower.patch_embedding, tower.patch = layer.requires_grad_(tower.patch_embedding.weight.requires_grad), patch
