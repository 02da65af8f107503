"""Flow-matching sampler: noise → action chunk in ``num_steps`` Euler steps (reference/model.md §6.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from action.model import Pi0Model, PrefixContext, StepCondition
from pi0.param_tree import IMAGE_SIZE

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What ``torch.compile`` is asked for; no mode at all is eager."""

# One program per batch size, prompt bucket and horizon. The limit is only there to stop a leak: reaching it would be an error.
_COMPILED_SHAPES = 256

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelInput:
    """One batch of observations, normalised and tokenised, on the host.

    ``images`` uint8 ``[B, C, 224, 224, 3]`` with C = 3 cameras in the model's order; ``image_masks`` bool ``[B, C]``; ``tokens`` int32 ``[B, L]`` and
    ``token_mask`` bool ``[B, L]`` (padded on the right); ``state`` float32 ``[B, action_dim]`` (pi0.5 does not read it).
    """

    images: NDArray[np.uint8]
    image_masks: NDArray[np.bool_]
    tokens: NDArray[np.int32]
    token_mask: NDArray[np.bool_]
    state: NDArray[np.float32]


def flow_times(num_steps: int) -> NDArray[np.float32]:
    """The times ``[num_steps]`` at which the velocity is taken: from 1 (noise) towards 0, added up in float32 as the reference does."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    step = np.float32(-1.0 / num_steps)
    times = [np.float32(1.0)]
    while len(times) < num_steps:
        times.append(times[-1] + step)
    return np.array(times, dtype=np.float32)


class FlowSampler:
    """Draws action chunks from one model with a fixed number of steps.

    In eager mode a camera that no row of the batch has is not encoded, which is exact because masked cameras take no positions and no attention.
    Compiled, all cameras always are: a camera that comes or goes must not trigger a compilation.

    Args:
        num_steps: Euler steps per chunk.
        compile_mode: None for eager, else one of :data:`COMPILE_MODES`. The first call per batch size, prompt length and horizon compiles.

    Raises:
        ValueError: ``num_steps`` or ``compile_mode`` is not valid.
    """

    def __init__(self, model: Pi0Model, *, num_steps: int = 10, compile_mode: str | None = None) -> None:
        if compile_mode is not None and compile_mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode is {compile_mode!r}, expected None or one of {', '.join(COMPILE_MODES)}")
        self._model = model
        with torch.inference_mode():
            conditions = model.condition(torch.from_numpy(flow_times(num_steps)))
        self._conditions = conditions if compile_mode is not None else [condition.unbound() for condition in conditions]
        self._step_size = -1.0 / num_steps
        self._compiled = compile_mode is not None
        self._encode = _compile(model.encode, compile_mode)
        self._step = _compile(self._euler_step, compile_mode)

    @torch.inference_mode()
    def sample(self, inputs: ModelInput, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Integrates ``noise`` float32 ``[B, horizon, action_dim]`` to normalised actions of the same shape; returns when they are on the host.

        Raises:
            ValueError: an array has the wrong shape or dtype, or a token id is not in the vocabulary.
        """
        self._check(inputs, noise)
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the last call's cache may be overwritten
        context = self._encode(*self._on_device(inputs), noise.shape[1])
        x = self._to_device(noise)
        for condition in self._conditions:
            x = self._step(x, context, condition)
        actions: NDArray[np.float32] = x.cpu().numpy()
        return actions

    def _euler_step(self, x_t: Tensor, context: PrefixContext, condition: StepCondition) -> Tensor:
        return torch.add(x_t, self._model.velocity(x_t, context, condition), alpha=self._step_size)

    def _on_device(self, inputs: ModelInput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        images, masks = np.asarray(inputs.images), np.asarray(inputs.image_masks)
        present = masks.any(axis=0)
        if not self._compiled and present.any() and not present.all():
            images, masks = images[:, present], masks[:, present]
        tokens, token_mask, state = (self._to_device(array) for array in (inputs.tokens, inputs.token_mask, inputs.state))
        return self._to_device(images), self._to_device(masks), tokens, token_mask, state

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        # A reply's arrays may be read-only views of a network buffer, which torch refuses to wrap silently.
        return torch.tensor(np.asarray(array), device=self._model.device)

    def _check(self, inputs: ModelInput, noise: NDArray[np.float32]) -> None:
        dims = self._model.dims
        arrays = {name: np.asarray(value) for name, value in (*vars(inputs).items(), ("noise", noise))}
        sizes: dict[str, int | str] = {"B": "batch", "C": "cameras", "L": "length", "H": "horizon"}
        for name, dtype, axes in (
            ("image_masks", np.bool_, ("B", "C")),
            ("images", np.uint8, ("B", "C", IMAGE_SIZE, IMAGE_SIZE, 3)),
            ("tokens", np.int32, ("B", "L")),
            ("token_mask", np.bool_, ("B", "L")),
            ("state", np.float32, ("B", dims.action_dim)),
            ("noise", np.float32, ("B", "H", dims.action_dim)),
        ):
            found = arrays[name]
            if found.ndim == len(axes):  # the first array with an axis fixes its size
                sizes |= {axis: n for axis, n in zip(axes, found.shape, strict=True) if isinstance(axis, str) and isinstance(sizes[axis], str)}
            expected = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
            if found.dtype != dtype or list(found.shape) != expected:
                raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, expected {np.dtype(dtype)} [{', '.join(map(str, expected))}]")
        tokens = arrays["tokens"]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < dims.backbone.vocab_size:
            raise ValueError(
                f"tokens hold ids {tokens.min()} to {tokens.max()}, but the model's vocabulary has {dims.backbone.vocab_size}: "
                "is this the tokenizer the model was trained with?"
            )


def _compile(function: _F, mode: str | None) -> _F:
    if mode is None:
        return function
    compiled: _F = torch.compile(  # type: ignore[call-overload]
        function, mode=mode, fullgraph=True, dynamic=False, recompile_limit=_COMPILED_SHAPES, isolate_recompiles=True
    )
    return compiled
