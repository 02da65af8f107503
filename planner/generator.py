"""The subtask generator: (task, camera images) → the next short subtask, from a pi0.5 checkpoint."""

from __future__ import annotations

import itertools
import logging
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pi0.cameras import MODEL_CAMERAS, camera_images
from pi0.errors import ConfigError, PlannerError
from pi0.locations import default_data_home, resolve
from pi0.param_tree import IMAGE_SIZE
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT, DEFAULT_MAX_GENERATION_TOKENS, MAX_GENERATION_TOKENS, prompt_text
from pi0.tokenizer import PLANNER_MAX_TOKENS, AllowedTokens, OnLongPrompt, PromptTokenizer, TokenizedPrompt, find_tokenizer
from planner.decoder import Decoder, Prefix
from planner.observation import MissingCameras, prepare_cameras
from planner.restore import restore

logger = logging.getLogger(__name__)

PlannerDtype = Literal["float32", "bfloat16"]

PROMPT_BUCKETS = (48, PLANNER_MAX_TOKENS)
"""Prompt slots that programs are compiled for. Nearly every task fits the small one; more sizes would only add compile time,
since the step from 48 to 32 slots saves 2 % of the prefix."""

MAX_BATCH = 8
"""Rows of the largest program; a larger batch runs as several. Batches are filled up to the next power of two."""


@dataclass(frozen=True)
class Subtask:
    """What the planner says to do next.

    Attributes:
        text: the subtask as decoded, not stripped; empty when the model ended at once.
        token_ids: the generated tokens, with the end of text (1) when the model reached it.
        logprob: log-probability of all ``token_ids`` under greedy decoding's distribution, the softmax over the allowed tokens.
        decode_steps: forward passes of one token that this row needed: ``len(token_ids) - 1``, as the first token comes from
            the prefix pass and none follows the last.
        ms: wall time from the call until the tokens were on the host, in milliseconds; for a batch that of the whole batch.
        prompt_truncated: the prompt did not fit and was cut (``on_long_prompt="truncate"``).
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    decode_steps: int
    ms: float
    prompt_truncated: bool


class SubtaskGenerator:
    """A loaded planner. Make one with :meth:`load`. One thread at a time calls it; its owner is the slot's worker."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PromptTokenizer,
        *,
        max_generation_tokens: int,
        generation_prompt_format: str,
        missing_cameras: MissingCameras,
        on_long_prompt: OnLongPrompt,
    ) -> None:
        self._decoder = decoder
        self._max_rows = MAX_BATCH
        self._tokenizer = tokenizer
        self._max_generation_tokens = _checked_max_tokens(max_generation_tokens)
        self._generation_prompt_format = _checked_format(generation_prompt_format)
        self._missing_cameras: MissingCameras = _one_of("missing_cameras", missing_cameras, get_args(MissingCameras))
        self._on_long_prompt: OnLongPrompt = _one_of("on_long_prompt", on_long_prompt, get_args(OnLongPrompt))

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: PlannerDtype | jnp.dtype | type | None = None,
        max_generation_tokens: int = DEFAULT_MAX_GENERATION_TOKENS,
        generation_prompt_format: str = DEFAULT_GENERATION_PROMPT_FORMAT,
        allowed_tokens: AllowedTokens = "text",
        missing_cameras: MissingCameras = "mask",
        on_long_prompt: OnLongPrompt = "error",
    ) -> SubtaskGenerator:
        """Restores the planner's part of an openpi JAX checkpoint. Nothing is compiled yet; see :meth:`warmup`.

        Args:
            checkpoint_dir: the checkpoint's root or its ``params/``, local or ``gs://``, ``s3://``, ``hf://``.
            tokenizer: a SentencePiece model; without it ``paligemma_tokenizer.model`` beside the checkpoint, else the cached download.
            dtype: of weights and computation, a name or a numpy or jax dtype; without it bfloat16 on an accelerator and float32 on a CPU.
            max_generation_tokens: most tokens of a subtask, end of text included, 1 to 256.
            generation_prompt_format: the prompt, with ``{task}`` where the task goes.
            allowed_tokens: what may be generated: ``"text"``, or openpi-flash's ``"printable_ascii"`` (reference/model.md §13.4).
            missing_cameras: ``"mask"`` hides absent cameras from the model; ``"grey"`` shows grey images, as openpi-flash does.
            on_long_prompt: ``"error"``, or ``"truncate"`` to cut a prompt of more than 200 tokens on the right.

        Raises:
            CheckpointError: the checkpoint or tokenizer is missing, damaged, incomplete or of another model.
            ConfigError: an argument is not one of those above.
        """
        _one_of("allowed_tokens", allowed_tokens, get_args(AllowedTokens))
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        dtype_name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        weights_dtype = jnp.dtype(_one_of("dtype", dtype_name, get_args(PlannerDtype)))
        root = resolve(checkpoint_dir, data_home=default_data_home())
        pieces = PromptTokenizer(find_tokenizer(tokenizer, root))
        params, dims = restore(root, pieces.allowed_tokens(allowed_tokens), weights_dtype, tokens=pieces.vocab_size)
        return cls(
            Decoder(params, dims),
            pieces,
            max_generation_tokens=max_generation_tokens,
            generation_prompt_format=generation_prompt_format,
            missing_cameras=missing_cameras,
            on_long_prompt=on_long_prompt,
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told on connecting: nothing, as with openpi-flash's planner."""
        return {}

    def warmup(self, *, max_batch: int = 1) -> None:
        """Compiles every program that batches of up to ``max_batch`` (at most 8) can need, so that none is compiled in service.

        Larger batches run as several from then on.

        Raises:
            ValueError: ``max_batch`` is less than 1.
        """
        cameras = range(1, len(MODEL_CAMERAS) + 1) if self._missing_cameras == "mask" else [len(MODEL_CAMERAS)]
        largest = _program_batch(min(max_batch, MAX_BATCH))
        self._decoder.compile(itertools.product([2**power for power in range(largest.bit_length())], cameras, PROMPT_BUCKETS))
        self._max_rows = largest
        # A first run pays for what compiling does not: memory pools, kernels that are loaded on first use.
        blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.generate("warm up", dict.fromkeys(MODEL_CAMERAS, blank))

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        """What the model reads of a finished prompt: ``{"text": str, "token_ids": list[int], "tokens": int, "max_tokens": int, "not_fitting": str}``.

        The task is already in it: no format is applied. Safe on any thread: the model is not touched.
        """
        return self._tokenizer.preview_planner_prompt(prompt)

    def generate(
        self, prompt: str, images: Mapping[str, Any], *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> Subtask:
        """The next subtask of the task ``prompt``. As :meth:`generate_batch` with one row."""
        return self.generate_batch(
            [prompt], [images], generation_prompt_format=generation_prompt_format, max_generation_tokens=max_generation_tokens
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Mapping[str, Any]],
        *,
        generation_prompt_format: str | None = None,
        max_generation_tokens: int | None = None,
    ) -> list[Subtask]:
        """The next subtask of each row. Rows do not influence each other's tokens; each stops on its own.

        Args:
            prompts: ``[B]`` tasks in the user's words.
            images: ``[B]`` maps of camera name (any embodiment's) to image: HWC or CHW, uint8 or float in [0, 1] or [-1, 1].
            generation_prompt_format: instead of the loaded one, for this call.
            max_generation_tokens: instead of the loaded one, for this call; compiles nothing.

        Raises:
            ObservationError: a row has no known camera, or an image is not usable; names the key.
            PromptTooLongError: a prompt does not fit; says how many tokens do.
            ConfigError: an override is out of range.
            PlannerError: the model gave values that are not finite.
        """
        started = time.perf_counter()
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts came with {len(images)} maps of images; expected one map per prompt")
        prompt_format = self._generation_prompt_format if generation_prompt_format is None else _checked_format(generation_prompt_format)
        max_tokens = self._max_generation_tokens if max_generation_tokens is None else _checked_max_tokens(max_generation_tokens)
        tokenized = [self._tokenizer.planner_prompt(prompt, prompt_format, on_long_prompt=self._on_long_prompt) for prompt in prompts]
        cameras = [prepare_cameras(row, self._missing_cameras) for row in images]
        rows: list[tuple[tuple[int, ...], float, int]] = []
        for first in range(0, len(prompts), self._max_rows):
            chunk = slice(first, first + self._max_rows)
            rows += self._decode(tokenized[chunk], cameras[chunk], max_tokens)
        ms = (time.perf_counter() - started) * 1000
        return [
            Subtask(self._tokenizer.decode(ids), ids, logprob, steps, ms, prompt.truncated)
            for (ids, logprob, steps), prompt in zip(rows, tokenized, strict=True)
        ]

    def infer(
        self, obs: Mapping[str, Any], /, *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> dict[str, Any]:
        """``{"subtask": {text, ms, decode_steps, logprob}}`` for a raw client observation; plus ``prompt_truncated`` when it was.

        Raises:
            ObservationError: ``prompt`` is missing or not text; and as :meth:`generate_batch`.
        """
        return self.infer_batch([obs], generation_prompt_format=generation_prompt_format, max_generation_tokens=max_generation_tokens)[0]

    def infer_batch(
        self, observations: Sequence[Mapping[str, Any]], /, *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> list[dict[str, Any]]:
        """What :meth:`infer` gives for each observation; ``ms`` is the time of all of them. One bad observation fails the call."""
        subtasks = self.generate_batch(
            [prompt_text(obs) for obs in observations],
            [camera_images(obs) for obs in observations],
            generation_prompt_format=generation_prompt_format,
            max_generation_tokens=max_generation_tokens,
        )
        return [_reply(subtask) for subtask in subtasks]

    def _decode(
        self, prompts: Sequence[TokenizedPrompt], cameras: Sequence[Sequence[NDArray[np.float32]]], max_tokens: int
    ) -> list[tuple[tuple[int, ...], float, int]]:
        """(token ids, log-probability, decode steps) of each row of one program call."""
        decoded = self._decoder(pack(prompts, cameras), max_tokens)
        # Not a number is larger than any logit to argmax, so it would come out as some token, at worst as an empty subtask.
        if not np.isfinite(decoded.logprob).all():
            raise PlannerError("the planner's log-probabilities are NaN or infinite; check the checkpoint's weights")
        return [
            (tuple(int(token) for token in decoded.tokens[row, : steps + 1]), float(decoded.logprob[row]), steps)
            for row, steps in enumerate(int(count) for count in decoded.decode_steps[: len(prompts)])
        ]


def _reply(subtask: Subtask) -> dict[str, Any]:
    reply: dict[str, Any] = {"text": subtask.text, "ms": subtask.ms, "decode_steps": subtask.decode_steps, "logprob": subtask.logprob}
    if subtask.prompt_truncated:
        reply["prompt_truncated"] = True
    return {"subtask": reply}


def pack(prompts: Sequence[TokenizedPrompt], cameras: Sequence[Sequence[NDArray[np.float32]]]) -> Prefix:
    """Rows → the arrays of one program: the smallest prompt bucket and camera count that hold all rows, a power of two of rows.

    Rows that fill up the batch repeat the last one, so they never make the loop run longer.
    """
    fill = _program_batch(len(prompts)) - len(prompts)
    prompts, cameras = [*prompts, *[prompts[-1]] * fill], [*cameras, *[cameras[-1]] * fill]
    longest = max(len(prompt.ids) for prompt in prompts)
    slots = next(bucket for bucket in PROMPT_BUCKETS if bucket >= longest)
    padded = [prompt.padded(slots) for prompt in prompts]
    count = max(len(row) for row in cameras)
    # What a masked slot holds is never seen; black is what openpi puts there.
    images = np.full((len(cameras), count, IMAGE_SIZE, IMAGE_SIZE, 3), -1, np.float32)
    for row, present in enumerate(cameras):
        for slot, image in enumerate(present):
            images[row, slot] = image
    return Prefix(
        images=images,
        image_mask=np.array([[slot < len(row) for slot in range(count)] for row in cameras]),
        tokens=np.stack([ids for ids, _ in padded]),
        token_mask=np.stack([mask for _, mask in padded]),
    )


def _program_batch(rows: int) -> int:
    """Rows of the program that runs a batch of ``rows``."""
    if not 1 <= rows <= MAX_BATCH:
        raise ValueError(f"a batch has {rows} rows, expected 1 to {MAX_BATCH}")
    return 1 << (rows - 1).bit_length()


def _checked_max_tokens(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_GENERATION_TOKENS:
        raise ConfigError(f"max_generation_tokens: got {value!r}, expected a whole number from 1 to {MAX_GENERATION_TOKENS}")
    return value


def _checked_format(value: str) -> str:
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ConfigError(f"generation_prompt_format: {value!r} is not a template ({error}); write {{{{ or }}}} for a literal brace") from error
    if not fields or any(field != ("task", "", None) for field in fields):
        raise ConfigError(f"generation_prompt_format: {value!r} must contain {{task}} and no other field; write {{{{ or }}}} for a literal brace")
    return value


def _one_of(name: str, value: str, options: Sequence[str]) -> Any:
    if value not in options:
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(options)}")
    return value
