"""What the demo's models are trained on, as arrays: drawn tables, their pictures, tokens and actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from demo.expert import plan, targets
from demo.instructions import SUBTASKS
from demo.render import SIZE, render
from demo.sampling import Samples, for_action, for_planner
from demo.training.start import SCALE
from demo.world import ABSENT, BINS, COLOURS, Scenes
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT
from pi0.tokenizer import EOS_ID, PAD_ID, PromptTokenizer

PLACES: Final = 6
"""Where a block may be: one of three bins, the table, the gripper, nowhere."""
QUERIES: Final = len(COLOURS) + 1 + len(BINS)
"""What the vision tower is taught to tell: of each colour's block, of the gripper, of each bin's rim."""

PROMPT_SLOTS: Final = 40
ANSWER_SLOTS: Final = 7
ACTION_SLOTS: Final = 24
LONG_ACTION_SLOTS: Final = 64


def pictures(scenes: Scenes) -> NDArray[np.uint8]:
    """``[B, 56, 56, 3]``, what the models are trained on."""
    return render(scenes, SIZE // SCALE)


def readout_targets(scenes: Scenes) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Points ``[B, QUERIES, 2]`` (NaN: none) and classes ``[B, QUERIES]`` (-1: none)."""
    count = len(scenes)
    points = np.full((count, QUERIES, 2), np.nan, np.float32)
    blocks = slice(len(COLOURS))
    points[:, blocks] = np.where(scenes.present[..., None], scenes.position, np.nan)
    points[:, len(COLOURS)] = scenes.gripper
    classes = np.concatenate([scenes.place, scenes.closed[:, None], scenes.rims], axis=1).astype(np.int32)
    return points, classes


@dataclass(frozen=True)
class PlannerRows:
    """Pictures, prompts and answers; as :class:`planner.training.SubtaskBatch`, with where each named block is."""

    images: NDArray[np.uint8]
    prompt: NDArray[np.int32]
    answer: NDArray[np.int32]
    probed: NDArray[np.int32]


@dataclass(frozen=True)
class ActionRows:
    """Pictures, prompts and the expert's chunks ``[B, 12, 3]``; ``tokens`` and ``token_mask`` ``[B, L]``.

    What the prompts say, for :class:`action.training.PromptFacts`: where the blocks are that their colours name, ``points`` ``[B, L, 2]``
    (NaN: none) and ``places`` ``[B, L]`` (-1: none); where the gripper is to go, ``target`` ``[B, 2]``; whether nothing is left to do,
    ``finished`` ``[B]``.
    """

    images: NDArray[np.uint8]
    tokens: NDArray[np.int32]
    token_mask: NDArray[np.bool_]
    actions: NDArray[np.float32]
    points: NDArray[np.float32]
    places: NDArray[np.int64]
    target: NDArray[np.float32]
    finished: NDArray[np.bool_]


class Batches:
    """Draws training batches from one random stream."""

    def __init__(self, tokenizer: PromptTokenizer, rng: np.random.Generator) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._answers = np.stack([_padded([*tokenizer.encode(text), EOS_ID], ANSWER_SLOTS) for text in SUBTASKS])
        self._colour_of = np.full(tokenizer.vocab_size, -1, np.int32)
        for number, colour in enumerate(COLOURS):
            (token,) = tokenizer.encode(f" {colour}")
            self._colour_of[token] = number

    def readout(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
        """Pictures with their points and classes, half of them tables as the planner meets them, half as the action policy does."""
        halves = for_planner(self._rng, count // 2).scenes, for_action(self._rng, count - count // 2).scenes
        points, classes = (np.concatenate(parts) for parts in zip(*map(readout_targets, halves), strict=True))
        return np.concatenate([pictures(half) for half in halves]), points, classes

    def planner(self, count: int) -> PlannerRows:
        """Instructions with the next subtask as the answer."""
        samples = for_planner(self._rng, count)
        ids = [self._tokenizer.planner_prompt(text, DEFAULT_GENERATION_PROMPT_FORMAT).ids for text in samples.instructions]
        prompt = np.stack([_padded(row, PROMPT_SLOTS) for row in ids])
        _, places = self._named(samples.scenes, prompt)
        return PlannerRows(pictures(samples.scenes), prompt, self._answers[samples.subtasks], places.astype(np.int32))

    def action(self, count: int, *, with_task: bool) -> ActionRows:
        """Subtasks with the expert's chunks; ``with_task``, in the server's default prompt form, else bare."""
        samples = for_action(self._rng, count)
        texts = [SUBTASKS[subtask] for subtask in samples.subtasks]
        if with_task:
            texts = [DEFAULT_ACTION_PROMPT_TEMPLATE.format(task=task, subtask=text) for task, text in zip(samples.instructions, texts, strict=True)]
        return self._action_rows(samples, texts, LONG_ACTION_SLOTS if with_task else ACTION_SLOTS)

    def flat(self, count: int) -> ActionRows:
        """Long instructions with the chunk of the subtask that is due; hold still when all is done."""
        samples = for_planner(self._rng, count)
        return self._action_rows(samples, samples.instructions, LONG_ACTION_SLOTS)

    def _action_rows(self, samples: Samples, texts: list[str], slots: int) -> ActionRows:
        scenes = samples.scenes
        prompts = [self._tokenizer.action_prompt(text, slots, state=state).padded(slots) for text, state in zip(texts, scenes.state, strict=True)]
        tokens, masks = (np.stack(rows) for rows in zip(*prompts, strict=True))
        target, finished = targets(scenes, samples.subtasks)
        actions = plan(scenes, samples.subtasks).astype(np.float32)
        return ActionRows(pictures(scenes), tokens, masks, actions, *self._named(scenes, tokens), target.astype(np.float32), finished)

    def _named(self, scenes: Scenes, tokens: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of the block that each token names, where it is ``[B, L, 2]`` (NaN: nowhere, or it names none) and its place ``[B, L]`` (-1: none)."""
        colour = self._colour_of[tokens]
        rows, column = np.arange(len(tokens))[:, None], np.maximum(colour, 0)
        place = np.where(colour >= 0, scenes.place[rows, column], -1).astype(np.int64)
        there = (colour >= 0) & (place != ABSENT)
        return np.where(there[..., None], scenes.position[rows, column], np.nan).astype(np.float32), place


def _padded(ids: Any, slots: int) -> NDArray[np.int32]:
    if len(ids) > slots:
        raise ValueError(f"{len(ids)} tokens do not fit in {slots}")
    row = np.full(slots, PAD_ID, np.int32)
    row[: len(ids)] = ids
    return row
