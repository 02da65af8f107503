"""Prompts as the pi0 family writes them, and their tokens (reference/model.md §7, §13.2).

Three forms share one SentencePiece vocabulary: the pi0 prompt, the pi0.5 prompt with the robot's state as integers, and the
planner's prompt. A prompt that does not fit is an error by default, because a prompt cut on the right loses the very words
that tell the model what to do next; ``on_long_prompt="truncate"`` gives upstream's cut and says so in the result.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from pi0.errors import CheckpointError, PromptTooLongError

OnLongPrompt = Literal["error", "truncate"]
AllowedTokens = Literal["text", "printable_ascii"]

PAD_ID = 0
EOS_ID = 1
BOS_ID = 2
PLANNER_MAX_TOKENS = 200
"""Text tokens that a planner prompt may have (pi0.5's ``max_token_len``)."""

TOKENIZER_FILE = "paligemma_tokenizer.model"

_STATE_BINS = 256
_SPACE = "\u2581"  # SentencePiece's visible space
# Names of things that are not text: <loc0000>, <seg000>, <bos>, <unused0>, <0x0A>, <table>, </b>, <start_of_turn> …
_MARKUP_PIECE = re.compile(r"</?[A-Za-z0-9][^<>]*>|\[[A-Za-z@_][A-Za-z0-9_@]*\]")


@dataclass(frozen=True)
class TokenizedPrompt:
    """The tokens of one prompt, without padding.

    Attributes:
        ids: ``[length]`` int32; already cut when ``truncated``.
        needed: tokens that the whole prompt has.
        truncated: whether tokens were cut on the right to make it fit.
    """

    ids: NDArray[np.int32]
    needed: int
    truncated: bool

    def padded(self, length: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(ids, mask), each ``[length]``, padded on the right with id 0 and False."""
        count = len(self.ids)
        if count > length:
            raise ValueError(f"a prompt of {count} tokens does not fit in {length}")
        ids = np.zeros(length, np.int32)
        ids[:count] = self.ids
        return ids, np.arange(length) < count


class PromptTokenizer:
    """The PaliGemma SentencePiece vocabulary and the family's three prompt forms.

    Raises:
        CheckpointError: ``path`` is not a SentencePiece model, or its special ids are not PaliGemma's.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read as a SentencePiece model: {str(error).strip().splitlines()[0]}") from error
        special = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.bos_id())
        if special != (PAD_ID, EOS_ID, BOS_ID):
            raise CheckpointError(f"{path} has pad, eos, bos ids {special}, expected {(PAD_ID, EOS_ID, BOS_ID)}: it is not a PaliGemma tokenizer")
        self.vocab_size: int = self._pieces.vocab_size()

    def action_prompt(
        self, prompt: str, max_len: int, *, state: NDArray[np.floating[Any]] | None = None, on_long_prompt: OnLongPrompt = "error"
    ) -> TokenizedPrompt:
        """The prompt of an action policy: pi0's form, or pi0.5's when ``state`` (normalised, unpadded, ``[d]``) is given.

        Raises:
            PromptTooLongError: it needs more than ``max_len`` tokens and ``on_long_prompt`` is ``"error"``.
        """
        return _fit(self._encode(_action_texts(prompt, state)), max_len, on_long_prompt)

    def planner_prompt(
        self, task: str, prompt_format: str, max_len: int = PLANNER_MAX_TOKENS, *, on_long_prompt: OnLongPrompt = "error"
    ) -> TokenizedPrompt:
        """The planner's prompt: the cleaned task inserted at ``{task}`` of ``prompt_format`` (``{{`` and ``}}`` are literal braces).

        Raises:
            PromptTooLongError: it needs more than ``max_len`` tokens and ``on_long_prompt`` is ``"error"``.
        """
        return _fit(self._encode([prompt_format.format(task=clean_task(task))]), max_len, on_long_prompt)

    def preview_action_prompt(self, prompt: str, max_len: int, *, state: NDArray[np.floating[Any]] | None = None) -> dict[str, Any]:
        """What :meth:`action_prompt` makes of ``prompt``, for people.

        Returns:
            ``text``, what is tokenized; ``token_ids``, all of them, with the beginning of text; ``tokens``, their number; ``max_tokens``, how
            many fit; ``not_fitting``, the text of those that do not.
        """
        return self._preview(_action_texts(prompt, state), max_len)

    def preview_planner_prompt(self, prompt: str, max_len: int = PLANNER_MAX_TOKENS) -> dict[str, Any]:
        """As :meth:`preview_action_prompt`, for a planner prompt in which the task already is."""
        return self._preview([prompt], max_len)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text as it is, with neither beginning nor end of text: what a subtask is in training."""
        ids: list[int] = self._pieces.encode(text)
        return ids

    def _encode(self, texts: Sequence[str]) -> list[int]:
        return [BOS_ID, *(token for text in texts for token in self._pieces.encode(text))]

    def _preview(self, texts: Sequence[str], max_len: int) -> dict[str, Any]:
        ids = self._encode(texts)
        return {"text": "".join(texts), "token_ids": ids, "tokens": len(ids), "max_tokens": max_len, "not_fitting": self.decode(ids[max_len:])}

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of ``ids``, pad and eos left out."""
        text: str = self._pieces.decode([int(i) for i in ids if int(i) not in (PAD_ID, EOS_ID)])
        return text

    def allowed_tokens(self, rule: AllowedTokens) -> NDArray[np.int32]:
        """Ids that greedy decoding may choose, ascending; the end of text is always among them.

        ``"text"``: pieces of printable ASCII that are plain text. ``"printable_ascii"``: the reference's rule
        (reference/model.md §13.4), which also lets through names such as ``<loc0000>`` and ``<0x0A>``, and pad.
        """
        allowed = [EOS_ID] if rule == "text" else [PAD_ID, EOS_ID]
        for token in range(EOS_ID + 1, self.vocab_size):
            piece = self._pieces.id_to_piece(token)
            text = piece.replace(_SPACE, " ")
            if not (text and text.isascii() and text.isprintable()):
                continue
            if rule == "text" and (self._is_special(token) or _MARKUP_PIECE.fullmatch(piece)):
                continue
            allowed.append(token)
        return np.asarray(allowed, np.int32)

    def _is_special(self, token: int) -> bool:
        pieces = self._pieces
        return bool(pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_byte(token) or pieces.is_unused(token))


def _action_texts(prompt: str, state: NDArray[np.floating[Any]] | None) -> list[str]:
    """An action policy's prompt, in the parts that are encoded each on its own."""
    text = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        # With the text before it, the newline could merge into another piece.
        return [text, "\n"]
    numbers = " ".join(map(str, discretize_state(state)))
    return [f"Task: {text}, State: {numbers};\nAction: "]


def discretize_state(state: NDArray[np.floating[Any]]) -> list[int]:
    """Bins of a normalised state ``[d]`` as the pi0.5 prompt prints them: 0…255, -1 below -1 (reference/model.md §7.2)."""
    edges = np.linspace(-1, 1, _STATE_BINS + 1)[:-1]
    return [int(bin_) for bin_ in np.digitize(state, edges) - 1]


def clean_task(task: str) -> str:
    """A task as the planner reads it: lower case, stripped, ``_`` and newlines as spaces, one final punctuation mark dropped."""
    text = task.lower().strip().replace("_", " ").replace("\n", " ")
    return text[:-1] if text and text[-1] in string.punctuation else text


def find_tokenizer(tokenizer: str | Path | None, checkpoint_dir: Path, *, data_home: Path | None = None) -> Path:
    """The tokenizer file: ``tokenizer`` itself, else the one beside the checkpoint, else the cached PaliGemma download.

    ``checkpoint_dir`` may be the checkpoint root or its ``params/``.

    Raises:
        CheckpointError: ``tokenizer`` names no file, or none is at hand and the download fails.
    """
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        if not path.is_file():
            raise CheckpointError(f"tokenizer {tokenizer}: no such file; give the path of a {TOKENIZER_FILE}")
        return path
    checkpoint_dir = Path(checkpoint_dir)
    # The last one is another where a link leads to params/.
    for directory in (checkpoint_dir, checkpoint_dir.parent, checkpoint_dir.resolve().parent):
        if (directory / TOKENIZER_FILE).is_file():
            return directory / TOKENIZER_FILE
    from pi0.locations import cached_tokenizer, default_data_home

    return cached_tokenizer(data_home or default_data_home())


def _fit(ids: list[int], max_len: int, on_long_prompt: OnLongPrompt) -> TokenizedPrompt:
    needed = len(ids)
    if needed > max_len and on_long_prompt == "error":
        raise PromptTooLongError(
            f"prompt: has {needed} tokens (with everything the prompt format adds), but {max_len} fit; "
            "shorten it, or set on_long_prompt to truncate to have it cut"
        )
    return TokenizedPrompt(np.asarray(ids[:max_len], np.int32), needed, needed > max_len)
