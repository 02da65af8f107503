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
from pi0.errors import ConfigError, ObservationError, PlannerError
from pi0.locations import default_data_home, resolve
from pi0.param_tree import IMAGE_SIZE
from pi0.prompt import (
    DEFAULT_DRAFTS,
    DEFAULT_GENERATION_PROMPT_FORMAT,
    DEFAULT_MAX_GENERATION_TOKENS,
    MAX_DRAFTS,
    MAX_GENERATION_TOKENS,
    prompt_text,
)
from pi0.tokenizer import EOS_ID, AllowedTokens, OnLongPrompt, PromptTokenizer, TokenizedPrompt, find_tokenizer
from planner.closed_list import ClosedList, closed_list, score, walk
from planner.decoder import Decoded, Decoder, Prefix, TreeReader, TreeReading, text_slots
from planner.drafts import NODES_PER_DRAFT, DraftTable, TokenTree, clauses
from planner.observation import MissingCameras, prepare_cameras
from planner.restore import restore

logger = logging.getLogger(__name__)

PlannerDtype = Literal["float32", "bfloat16"]

DecodeMode = Literal["free", "trie", "score"]

LIST_NODES = 256
"""Tokens that the closed lists of requests may have, common beginnings counted once: as many as one camera has."""

MAX_BATCH = 8
"""Rows of the largest program; a larger batch runs as several. Batches are filled up to the next power of two."""


@dataclass(frozen=True)
class Subtask:
    """What the planner says to do next.

    Attributes:
        text: the subtask as decoded, not stripped; empty when the model ended at once.
        token_ids: the generated tokens, with the end of text (1) when the model reached it.
        logprob: log-probability of all ``token_ids`` under greedy decoding's distribution, the softmax over the allowed tokens.
        margin: the smallest distance between the best and the second-best logit at any of them: how close the answer was to another one.
        decode_steps: forward passes of one token that this row needed: ``len(token_ids)`` less one, as the prefix pass gives the first token and
            none follows the last, and less the drafted tokens that were right.
        drafted_tokens: guessed tokens that the prefix pass checked (:mod:`planner.drafts`).
        accepted_tokens: those that were right.
        scores: with ``decode="score"``, the log-probability of every entry of the list, in its order; else None.
        ms: wall time from the call until the tokens were on the host, in milliseconds; for a batch that of the whole batch.
        prompt_truncated: the prompt did not fit and was cut (``on_long_prompt="truncate"``).
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    margin: float
    decode_steps: int
    drafted_tokens: int
    accepted_tokens: int
    ms: float
    prompt_truncated: bool
    scores: Mapping[str, float] | None = None

    @property
    def probability(self) -> float | None:
        """With ``scores``: how likely it is among the entries of the list."""
        if self.scores is None:
            return None
        weights = np.exp(np.array(list(self.scores.values())) - self.logprob)
        return float(1 / weights.sum())

    @property
    def confidence(self) -> float:
        """How sure the planner is, 0 to 1: ``probability`` where there is one, else the geometric mean of its tokens' probabilities."""
        return float(np.exp(self.mean_logprob)) if self.probability is None else self.probability

    @property
    def mean_logprob(self) -> float:
        """``logprob`` per token."""
        return self.logprob / len(self.token_ids)

    @property
    def forward_passes(self) -> int:
        """The prefix pass and the decode steps."""
        return 1 + self.decode_steps


@dataclass(frozen=True)
class _Row:
    """One row of a program call, and what is guessed of it."""

    prompt: TokenizedPrompt
    cameras: Sequence[NDArray[np.float32]]
    tree: TokenTree
    entries: ClosedList | None = None


class SubtaskGenerator:
    """A loaded planner. Make one with :meth:`load`. One thread at a time calls it; its owner is the slot's worker."""

    def __init__(
        self,
        decoder: Decoder | TreeReader,
        tokenizer: PromptTokenizer,
        *,
        max_generation_tokens: int,
        generation_prompt_format: str,
        missing_cameras: MissingCameras,
        on_long_prompt: OnLongPrompt,
        drafts: int = 0,
        cameras: int | None = None,
        decode: DecodeMode = "free",
        entries: ClosedList | None = None,
    ) -> None:
        self._decoder = decoder
        self._drafts = drafts
        self._decode_mode: DecodeMode = decode
        self._entries = entries
        self._max_cameras = len(MODEL_CAMERAS) if cameras is None else cameras
        self._said = DraftTable()
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
        drafts: int = DEFAULT_DRAFTS,
        cameras: int | None = None,
        compilation_cache: str | Path | None = None,
        decode: DecodeMode = "free",
        subtasks: Sequence[str] | None = None,
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
            drafts: how many guesses of the answer the prefix pass checks, 0 to 8. They change what an answer costs, never the answer.
            cameras: the most that an observation has, 1 to 3; None: 3. Fewer are fewer programs to compile. Not with ``"grey"``, which shows all.
            compilation_cache: a directory that keeps compiled programs for the next process, of this whole process (JAX has one for all); None
                leaves JAX's own setting.
            decode: ``"free"``; or an answer from a closed list (:mod:`planner.closed_list`): ``"trie"``, as greedy decoding within it, or
                ``"score"``, its likeliest entry. Neither takes a decode step.
            subtasks: that list; None: each call brings its own.

        Raises:
            CheckpointError: the checkpoint or tokenizer is missing, damaged, incomplete or of another model.
            ConfigError: an argument is not one of those above.
        """
        _one_of("allowed_tokens", allowed_tokens, get_args(AllowedTokens))
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        dtype_name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        if isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 <= drafts <= MAX_DRAFTS:
            raise ConfigError(f"drafts: got {drafts!r}, expected a whole number from 0 to {MAX_DRAFTS}")
        if cameras is not None and (isinstance(cameras, bool) or cameras not in range(1, len(MODEL_CAMERAS) + 1)):
            raise ConfigError(f"cameras: got {cameras!r}, expected a whole number from 1 to {len(MODEL_CAMERAS)}, or none")
        if cameras is not None and missing_cameras == "grey":
            raise ConfigError(
                "cameras: cannot be set together with missing_cameras 'grey', which shows the model all of them; leave one of the two out"
            )
        if compilation_cache is not None:
            keep_compiled(Path(compilation_cache))
        weights_dtype = jnp.dtype(_one_of("dtype", dtype_name, get_args(PlannerDtype)))
        root = resolve(checkpoint_dir, data_home=default_data_home())
        pieces = PromptTokenizer(find_tokenizer(tokenizer, root))
        params, dims = restore(root, pieces.allowed_tokens(allowed_tokens), weights_dtype, tokens=pieces.vocab_size)
        _one_of("decode", decode, get_args(DecodeMode))
        if decode == "free" and subtasks is not None:
            raise ConfigError("subtasks: a list is only used with decode 'trie' or 'score'; set one of them, or leave the list out")
        entries = None if subtasks is None else closed_list(subtasks, pieces.encode, np.asarray(params.head_ids))
        nodes = max(LIST_NODES, 0 if entries is None else len(entries.tree.tokens))
        decoder = (
            Decoder(params, dims, guesses=drafts * NODES_PER_DRAFT, cameras=cameras or len(MODEL_CAMERAS))
            if decode == "free"
            else TreeReader(params, dims, guesses=nodes)
        )
        return cls(
            decoder,
            pieces,
            max_generation_tokens=max_generation_tokens,
            generation_prompt_format=generation_prompt_format,
            missing_cameras=missing_cameras,
            on_long_prompt=on_long_prompt,
            drafts=drafts if decode == "free" else 0,
            cameras=cameras,
            decode=decode,
            entries=entries,
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
        cameras = range(1, self._max_cameras + 1) if self._missing_cameras == "mask" else [len(MODEL_CAMERAS)]
        largest = _program_batch(min(max_batch, MAX_BATCH))
        self._decoder.compile(itertools.product([2**power for power in range(largest.bit_length())], cameras, text_slots(self._decoder.guesses)))
        self._max_rows = largest
        # A first run pays for what compiling does not: memory pools, kernels that are loaded on first use.
        blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        listed = ["warm up"] if isinstance(self._decoder, TreeReader) and self._entries is None else None
        self.generate("warm up", dict.fromkeys(MODEL_CAMERAS[: self._max_cameras], blank), subtasks=listed)

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        """What the model reads of a finished prompt: ``{"text": str, "token_ids": list[int], "tokens": int, "max_tokens": int, "not_fitting": str}``.

        The task is already in it: no format is applied. Safe on any thread: the model is not touched.
        """
        return self._tokenizer.preview_planner_prompt(prompt)

    def generate(
        self,
        prompt: str,
        images: Mapping[str, Any],
        *,
        generation_prompt_format: str | None = None,
        max_generation_tokens: int | None = None,
        previous: str | None = None,
        subtasks: Sequence[str] | None = None,
    ) -> Subtask:
        """The next subtask of the task ``prompt``. As :meth:`generate_batch` with one row."""
        return self.generate_batch(
            [prompt],
            [images],
            generation_prompt_format=generation_prompt_format,
            max_generation_tokens=max_generation_tokens,
            previous=[previous],
            subtasks=[subtasks],
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Mapping[str, Any]],
        *,
        generation_prompt_format: str | None = None,
        max_generation_tokens: int | None = None,
        previous: Sequence[str | None] | None = None,
        subtasks: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Subtask]:
        """The next subtask of each row. Rows do not influence each other's tokens; each stops on its own.

        Args:
            prompts: ``[B]`` tasks in the user's words.
            images: ``[B]`` maps of camera name (any embodiment's) to image: HWC or CHW, uint8 or float in [0, 1] or [-1, 1].
            generation_prompt_format: instead of the loaded one, for this call.
            max_generation_tokens: instead of the loaded one, for this call; compiles nothing.
            previous: ``[B]`` what each row's robot was told last, where it is known: the first guess of what it will be told now.
            subtasks: ``[B]`` closed lists instead of the loaded one, of at most ``LIST_NODES`` tokens (or as many as the loaded one has).

        Raises:
            ObservationError: a row has no known camera, an image is not usable, or its list is not, or is missing; names the key.
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
        cameras = [self._prepared(row) for row in images]
        before = _one_each("previous subtasks", previous, len(prompts))
        lists = _one_each("lists of subtasks", subtasks, len(prompts))
        rows = [
            self._row(ids, images, prompt, told, entries, max_tokens)
            for ids, images, prompt, told, entries in zip(tokenized, cameras, prompts, before, lists, strict=True)
        ]
        decoded: list[dict[str, Any]] = []
        for first in range(0, len(rows), self._max_rows):
            decoded += self._decode(rows[first : first + self._max_rows], max_tokens)
        ms = (time.perf_counter() - started) * 1000
        subtasks = [Subtask(**result, ms=ms, prompt_truncated=row.prompt.truncated) for result, row in zip(decoded, rows, strict=True)]
        if self._drafts:
            for subtask, row, told in zip(subtasks, rows, before, strict=True):
                self._said.learn(row.prompt.ids.tobytes(), subtask.text, _without_end(subtask.token_ids), told)
        return subtasks

    def infer(
        self,
        obs: Mapping[str, Any],
        /,
        *,
        generation_prompt_format: str | None = None,
        max_generation_tokens: int | None = None,
        previous: str | None = None,
    ) -> dict[str, Any]:
        """``{"subtask": {text, ms, decode_steps, logprob, …}}`` for a raw client observation, with what :class:`Subtask` tells besides; plus
        ``prompt_truncated`` when it was.

        Raises:
            ObservationError: ``prompt`` is missing or not text; and as :meth:`generate_batch`.
        """
        return self.infer_batch(
            [obs], generation_prompt_format=generation_prompt_format, max_generation_tokens=max_generation_tokens, previous=[previous]
        )[0]

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        /,
        *,
        generation_prompt_format: str | None = None,
        max_generation_tokens: int | None = None,
        previous: Sequence[str | None] | None = None,
    ) -> list[dict[str, Any]]:
        """What :meth:`infer` gives for each observation; ``ms`` is the time of all of them. One bad observation fails the call."""
        subtasks = self.generate_batch(
            [prompt_text(obs) for obs in observations],
            [camera_images(obs) for obs in observations],
            generation_prompt_format=generation_prompt_format,
            max_generation_tokens=max_generation_tokens,
            previous=previous,
            subtasks=[_subtasks(obs) for obs in observations],
        )
        return [_reply(subtask) for subtask in subtasks]

    def _prepared(self, images: Mapping[str, Any]) -> list[NDArray[np.float32]]:
        prepared = prepare_cameras(images, self._missing_cameras)
        if len(prepared) > self._max_cameras:
            names = ", ".join(sorted(images))
            raise ObservationError(f"images: has {len(prepared)} cameras ({names}), but planner.cameras allows {self._max_cameras}; raise it")
        return prepared

    def _row(
        self,
        prompt: TokenizedPrompt,
        cameras: Sequence[NDArray[np.float32]],
        task: str,
        previous: str | None,
        subtasks: Sequence[str] | None,
        max_tokens: int,
    ) -> _Row:
        if isinstance(self._decoder, Decoder):
            if subtasks is not None:
                raise ObservationError("subtasks: the planner that is loaded decodes freely; leave them out, or set planner.decode to trie or score")
            return _Row(prompt, cameras, self._decoder.tree(self._guesses(prompt, task, previous), max_tokens))
        entries = self._entries
        if subtasks is not None:
            try:
                allowed = np.asarray(self._decoder.params.head_ids)
                entries = closed_list(subtasks, self._tokenizer.encode, allowed, most=self._decoder.guesses)
            except ConfigError as error:
                raise ObservationError(str(error)) from error
        if entries is None:
            raise ObservationError("subtasks: are missing; send the list that the answer is chosen from, or set planner.subtasks")
        return _Row(prompt, cameras, entries.tree, entries)

    def _guesses(self, prompt: TokenizedPrompt, task: str, previous: str | None) -> list[tuple[int, ...]]:
        """What the answer may be, the likeliest first, as many as are checked."""
        if not self._drafts:
            return []
        likely = self._said.suggest(prompt.ids.tobytes(), previous)
        if previous and not (likely and self._tokenizer.decode(likely[0]) == previous):
            likely.insert(0, tuple(self._tokenizer.encode(previous)))  # said before this process began, or by an operator
        if len(likely) < self._drafts:
            likely += [tuple(self._tokenizer.encode(text)) for text in clauses(task)]
        return list(dict.fromkeys(likely))[: self._drafts]

    def _decode(self, rows: Sequence[_Row], max_tokens: int) -> list[dict[str, Any]]:
        """What one program call tells of each of ``rows``: attributes of its :class:`Subtask`."""
        trees = [row.tree for row in rows]
        # Guesses take what the prompt leaves; a list must be there as a whole.
        room = [0 if row.entries is None else row.tree.used for row in rows]
        packed = pack([row.prompt for row in rows], [row.cameras for row in rows], text_slots(self._decoder.guesses), room)
        if isinstance(self._decoder, Decoder):
            answers = self._said_freely(rows, self._decoder(packed, max_tokens, trees))
        else:
            answers = self._chosen(rows, self._decoder(packed, trees))
        # Not a number is larger than any logit to argmax, so it would come out as some token, at worst as an empty subtask.
        if not all(np.isfinite(answer["logprob"]) for answer in answers):
            raise PlannerError("the planner's log-probabilities are NaN or infinite; check the checkpoint's weights")
        return answers

    def _said_freely(self, rows: Sequence[_Row], decoded: Decoded) -> list[dict[str, Any]]:
        ids = [tuple(int(token) for token in decoded.tokens[row, : decoded.length[row]]) for row in range(len(rows))]
        return [
            {
                "text": self._tokenizer.decode(ids[row]),
                "token_ids": ids[row],
                "logprob": float(decoded.logprob[row]),
                "margin": float(decoded.margin[row]),
                "decode_steps": int(decoded.decode_steps[row]),
                "drafted_tokens": int(decoded.drafted[row]),
                "accepted_tokens": int(decoded.accepted[row]),
            }
            for row in range(len(rows))
        ]

    def _chosen(self, rows: Sequence[_Row], reading: TreeReading) -> list[dict[str, Any]]:
        answers = []
        for number, row in enumerate(rows):
            assert row.entries is not None
            entries, nodes = row.entries, len(row.entries.tree.tokens)
            select = score if self._decode_mode == "score" else walk
            selection = select(entries, reading.own[number, :nodes], reading.end[number, : 1 + nodes])
            answers.append(
                {
                    "text": entries.texts[selection.entry],
                    "token_ids": (*entries.ids[selection.entry], EOS_ID),
                    "logprob": selection.logprob,
                    "margin": selection.margin,
                    "decode_steps": 0,
                    "drafted_tokens": 0,
                    "accepted_tokens": 0,
                    "scores": None if selection.table is None else dict(zip(entries.texts, selection.table, strict=True)),
                }
            )
        return answers


def _one_each(what: str, given: Sequence[Any] | None, count: int) -> Sequence[Any]:
    if given is not None and len(given) != count:
        raise ValueError(f"{count} prompts came with {len(given)} {what}; expected one per prompt")
    return [None] * count if given is None else given


def _subtasks(obs: Mapping[str, Any]) -> Sequence[str] | None:
    """The closed list that an observation brings."""
    listed = obs.get("subtasks")
    if isinstance(listed, np.ndarray):
        listed = listed.tolist()
    if listed is None:
        return None
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not all(isinstance(text, str) for text in listed):
        raise ObservationError(f"subtasks: got {type(listed).__name__}, expected a list of strings")
    return listed


def _without_end(ids: tuple[int, ...]) -> tuple[int, ...]:
    """An answer as a guess: that the text ends is what the model says at the last token, not a token to check."""
    return ids[:-1] if ids[-1] == EOS_ID else ids


def keep_compiled(directory: Path) -> None:
    """Has JAX keep every program that this process compiles in ``directory``, and take from it what an earlier process left there."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # By default it leaves out what compiles within a second: there are many such programs, and at a restart each of them counts.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _reply(subtask: Subtask) -> dict[str, Any]:
    told = ("text", "ms", "logprob", "mean_logprob", "margin", "confidence", "forward_passes", "decode_steps", "drafted_tokens", "accepted_tokens")
    reply: dict[str, Any] = {name: getattr(subtask, name) for name in told}
    if not np.isfinite(subtask.margin):
        reply["margin"] = None  # there was nothing else to say
    if subtask.scores is not None:
        reply |= {"probability": subtask.probability, "scores": dict(subtask.scores)}
    if subtask.prompt_truncated:
        reply["prompt_truncated"] = True
    return {"subtask": reply}


def pack(
    prompts: Sequence[TokenizedPrompt],
    cameras: Sequence[Sequence[NDArray[np.float32]]],
    slots: Sequence[int] = text_slots(0),
    room: Sequence[int] = (),
) -> Prefix:
    """Rows → the arrays of one program: the fewest text slots and cameras that hold all rows, a power of two of rows.

    Rows that fill up the batch repeat the last one, so they never make the loop run longer.

    Args:
        slots: how many text slots there may be, ascending.
        room: how many of them a row needs behind its prompt; none: 0.

    Raises:
        ValueError: a row needs more slots than there may be.
    """
    longest = max(len(prompt.ids) + behind for prompt, behind in zip(prompts, room or [0] * len(prompts), strict=True))
    fill = _program_batch(len(prompts)) - len(prompts)
    prompts, cameras = [*prompts, *[prompts[-1]] * fill], [*cameras, *[cameras[-1]] * fill]
    enough = next((count for count in slots if count >= longest), None)
    if enough is None:
        raise ValueError(f"a row needs {longest} text slots, expected at most {slots[-1]}")
    count = max(len(row) for row in cameras)
    # What a masked slot holds is never seen; black is what openpi puts there.
    images = np.full((len(cameras), count, IMAGE_SIZE, IMAGE_SIZE, 3), -1, np.float32)
    for row, present in enumerate(cameras):
        for slot, image in enumerate(present):
            images[row, slot] = image
    return Prefix(
        images=images,
        image_mask=np.array([[slot < len(row) for slot in range(count)] for row in cameras]),
        tokens=np.stack([prompt.padded(enough)[0] for prompt in prompts]),
        lengths=np.array([len(prompt.ids) for prompt in prompts], np.int32),
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
