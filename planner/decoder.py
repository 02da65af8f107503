"""Images and prompt → tokens, in compiled programs.

:func:`read` is the pass over images and prompt. Guesses of the answer, as a tree of tokens, stand in the slots that the prompt leaves; what the model
would say at the end of the prompt and after each of them is known after it. The guesses that it would have made itself are kept, and where they are
the whole answer, nothing else runs. :func:`say` goes on behind the last one that is kept, token by token, and ends as soon as every row has emitted
the end of text. Its length limit is a traced argument, so a live change of ``max_generation_tokens`` compiles nothing. The prompt does not see the
guesses and each sees only those before it, so nothing depends on what was guessed but the work (docs/planner.md).
"""

from __future__ import annotations

import functools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from numpy.typing import NDArray

from pi0.cameras import MODEL_CAMERAS
from pi0.param_tree import BackboneDims
from pi0.prompt import MAX_GENERATION_TOKENS
from pi0.tokenizer import EOS_ID, PAD_ID, PLANNER_MAX_TOKENS
from planner import gemma, siglip
from planner.drafts import TokenTree, agreed, token_tree
from planner.image_tokens import ImageEncoder

logger = logging.getLogger(__name__)

_LOGIT_ROWS_AT_ONCE = 64


def text_slots(nodes: int) -> tuple[int, int]:
    """Text slots that programs are compiled for, with trees of at most ``nodes``: for short prompts, which leave room for all nodes up to 32 tokens,
    and for the longest. More sizes would mostly add compile time: 16 slots fewer are 2 % of the pass with three cameras."""
    return max(48, 32 + nodes), PLANNER_MAX_TOKENS + nodes


@struct.dataclass
class PlannerParams:
    """All weights of the planner, and which rows of the tied head may be chosen."""

    vision: siglip.SiglipParams
    language: gemma.GemmaParams
    head: jax.Array
    """``[A, W]``: the embedding's rows of the allowed tokens"""
    head_ids: jax.Array
    """``[A]`` int32, ascending: their ids"""


@dataclass(frozen=True)
class Prefix:
    """What a batch of B planner requests looks like to the model, with C camera slots and P prompt slots.

    Each row's cameras come first in their slots; a slot without one is masked and takes no position.
    """

    images: NDArray[np.float32]
    """``[B, C, 224, 224, 3]`` in [-1, 1]"""
    image_mask: NDArray[np.bool_]
    """``[B, C]``"""
    tokens: NDArray[np.int32]
    """``[B, P]``"""
    lengths: NDArray[np.int32]
    """``[B]``: how many of them are the prompt, the first ones"""


@struct.dataclass
class Text:
    """Prompts and, in the slots behind each, what may follow it: N nodes per row, as :class:`planner.drafts.TokenTree` has them."""

    tokens: Any
    """``[B, P]`` int32"""
    lengths: Any
    """``[B]`` int32, of the prompts"""
    sees: Any
    """``[B, P, P]`` bool: prompts all of the prompt, nodes also their path"""


@struct.dataclass
class EncodedPrefix:
    """A :class:`Prefix` whose pictures the tower has read, apart and each once (:mod:`planner.image_tokens`): what :func:`read` takes."""

    image_tokens: Any
    """for each row and slot ``[T, W]``"""
    image_mask: Any
    text: Text
    positions: Any
    """``[B, S]`` int32, of images and text: they count valid tokens, and nodes go on at their parent's"""


@dataclass(frozen=True)
class Decoded:
    """What a batch of B rows was answered."""

    tokens: NDArray[np.int32]
    """``[B, MAX_GENERATION_TOKENS]``; after a row's last token, pad"""
    length: NDArray[np.int32]
    """``[B]``: how many tokens a row has, end of text included"""
    logprob: NDArray[np.float32]
    """``[B]``: sum over a row's tokens, end of text included, of the log-softmax over the allowed tokens"""
    margin: NDArray[np.float32]
    """``[B]``: the smallest distance between the best and the second-best logit at any of a row's tokens"""
    drafted: NDArray[np.int32]
    """``[B]``: guessed tokens that were checked"""
    accepted: NDArray[np.int32]
    """``[B]``: those that a row kept"""
    decode_steps: NDArray[np.int32]
    """``[B]``: forward passes of one token that a row needed: its tokens less the guessed ones and less one, which the prefix pass gives"""
    loop_steps: int
    """forward passes of one token that were run, those of the row that took longest"""


@struct.dataclass
class Choice:
    """Greedy choices among the allowed tokens, ``[…]`` each."""

    token: Any
    """int32; of equals, the lowest id"""
    logprob: Any
    margin: Any
    """float32: by how much its logit is above the next one's"""


@struct.dataclass
class Said:
    """What :func:`say` adds to a row; also the state of its loop, in which ``step`` passes were made and ``length`` tokens said."""

    step: Any
    """scalar int32"""
    token: Any
    """``[B]`` int32: the last one"""
    length: Any
    """``[B]`` int32: of the whole answer"""
    done: Any
    generated: Any
    """``[B, MAX_GENERATION_TOKENS]`` int32, in its first ``step`` columns; pad where a row was done"""
    logprob: Any
    """``[B]`` float32, of these tokens"""
    margin: Any


def embed_prefix(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix) -> tuple[jax.Array, jax.Array]:
    """``[B, S, W]`` image tokens, camera after camera, then text; which of them each attends to, ``[B, S, S]`` (reference/model.md §5.2): all to
    images and prompt, text also to what :class:`Text` says."""
    text = prefix.text
    images = jnp.stack([jnp.concatenate(row) for row in prefix.image_tokens])
    image_mask = jnp.repeat(prefix.image_mask, dims.vision.tokens, axis=1)
    prompt = jnp.arange(text.tokens.shape[1]) < text.lengths[:, None]
    (batch, before), behind = image_mask.shape, prompt.shape[1]
    sees = jnp.concatenate([jnp.broadcast_to(prompt[:, None], (batch, before, behind)), text.sees], axis=1)
    visible = jnp.concatenate([jnp.broadcast_to(image_mask[:, None], (batch, before + behind, before)), sees], axis=2)
    return jnp.concatenate([images, gemma.embed_tokens(params.language, text.tokens).astype(images.dtype)], axis=1), visible


def read_prefix(
    params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, nodes: int, capacity: int | None = None
) -> tuple[jax.Array, gemma.KeysValues]:
    """The prefix pass.

    Returns:
        ``[B, 1 + nodes, W]`` hidden states (after the final norm) at each row's last prompt token and at what stands behind it, and a cache of
        ``capacity`` slots (None: as many as are needed) with the keys and values of all.
    """
    x, visible = embed_prefix(params, dims, prefix)
    text = prefix.text
    # Where a prompt leaves fewer slots than there could be nodes, the last one is read again and means nothing.
    behind = jnp.minimum(text.lengths[:, None] - 1 + jnp.arange(1 + nodes), text.tokens.shape[1] - 1)
    read = x.shape[1] - text.tokens.shape[1] + behind
    hidden, cache = gemma.prefix_pass(params.language, dims, x, prefix.positions, visible, read, capacity or x.shape[1])
    return gemma.final_norm(params.language, hidden), cache


def choose(params: PlannerParams, hidden: jax.Array) -> Choice:
    """What greedy decoding says at ``hidden`` ``[…, W]``."""
    logits = jnp.einsum("...w,aw->...a", hidden, params.head, preferred_element_type=jnp.float32)
    best, top = jnp.argmax(logits, axis=-1), logits.max(-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits)
    return Choice(params.head_ids[best], -jnp.log(jnp.exp(logits - top[..., None]).sum(-1)), top - others.max(-1))


def read(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, *, nodes: int, capacity: int) -> tuple[Choice, gemma.KeysValues]:
    """What the model says after the prompts and after each of the nodes behind them, ``[B, 1 + nodes]``, and the cache of :func:`read_prefix`."""
    hidden, cache = read_prefix(params, dims, prefix, nodes, capacity)
    return choose(params, hidden), cache


def say(
    params: PlannerParams,
    dims: BackboneDims,
    cache: gemma.KeysValues,
    seen: jax.Array,
    token: jax.Array,
    length: jax.Array,
    position: jax.Array,
    max_tokens: jax.Array,
) -> tuple[Said, gemma.KeysValues]:
    """Greedy decoding from ``token`` ``[B]`` on, the ``length``-th of its row, until each row has said the end of text or ``max_tokens`` (scalar)
    tokens.

    Args:
        cache: of :func:`read`, with room for ``MAX_GENERATION_TOKENS`` tokens behind what was read.
        seen: ``[B, S]``, which slots before those are attended to.
        position: ``[B]``, of ``token``. (Positions count valid tokens; the slot would be further along wherever one is masked.)

    Returns:
        what was said, and the cache, so that it may be written in place.
    """
    room = jnp.arange(MAX_GENERATION_TOKENS)

    def step(state: tuple[Said, gemma.KeysValues]) -> tuple[Said, gemma.KeysValues]:
        said, cache = state
        x = gemma.embed_tokens(params.language, said.token)[:, None]
        visible = jnp.concatenate([seen, jnp.broadcast_to(room <= said.step, (len(seen), len(room)))], axis=1)
        positions = (position + said.length - length)[:, None]
        x, cache = gemma.decode_pass(params.language, dims, x, positions, visible, seen.shape[1] + said.step, cache)
        choice = choose(params, gemma.final_norm(params.language, x[:, 0]))
        token = jnp.where(said.done, PAD_ID, choice.token)
        own_length = said.length + ~said.done
        return (
            Said(
                step=said.step + 1,
                token=token,
                length=own_length,
                done=said.done | (token == EOS_ID) | (own_length >= max_tokens),
                generated=lax.dynamic_update_slice(said.generated, token[:, None], (0, said.step)),
                logprob=said.logprob + jnp.where(said.done, 0.0, choice.logprob),
                margin=jnp.minimum(said.margin, jnp.where(said.done, jnp.inf, choice.margin)),
            ),
            cache,
        )

    start = Said(
        step=jnp.zeros((), jnp.int32),
        token=token,
        length=length,
        done=(token == EOS_ID) | (length >= max_tokens),
        generated=jnp.full((len(token), MAX_GENERATION_TOKENS), PAD_ID, jnp.int32),
        logprob=jnp.zeros(len(token), jnp.float32),
        margin=jnp.full(len(token), jnp.inf, jnp.float32),
    )
    return lax.while_loop(lambda state: ~state[0].done.all(), step, (start, cache))


@struct.dataclass
class TreeReading:
    """How likely the nodes are where they stand, as log-probabilities among the allowed tokens."""

    own: Any
    """``[B, N]`` float32: each node's token after its parent; what it is in an unused node means nothing"""
    end: Any
    """``[B, 1 + N]`` float32: the end of text after the prompt and after each node"""


def read_tree(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, tokens: jax.Array, parents: jax.Array) -> TreeReading:
    """The prefix pass alone, with trees of ``tokens`` and ``parents`` ``[B, N]`` in the text; these and the end of text are allowed tokens."""
    hidden, _ = read_prefix(params, dims, prefix, tokens.shape[1])

    def normaliser(hidden: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.einsum("...w,aw->...a", hidden, params.head, preferred_element_type=jnp.float32), axis=-1)

    # In pieces: all logits of a long list at once would take a gigabyte.
    total = lax.map(normaliser, hidden.swapaxes(0, 1), batch_size=max(1, _LOGIT_ROWS_AT_ONCE // len(hidden))).T
    parents = parents + 1
    said = params.head[jnp.searchsorted(params.head_ids, tokens)]
    after = jnp.take_along_axis(hidden, parents[..., None], axis=1)
    own = jnp.einsum("bnw,bnw->bn", after, said, preferred_element_type=jnp.float32)
    end = jnp.einsum("bnw,w->bn", hidden, params.head[jnp.searchsorted(params.head_ids, EOS_ID)], preferred_element_type=jnp.float32)
    return TreeReading(own - jnp.take_along_axis(total, parents, axis=1), end - total)


class _Programs(ABC):
    """Compiled programs by shape, each compiled once, in :meth:`compile` or at its first use. For one thread at a time.

    Args:
        guesses: most nodes of a row's tree, in every program.
    """

    def __init__(self, params: PlannerParams, dims: BackboneDims, *, guesses: int) -> None:
        self.params = params
        self.dims = dims
        self.guesses = guesses
        self.encoder = ImageEncoder(params.vision, dims.vision, dims.vlm.width, params.language.embedding.dtype)
        self._programs: dict[tuple[int, int, int], Any] = {}

    @property
    def programs(self) -> tuple[tuple[int, int, int], ...]:
        """(batch, cameras, text slots) of every compiled prefix pass."""
        return tuple(self._programs)

    def compile(self, shapes: Iterable[tuple[int, int, int]]) -> None:
        """Compiles what is missing for batches of ``shapes`` (batch, cameras, text slots), side by side: XLA keeps one or two cores busy each."""
        started = time.perf_counter()
        work = self._missing(list(shapes))
        if not work:
            return
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="planner-compile") as threads:
            for done in [threads.submit(compiling) for compiling in work]:
                done.result()
        logger.info("compiled %d planner programs in %.1f s", len(work), time.perf_counter() - started)

    def _missing(self, shapes: Sequence[tuple[int, int, int]]) -> list[Callable[[], None]]:
        """What compiles the programs for ``shapes`` that are not there yet."""
        missing = [shape for shape in shapes if shape not in self._programs]
        work: list[Callable[[], None]] = [functools.partial(self._compile, *shape) for shape in missing]
        return work + self.encoder.programs_for(max((batch * cameras for batch, cameras, _ in missing), default=0))

    def _program(self, prefix: Prefix) -> Any:
        batch, cameras = prefix.image_mask.shape
        shape = (batch, cameras, prefix.tokens.shape[1])
        self.compile([shape])
        return self._programs[shape]

    def encode(self, prefix: Prefix, trees: Sequence[TokenTree] = ()) -> EncodedPrefix:
        """The pictures that are there encoded, the trees behind the prompts."""
        there = np.argwhere(prefix.image_mask)
        tokens = dict(zip(map(tuple, there.tolist()), self.encoder([prefix.images[row, slot] for row, slot in there]), strict=True))
        batch, cameras = prefix.image_mask.shape
        slots = tuple(tuple(tokens.get((row, slot), self.encoder.blank) for slot in range(cameras)) for row in range(batch))
        return EncodedPrefix(slots, prefix.image_mask, *_laid_out(prefix, trees, self.dims.vision.tokens))

    def _compile(self, batch: int, cameras: int, slots: int) -> None:
        text = Text(
            tokens=np.empty((batch, slots), np.int32),
            lengths=np.empty(batch, np.int32),
            sees=np.empty((batch, slots, slots), np.bool_),
        )
        prefix = EncodedPrefix(
            image_tokens=((self.encoder.blank,) * cameras,) * batch,
            image_mask=np.empty((batch, cameras), np.bool_),
            text=text,
            positions=np.empty((batch, cameras * self.dims.vision.tokens + slots), np.int32),
        )
        self._programs[batch, cameras, slots] = _compiled(self._lowered, prefix)

    @abstractmethod
    def _lowered(self, prefix: EncodedPrefix) -> Any:
        """The prefix pass for arguments of these shapes, not compiled yet."""


def _compiled(lower: Callable[..., Any], *arguments: Any) -> Any:
    # Without this, float32 products are TF32 or bfloat16 ones on accelerators. bfloat16 products are not affected.
    with jax.default_matmul_precision("highest"):
        return lower(*arguments).compile()


def _for_all_rows(trees: Sequence[TokenTree], batch: int) -> list[TokenTree]:
    """The last tree is also that of the rows beyond: those that fill up a batch repeat its last one."""
    return [*trees, *[trees[-1]] * (batch - len(trees))]


def _laid_out(prefix: Prefix, trees: Sequence[TokenTree], image_tokens: int) -> tuple[Text, NDArray[np.int32]]:
    """The prompts with the trees in the slots behind them, where all of each must fit, and the positions of everything."""
    batch, slots = prefix.tokens.shape
    tokens = prefix.tokens.copy()
    valid_images = np.repeat(prefix.image_mask, image_tokens, axis=1)
    order = np.tile(np.arange(slots, dtype=np.int32), (batch, 1))
    sees = np.repeat((order < prefix.lengths[:, None])[:, None], slots, axis=1)
    for row, tree in enumerate(trees):
        begin, used = int(prefix.lengths[row]), tree.used
        behind, own = slice(begin, begin + used), tree.sees[:used, :used]
        tokens[row, behind] = tree.tokens[:used]
        order[row, behind] = begin - 1 + own.sum(-1)
        sees[row, behind, behind] = own
    count = np.cumsum(valid_images, axis=1, dtype=np.int32)
    return Text(tokens, prefix.lengths, sees), np.concatenate([count - 1, count[:, -1:] + order], axis=1)


class Decoder(_Programs):
    """Free answers: compiled :func:`read` and :func:`say`. Without ``guesses`` it decodes plainly.

    Args:
        cameras: the most that a row has.
    """

    def __init__(self, params: PlannerParams, dims: BackboneDims, *, guesses: int = 0, cameras: int = len(MODEL_CAMERAS)) -> None:
        super().__init__(params, dims, guesses=guesses)
        self._readable = cameras * dims.vision.tokens + max(text_slots(guesses))
        self._saying: dict[int, Any] = {}

    def __call__(self, prefix: Prefix, max_tokens: int, trees: Sequence[TokenTree] = ()) -> Decoded:
        """Answers of at most ``max_tokens`` (1 to ``MAX_GENERATION_TOKENS``) tokens, on the host.

        Args:
            trees: each row's guesses, of at most :attr:`guesses` nodes and less than ``max_tokens`` deep (see :meth:`tree`), of which those are
                checked that fit behind its prompt; the last tree is also that of the rows beyond, and none is no guess.
        """
        batch, slots = prefix.tokens.shape
        trees = _for_all_rows(trees or [token_tree((), 0)], batch)
        trees = [tree.first(slots - int(length)) for tree, length in zip(trees, prefix.lengths, strict=True)]
        said, cache = self.read(prefix, trees)
        paths = [agreed(tree, after) for tree, after in zip(trees, said.token.tolist(), strict=True)]
        accepted = np.array([len(path) for path in paths], np.int32)
        token = np.array([after[path[-1] + 1 if path else 0] for after, path in zip(said.token, paths, strict=True)], np.int32)
        on_path = [[0, *(node + 1 for node in path)] for path in paths]
        logprob = np.array([after[path].sum() for after, path in zip(said.logprob, on_path, strict=True)], np.float32)
        margin = np.array([after[path].min() for after, path in zip(said.margin, on_path, strict=True)], np.float32)
        tokens = np.full((batch, MAX_GENERATION_TOKENS), PAD_ID, np.int32)
        for row, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            tokens[row, : len(path) + 1] = *tree.tokens[path], token[row]
        length, loop_steps = accepted + 1, 0
        if not ((token == EOS_ID) | (length >= max_tokens)).all():
            more = self._say(prefix, paths, cache, token, length, max_tokens)
            for row in range(batch):
                tokens[row, length[row] : more.length[row]] = more.generated[row, : more.length[row] - length[row]]
            length, loop_steps = more.length, int(more.step)
            logprob, margin = logprob + more.logprob, np.minimum(margin, more.margin)
        drafted = np.array([tree.used for tree in trees], np.int32)
        return Decoded(tokens, length, logprob, margin, drafted, accepted, length - accepted - 1, loop_steps)

    def read(self, prefix: Prefix, trees: Sequence[TokenTree]) -> tuple[Choice, gemma.KeysValues]:
        """:func:`read`; of each row a tree, which must fit behind its prompt. What is chosen is on the host."""
        choice, cache = self._program(prefix)(self.params, prefix=self.encode(prefix, trees))
        return jax.device_get(choice), cache

    def _say(
        self,
        prefix: Prefix,
        paths: Sequence[Sequence[int]],
        cache: gemma.KeysValues,
        token: NDArray[np.int32],
        length: NDArray[np.int32],
        max_tokens: int,
    ) -> Said:
        """:func:`say` behind the guesses of ``paths``, which stay where they are and are attended to there."""
        images = prefix.image_mask.shape[1] * self.dims.vision.tokens
        seen = np.zeros((len(paths), self._readable), np.bool_)
        seen[:, :images] = np.repeat(prefix.image_mask, self.dims.vision.tokens, axis=1)
        for row, path in enumerate(paths):
            prompt_end = images + int(prefix.lengths[row])
            seen[row, images:prompt_end] = True
            seen[row, [prompt_end + node for node in path]] = True
        position = seen.sum(-1, dtype=np.int32)
        program = self._saying[len(paths)]
        said, _ = program(self.params, cache=cache, seen=seen, token=token, length=length, position=position, max_tokens=np.int32(max_tokens))
        result: Said = jax.device_get(said)
        return result

    def tree(self, drafts: Iterable[Sequence[int]], max_tokens: int) -> TokenTree:
        """A row's guesses, the likeliest first, without the end of text; what does not fit in the nodes or in ``max_tokens`` is left out."""
        return token_tree((draft[: max_tokens - 1] for draft in drafts), self.guesses)

    def _missing(self, shapes: Sequence[tuple[int, int, int]]) -> list[Callable[[], None]]:
        batches = sorted({batch for batch, _, _ in shapes} - self._saying.keys())
        return [functools.partial(self._compile_saying, batch) for batch in batches] + super()._missing(shapes)

    @property
    def _capacity(self) -> int:
        return self._readable + MAX_GENERATION_TOKENS

    def _lowered(self, prefix: EncodedPrefix) -> Any:
        if (tokens := prefix.positions.shape[1]) > self._readable:
            raise ValueError(f"a prefix has {tokens} tokens, but this decoder was made for {self._readable}: for fewer cameras or guesses")
        program = functools.partial(read, dims=self.dims, nodes=self.guesses, capacity=self._capacity)
        return jax.jit(program).lower(self.params, prefix=prefix)

    def _compile_saying(self, batch: int) -> None:
        def lower() -> Any:
            dtype = self.params.language.embedding.dtype
            per_row = np.empty(batch, np.int32)
            return jax.jit(functools.partial(say, dims=self.dims), donate_argnames="cache").lower(
                self.params,
                cache=jax.eval_shape(lambda: gemma.empty_cache(self.dims, batch, self._capacity, dtype)),
                seen=np.empty((batch, self._readable), np.bool_),
                token=per_row,
                length=per_row,
                position=per_row,
                max_tokens=np.int32(1),
            )

        self._saying[batch] = _compiled(lower)


class TreeReader(_Programs):
    """Compiled :func:`read_tree`."""

    def __call__(self, prefix: Prefix, trees: Sequence[TokenTree]) -> TreeReading:
        """How likely the nodes of each row's tree are, on the host. All of them must fit behind its prompt; the last tree is also that of the rows
        beyond."""
        program = self._program(prefix)
        trees = _for_all_rows(trees, len(prefix.tokens))
        tokens, parents = np.full((2, len(trees), self.guesses), -1, np.int32)
        for row, tree in enumerate(trees):
            tokens[row, : len(tree.tokens)], parents[row, : len(tree.tokens)] = tree.tokens, tree.parents
        reading: TreeReading = jax.device_get(program(self.params, prefix=self.encode(prefix, trees), tokens=tokens, parents=parents))
        return reading

    def _lowered(self, prefix: EncodedPrefix) -> Any:
        nodes = np.empty((len(prefix.image_mask), self.guesses), np.int32)
        return jax.jit(functools.partial(read_tree, dims=self.dims)).lower(self.params, prefix=prefix, tokens=nodes, parents=nodes)
