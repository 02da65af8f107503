"""One observation on its way into the model, and one chunk of actions on its way back, in openpi's order.

In: prompt → embodiment inputs → normalise the state → resize the images → tokenise. Out: unnormalise → absolute actions →
embodiment outputs (reference/embodiments.md §1). NumPy only; everything is float64 until the model takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from action.configs import PolicyConfig
from action.embodiments.base import Array
from action.embodiments.delta import absolute_actions
from pi0.cameras import MODEL_CAMERAS
from pi0.errors import CheckpointError, ObservationError
from pi0.images import resize_with_pad
from pi0.norm_stats import Stats, normalize, unnormalize
from pi0.param_tree import IMAGE_SIZE
from pi0.prompt import SEND_OR_SET_DEFAULT, prompt_text
from pi0.tokenizer import OnLongPrompt, PromptTokenizer, TokenizedPrompt

PROMPT_BUCKETS = (16, 48, 112, 200)
"""Text lengths that a compiled model is run at. A prompt is padded to the first that holds it, not always to the longest: padded tokens are
masked and positions count valid tokens, so the result is the same and the prefix shorter."""


@dataclass(frozen=True)
class PreparedObservation:
    """What one observation gives the model.

    Attributes:
        images: ``[3, 224, 224, 3]`` uint8, in the order of ``MODEL_CAMERAS``.
        image_masks: ``[3]`` bool; False where the robot has no such camera.
        prompt: the tokens, not padded.
        model_state: ``[A]`` float32, normalised and padded with zeros to the model's width; a wider state, which only pi0.5 takes, is cut.
        state: ``[d]`` float64, as the embodiment gave it; relative actions count from here.
    """

    images: NDArray[np.uint8]
    image_masks: NDArray[np.bool_]
    prompt: TokenizedPrompt
    model_state: NDArray[np.float32]
    state: Array


class Processor:
    """The transforms of one config with one checkpoint's norm stats.

    Args:
        action_dim: ``A``, the width of the model's state and actions.
        default_prompt: goes before the config's own; None leaves that in force.

    Raises:
        CheckpointError: the norm stats or the model do not fit the robot.
    """

    def __init__(
        self,
        config: PolicyConfig,
        tokenizer: PromptTokenizer,
        norm_stats: Mapping[str, Stats],
        action_dim: int,
        *,
        default_prompt: str | None = None,
        on_long_prompt: OnLongPrompt = "error",
    ) -> None:
        _check_widths(config, norm_stats, action_dim)
        self._config = config
        self.tokenizer = tokenizer
        self._state_stats, self._action_stats = norm_stats["state"], norm_stats["actions"]
        self._action_dim = action_dim
        self._on_long_prompt: OnLongPrompt = on_long_prompt
        self.default_prompt = config.default_prompt if default_prompt is None else default_prompt
        self.buckets = self._prompt_buckets()

    def prepare(self, observation: object) -> PreparedObservation:
        """The model's view of a raw observation, which is not modified.

        Raises:
            ObservationError: a key is missing or wrong; the message names it. ``PromptTooLongError`` if the prompt does not fit.
        """
        if not isinstance(observation, Mapping):
            raise ObservationError(f"the observation is a {type(observation).__name__}, expected a map of keys to values")
        prompt = prompt_text(observation, self.default_prompt, remedy=SEND_OR_SET_DEFAULT)
        inputs = self._config.embodiment.inputs(observation)
        normalized = normalize(inputs.state, self._state_stats, quantiles=self._config.use_quantiles)
        images = np.zeros((len(MODEL_CAMERAS), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for slot, camera in enumerate(MODEL_CAMERAS):
            if camera in inputs.images:
                images[slot] = resize_with_pad(inputs.images[camera], IMAGE_SIZE, IMAGE_SIZE)
        return PreparedObservation(
            images=images,
            image_masks=np.array([camera in inputs.images for camera in MODEL_CAMERAS]),
            prompt=self._tokenize(prompt, normalized, self._on_long_prompt),
            model_state=self._pad(normalized),
            state=inputs.state,
        )

    def robot_actions(self, model_actions: NDArray[np.floating[Any]], state: Array) -> Array:
        """The model's chunk ``[H, A]`` → the robot's ``[H, d]`` float64; ``state`` is that of the observation it answers."""
        actions = unnormalize(model_actions.astype(np.float64), self._action_stats, quantiles=self._config.use_quantiles)
        if self._config.delta_mask is not None:
            actions = absolute_actions(actions, state, self._config.delta_mask)
        return np.ascontiguousarray(self._config.embodiment.outputs(actions), np.float64)

    def bucket(self, length: int) -> int:
        """The shortest bucket that holds a prompt of ``length`` tokens."""
        return next(bucket for bucket in self.buckets if bucket >= length)

    def _prompt_buckets(self) -> tuple[int, ...]:
        """Buckets that this config's prompts can land in: none longer than the model was trained with, none shorter than an empty prompt."""
        longest = self._config.max_token_len
        shortest = len(self._tokenize("", np.full(self._config.embodiment.state_dim, -1.0), "truncate").ids)
        return (*(bucket for bucket in PROMPT_BUCKETS if shortest <= bucket < longest), longest)

    def _tokenize(self, prompt: str, normalized_state: Array, on_long_prompt: OnLongPrompt) -> TokenizedPrompt:
        state = normalized_state if self._config.discrete_state_input else None
        return self.tokenizer.action_prompt(prompt, self._config.max_token_len, state=state, on_long_prompt=on_long_prompt)

    def _pad(self, normalized: Array) -> NDArray[np.float32]:
        padded = np.zeros(self._action_dim, np.float32)
        with np.errstate(over="ignore"):
            padded[: len(normalized)] = normalized[: self._action_dim]
        finite = np.isfinite(padded)
        if not finite.all():
            index = int(np.argmin(finite))
            raise ObservationError(f"state: the value at index {index} is {normalized[index]:.4g} after normalisation, too large for the model")
        return padded


def _check_widths(config: PolicyConfig, norm_stats: Mapping[str, Stats], action_dim: int) -> None:
    """The robot fits in the model, and the norm stats fit both: at least the robot's width, and for actions at most the model's."""
    robot, where = config.embodiment, f"norm stats of asset {config.asset_id!r}"
    for key, robot_dim in (("state", robot.state_dim), ("actions", robot.action_dim)):
        # pi0.5 reads the state in its prompt only, where any width will do.
        if robot_dim > action_dim and (key, config.kind) != ("state", "pi05"):
            raise CheckpointError(
                f"config {config.name!r} needs {robot_dim} {key} columns for {robot.name}, but the checkpoint's model has {action_dim}"
            )
        if key not in norm_stats:
            raise CheckpointError(f"{where} have no {key!r} (found: {', '.join(sorted(norm_stats)) or 'nothing'}); state and actions are needed")
        width = len(norm_stats[key].mean)
        if width < robot_dim or (key == "actions" and width > action_dim):
            raise CheckpointError(f"{where} have {width} columns for {key!r}, expected {robot_dim} ({robot.name}) to {action_dim} (the model)")
