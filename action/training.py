"""Teaches an action policy: the losses, over the very model that serves, and the step that lowers them.

:func:`flow_loss` is what a policy is for: flow matching (Beta-distributed times as in reference/model.md §6, several draws of noise and time
per observation, as the prefix costs most). Two losses read facts off what the model makes of its input, and are dropped afterwards:
:func:`readout_loss`, off the image tokens, gives a new vision tower sight in minutes where learning to see through actions or words takes hours;
:func:`prompt_loss`, off the words of the prompt, teaches the language model what they mean in the picture. Nothing here is imported by a server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action.gemma import Attended, Block, KeyValueBlock, Rope, modulate
from action.model import Pi0Model, PrefixContext, StepCondition
from action.siglip import VisionBlock, VisionTower


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
    return _facts_loss(*readout(tokens), points, classes)


def _facts_loss(told_points: Tensor, told_classes: Tensor, points: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, float]]:
    there, known = ~points.isnan(), classes >= 0
    point_loss = (told_points - points)[there].square().mean()
    loss = 10 * point_loss + F.cross_entropy(told_classes[known], classes[known])
    right = (told_classes.argmax(-1) == classes)[known].float().mean()
    return loss, {"loss": loss.item(), "rms": math.sqrt(point_loss.item()), "right": right.item()}


class Encoded(NamedTuple):
    """What a model makes of observations: the ``context`` of its denoising steps, and ``words`` ``[B, L, W]``, its prompts as the last layer
    of the language model gets them, normalised."""

    context: PrefixContext
    words: Tensor


def encode(model: Pi0Model, images: Tensor, tokens: Tensor, token_mask: Tensor, *, horizon: int) -> Encoded:
    """Runs the prefix.

    Args:
        images: uint8 ``[B, C, side, side, 3]``, every camera there.
        tokens: int ``[B, L]``; ``token_mask`` bool ``[B, L]``.
        horizon: how many actions will follow.
    """
    masks = torch.ones(images.shape[:2], dtype=torch.bool)
    state = torch.zeros(len(images), model.dims.action_dim)  # pi0.5 reads it in the prompt
    entered: list[Tensor] = []
    hook = model.vlm_last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        context = model.encode(images, masks, tokens, token_mask, state, horizon)
    finally:
        hook.remove()
    return Encoded(context, modulate(entered[0][:, -tokens.shape[1] :], model.vlm_last.attention_norm.modulation()))


class PromptReadout(nn.Module):
    """Linear read-outs of a prompt's words, each a point and one of ``classes``, and of its end: a point, and whether something is so."""

    def __init__(self, width: int, classes: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.randn(width, 2 + classes, generator=generator) * width**-0.5)
        self.end = nn.Parameter(torch.randn(width, 2 + 2, generator=generator) * width**-0.5)


class PromptFacts(NamedTuple):
    """What is to be read off prompts ``[B, L]``."""

    points: Tensor
    """``[B, L, 2]``, NaN at words without one"""
    classes: Tensor
    """``[B, L]`` int64, -1 at words without one"""
    end: Tensor
    """``[B]`` int64, the index of the last token"""
    end_point: Tensor
    """``[B, 2]``"""
    end_class: Tensor
    """``[B]`` int64, 0 or 1"""


def prompt_loss(words: Tensor, readout: PromptReadout, facts: PromptFacts) -> tuple[Tensor, dict[str, float]]:
    """As :func:`readout_loss` over the words that a fact is known of, plus the same of the prompts' ends.

    Returns:
        the loss; ``target``, the root mean squared error of the ends' points per axis; ``right``, the share of right classes of words.
    """
    word_loss, of_words = _facts_loss(*(words @ readout.word).tensor_split([2], dim=-1), facts.points, facts.classes)
    ends = words[torch.arange(len(words)), facts.end] @ readout.end
    end_loss, of_ends = _facts_loss(*ends.tensor_split([2], dim=-1), facts.end_point, facts.end_class)
    return word_loss + end_loss, {"target": of_ends["rms"], "right": of_words["right"]}


def flow_loss(model: Pi0Model, context: PrefixContext, actions: Tensor, *, draws: int, generator: torch.Generator) -> Tensor:
    """The mean squared error of the velocity at random points of the flow from noise to ``actions``.

    Args:
        context: of :func:`encode`.
        actions: float32 ``[B, H, A]``, normalised.
        draws: how many noises and times each observation gets.
    """
    horizon = actions.shape[1]
    cache = [
        _Prefix(keys[:, :, :-horizon].repeat_interleave(draws, 0), values[:, :, :-horizon].repeat_interleave(draws, 0))
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


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, matrix by matrix, and scaled to the size of Adam's (Jordan et al. 2024; Liu et al. 2025).

    ``torch.optim.Muon`` does the same in bfloat16, which a CPU without such instructions emulates at sixteen times the cost, and takes a
    parameter that is several projections stacked for one matrix.

    Args:
        matrices: ``[out, in]`` parameters, each with the numbers of rows of the matrices that it is a stack of.
    """

    def __init__(self, matrices: Mapping[Tensor, Sequence[int]], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__([{"params": list(matrices)}], {"lr": lr})
        self._rows, self._momentum, self._weight_decay = list(matrices.values()), momentum, weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        (group,) = self.param_groups
        for parameter, rows in zip(group["params"], self._rows, strict=True):
            if parameter.grad is None:
                continue
            average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
            average.lerp_(parameter.grad, 1 - self._momentum)
            ahead = parameter.grad.lerp(average, self._momentum)  # Nesterov's
            parameter.mul_(1 - group["lr"] * self._weight_decay)
            for matrix, update in zip(parameter.split(rows), ahead.split(rows), strict=True):
                matrix.add_(orthogonal(update), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns, whichever are fewer: Newton-Schulz steps with Muon's coefficients, which bring
    all singular values but the tiniest to between 0.7 and 1.2 or so."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


def _block_matrices(modules: Iterable[nn.Module]) -> dict[Tensor, list[int]]:
    """The trained matrices of all blocks, with the rows of each matrix that a parameter is a stack of."""
    matrices: dict[Tensor, list[int]] = {}
    for block in (part for module in modules for part in module.modules() if isinstance(part, Block | KeyValueBlock | VisionBlock)):
        for name, view in block.slots().items():
            parameter = view if isinstance(view, nn.Parameter) else view._base
            if view.ndim == 2 and "norm" not in name and parameter is not None and parameter.requires_grad and not parameter.is_meta:
                matrices.setdefault(parameter, []).append(len(view))
    return matrices


class Trainer:
    """:class:`Muon` on the blocks' matrices and Adam with decoupled weight decay on the rest; norm 1 clipping, linear warm-up, cosine to 0, and
    a running average of the weights.

    Args:
        modules: what is trained; parameters that need no gradient are left alone.
        averaging: how much of the average stays at each step; less at the beginning, where the average would be of nothing.
    """

    def __init__(self, modules: Sequence[nn.Module], steps: int, *, rate: float, warm_up: int = 100, averaging: float = 0.998) -> None:
        self._parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        matrices = _block_matrices(modules)
        rest = [parameter for parameter in self._parameters if parameter not in matrices]
        groups = [
            {"params": [parameter for parameter in rest if parameter.ndim >= 2], "weight_decay": 0.01},
            {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]
        if matrices:
            self._optimisers.append(Muon(matrices, lr=rate))
        warm_up = min(warm_up, max(1, steps // 10))

        def share(step: int) -> float:
            return step / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

        self._schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, share) for optimiser in self._optimisers]
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._averaging = averaging
        self.steps = 0

    def step(self, loss: Tensor) -> None:
        """Lowers ``loss``."""
        self.steps += 1
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimiser, schedule in zip(self._optimisers, self._schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
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
