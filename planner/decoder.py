"""Images and prompt → tokens: the one compiled program of the planner.

Prefix pass, then a ``while_loop`` that ends as soon as every row has emitted the end of text. Its length limit is a traced
argument, so a live change of ``max_generation_tokens`` compiles nothing, and the graph has the same size for every limit.

Guesses of the answer, as a tree of tokens, ride behind the prefix in its pass. What the model would say after each of them is known after that,
so the guesses that it would have made itself are kept and the loop goes on behind the last of them; where the whole answer was guessed, there is
no loop. The prefix does not see the guesses and each sees only those before it, so nothing depends on what was guessed but the work
(docs/planner.md).
"""

from __future__ import annotations

import functools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from pi0.param_tree import BackboneDims
from pi0.prompt import MAX_GENERATION_TOKENS
from pi0.tokenizer import EOS_ID, PAD_ID
from planner import gemma, siglip
from planner.drafts import TokenTree, token_tree
from planner.image_tokens import ImageEncoder

logger = logging.getLogger(__name__)

_NODES_AT_ONCE = 64


@struct.dataclass
class PlannerParams:
    """All weights of the planner, and which rows of the tied head may be chosen."""

    vision: siglip.SiglipParams
    language: gemma.GemmaParams
    head: jax.Array
    """``[A, W]``: the embedding's rows of the allowed tokens"""
    head_ids: jax.Array
    """``[A]`` int32, ascending: their ids"""


@struct.dataclass
class Prefix:
    """What a batch of B planner requests looks like to the model, with C camera slots and P prompt slots.

    Each row's cameras come first in their slots; a slot without one is masked and takes no position.
    """

    images: Any
    """``[B, C, 224, 224, 3]`` float32 in [-1, 1]"""
    image_mask: Any
    """``[B, C]`` bool"""
    tokens: Any
    """``[B, P]`` int32"""
    token_mask: Any
    """``[B, P]`` bool, valid tokens first"""


@struct.dataclass
class EncodedPrefix:
    """A :class:`Prefix` whose pictures the tower has read, apart and each once (:mod:`planner.image_tokens`): what the programs take."""

    image_tokens: Any
    """for each row and slot ``[T, W]``"""
    image_mask: Any
    tokens: Any
    token_mask: Any


@struct.dataclass
class Guesses:
    """Tokens that may follow the prompts: N nodes per row, as :class:`planner.drafts.TokenTree` has them."""

    tokens: Any
    """``[B, N]`` int32"""
    parents: Any
    """``[B, N]`` int32"""
    sees: Any
    """``[B, N, N]`` bool"""


@struct.dataclass
class Decoded:
    """What the program returns."""

    tokens: Any
    """``[B, MAX_GENERATION_TOKENS]`` int32; after a row's last token, pad"""
    length: Any
    """``[B]`` int32: how many tokens a row has, end of text included"""
    logprob: Any
    """``[B]`` float32: sum over a row's tokens, end of text included, of the log-softmax over the allowed tokens"""
    margin: Any
    """``[B]`` float32: the smallest distance between the best and the second-best logit at any of a row's tokens"""
    accepted: Any
    """``[B]`` int32: guessed tokens that a row kept"""
    decode_steps: Any
    """``[B]`` int32: forward passes of one token that a row needed: its tokens less the guessed ones and less one, which the prefix pass gives"""
    loop_steps: Any
    """scalar int32: forward passes that were run, those of the row that took longest"""


@struct.dataclass
class Choice:
    """Greedy choices among the allowed tokens, ``[…]`` each."""

    token: jax.Array
    """int32; of equals, the lowest id"""
    logprob: jax.Array
    margin: jax.Array
    """float32: by how much its logit is above the next one's"""


@struct.dataclass
class _Loop:
    """State of the decoding loop: ``step`` passes were made, ``token`` is each row's last token, its ``length``-th."""

    step: jax.Array
    token: jax.Array
    length: jax.Array
    done: jax.Array
    generated: jax.Array
    """``[B, MAX_GENERATION_TOKENS]``, in the columns ``1 … step``; column 0 is the choice of the prefix pass"""
    logprob: jax.Array
    margin: jax.Array
    cache: gemma.KeysValues


def embed_prefix(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """``[B, S, W]`` image tokens, camera after camera, then prompt tokens, and the mask ``[B, S]`` (reference/model.md §5.2)."""
    text = gemma.embed_tokens(params.language, prefix.tokens).astype(dtype)
    images = jnp.stack([jnp.concatenate(row) for row in prefix.image_tokens])
    image_mask = jnp.repeat(prefix.image_mask, dims.vision.tokens, axis=1)
    return jnp.concatenate([images, text], axis=1), jnp.concatenate([image_mask, prefix.token_mask], axis=1)


def read_prefix(params: PlannerParams, dims: BackboneDims, prefix: Prefix, guesses: Guesses) -> tuple[jax.Array, gemma.KeysValues, jax.Array]:
    """The prefix pass.

    Returns:
        ``[B, 1 + N, W]`` hidden states (after the final norm) at each row's last prompt token and at the guesses, keys and values
        of all S + N, mask ``[B, S]``.
    """
    x, mask = embed_prefix(params, dims, prefix, params.language.embedding.dtype)
    guessed = gemma.embed_tokens(params.language, jnp.maximum(guesses.tokens, 0))
    last = mask.shape[1] - prefix.tokens.shape[1] + prefix.token_mask.sum(-1) - 1
    behind = jnp.broadcast_to(mask.shape[1] + jnp.arange(guessed.shape[1]), guessed.shape[:2])
    read = jnp.concatenate([last[:, None], behind], axis=1)
    hidden, keys_values = gemma.prefix_pass(params.language, dims, jnp.concatenate([x, guessed], axis=1), mask, read, guesses.sees)
    return gemma.final_norm(params.language, hidden), keys_values, mask


def choose(params: PlannerParams, hidden: jax.Array) -> Choice:
    """What greedy decoding says at ``hidden`` ``[…, W]``."""
    logits = jnp.einsum("...w,aw->...a", hidden, params.head, preferred_element_type=jnp.float32)
    best, top = jnp.argmax(logits, axis=-1), logits.max(-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits)
    return Choice(params.head_ids[best], top - jax.nn.logsumexp(logits, axis=-1), top - others.max(-1))


def accept(guesses: Guesses, chosen: Choice) -> jax.Array:
    """Which guesses greedy decoding says itself, ``[B, N]``: those that the model chose where their parent ends, as it did all before them. The end
    of text is none: what is behind it is never said.

    Args:
        chosen: ``[B, 1 + N]``, after the prompt and after each guess.
    """
    said = (jnp.take_along_axis(chosen.token, guesses.parents + 1, axis=1) == guesses.tokens) & (guesses.tokens != EOS_ID)
    return ~(guesses.sees & ~said[:, None, :]).any(-1)


def decode(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, guesses: Guesses, max_tokens: jax.Array) -> Decoded:
    """Greedy decoding of at most ``max_tokens`` (scalar, 1 to ``MAX_GENERATION_TOKENS``) tokens per row, more than there are guesses in a line."""
    hidden, prefix_kv, mask = read_prefix(params, dims, prefix, guesses)
    valid, batch = mask.sum(-1, dtype=jnp.int32), len(mask)
    chosen = choose(params, hidden)
    kept = accept(guesses, chosen)
    accepted = kept.sum(-1, dtype=jnp.int32)
    # What is kept is one path, and a node comes after its parent: the last one kept is where it ends.
    order = jnp.arange(1, 1 + kept.shape[1], dtype=jnp.int32)
    end = jnp.max(jnp.where(kept, order, 0), axis=1, initial=0)
    on_path = jnp.concatenate([jnp.ones((batch, 1), jnp.bool_), kept], axis=1)
    token = jnp.take_along_axis(chosen.token, end[:, None], axis=1)[:, 0]
    # The guesses that were kept stay where they are and are attended to there; the loop's own tokens get a buffer.
    seen = jnp.concatenate([mask, kept], axis=1)
    start = _Loop(
        step=jnp.zeros((), jnp.int32),
        token=token,
        length=accepted + 1,
        done=(token == EOS_ID) | (accepted + 1 >= max_tokens),
        generated=jnp.full((batch, MAX_GENERATION_TOKENS), PAD_ID, jnp.int32).at[:, 0].set(token),
        logprob=jnp.where(on_path, chosen.logprob, 0.0).sum(-1),
        margin=jnp.where(on_path, chosen.margin, jnp.inf).min(-1),
        cache=gemma.empty_cache(dims, batch, MAX_GENERATION_TOKENS, hidden.dtype),
    )

    def step(loop: _Loop) -> _Loop:
        x = gemma.embed_tokens(params.language, loop.token)[:, None]
        # Positions count valid tokens; the slot of the last prefix token would be further along wherever a camera is masked.
        positions = (valid + loop.length - 1)[:, None]
        x, cache = gemma.decode_pass(params.language, dims, x, loop.step, positions, prefix_kv, seen, loop.cache)
        choice = choose(params, gemma.final_norm(params.language, x[:, 0]))
        token = jnp.where(loop.done, PAD_ID, choice.token)
        length = loop.length + ~loop.done
        return _Loop(
            step=loop.step + 1,
            token=token,
            length=length,
            done=loop.done | (token == EOS_ID) | (length >= max_tokens),
            generated=lax.dynamic_update_slice(loop.generated, token[:, None], (0, loop.step + 1)),
            logprob=loop.logprob + jnp.where(loop.done, 0.0, choice.logprob),
            margin=jnp.minimum(loop.margin, jnp.where(loop.done, jnp.inf, choice.margin)),
            cache=cache,
        )

    final = lax.while_loop(lambda loop: ~loop.done.all(), step, start)
    return Decoded(
        tokens=_joined(guesses, kept, accepted, final.generated),
        length=final.length,
        logprob=final.logprob,
        margin=final.margin,
        accepted=accepted,
        decode_steps=final.length - accepted - 1,
        loop_steps=final.step,
    )


def _joined(guesses: Guesses, kept: jax.Array, accepted: jax.Array, generated: jax.Array) -> jax.Array:
    """The kept guesses in a line and, behind them, what was generated, ``[B, MAX_GENERATION_TOKENS]``."""
    column = jnp.arange(generated.shape[1])
    behind = jnp.take_along_axis(generated, jnp.clip(column - accepted[:, None], 0), axis=1)
    depth = guesses.sees.sum(-1) - 1
    at_depth = kept[:, :, None] & (depth[:, :, None] == column)
    return jnp.where(column < accepted[:, None], (guesses.tokens[:, :, None] * at_depth).sum(1), behind)


@struct.dataclass
class TreeReading:
    """How likely the guesses are where they stand, as log-probabilities among the allowed tokens."""

    own: Any
    """``[B, N]`` float32: each guess after its parent; what it is in an unused node means nothing"""
    end: Any
    """``[B, 1 + N]`` float32: the end of text after the prompt and after each guess"""


def read_tree(params: PlannerParams, dims: BackboneDims, prefix: EncodedPrefix, guesses: Guesses) -> TreeReading:
    """The prefix pass alone. Every guess and the end of text are allowed tokens."""
    hidden, _, _ = read_prefix(params, dims, prefix, guesses)

    def normaliser(hidden: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(jnp.einsum("...w,aw->...a", hidden, params.head, preferred_element_type=jnp.float32), axis=-1)

    # In pieces: all logits of a long list at once would take a gigabyte.
    total = lax.map(normaliser, hidden.swapaxes(0, 1), batch_size=_NODES_AT_ONCE).T
    parents = guesses.parents + 1
    said = params.head[jnp.searchsorted(params.head_ids, guesses.tokens)]
    after = jnp.take_along_axis(hidden, parents[..., None], axis=1)
    own = jnp.einsum("bnw,bnw->bn", after, said, preferred_element_type=jnp.float32)
    end = jnp.einsum("bnw,w->bn", hidden, params.head[jnp.searchsorted(params.head_ids, EOS_ID)], preferred_element_type=jnp.float32)
    return TreeReading(own - jnp.take_along_axis(total, parents, axis=1), end - total)


class _Programs(ABC):
    """Compiled programs by shape, each compiled once, in :meth:`compile` or at its first use. For one thread at a time.

    Args:
        guesses: nodes of a row's tree, in every program.
    """

    def __init__(self, params: PlannerParams, dims: BackboneDims, *, guesses: int) -> None:
        self.params = params
        self.dims = dims
        self.guesses = guesses
        self.encoder = ImageEncoder(params.vision, dims.vision, dims.vlm.width, params.language.embedding.dtype)
        self._programs: dict[tuple[int, int, int], Any] = {}

    @property
    def programs(self) -> tuple[tuple[int, int, int], ...]:
        """(batch, cameras, prompt slots) of every compiled program."""
        return tuple(self._programs)

    def compile(self, shapes: Iterable[tuple[int, int, int]]) -> None:
        """Compiles a program for each of ``shapes`` (batch, cameras, prompt slots) that has none, side by side, as XLA keeps one core busy each."""
        missing = [shape for shape in shapes if shape not in self._programs]
        if not missing:
            return
        started = time.perf_counter()
        work = self.encoder.programs_for(max(batch * cameras for batch, cameras, _ in missing))
        work += [functools.partial(self._compile, *shape) for shape in missing]
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="planner-compile") as threads:
            for done in [threads.submit(compiling) for compiling in work]:
                done.result()
        logger.info("compiled %d planner programs in %.1f s", len(work), time.perf_counter() - started)

    def _run(self, prefix: Prefix, trees: Sequence[TokenTree], **scalars: Any) -> Any:
        """The program of this shape, its result on the host; the last tree is also that of the rows beyond."""
        batch, cameras = prefix.image_mask.shape
        shape = (batch, cameras, prefix.tokens.shape[1])
        if shape not in self._programs:
            self.compile([shape])
        rows = [*trees, *[trees[-1]] * (batch - len(trees))]
        guesses = Guesses(*(np.stack([getattr(tree, name) for tree in rows]) for name in ("tokens", "parents", "sees")))
        return jax.device_get(self._programs[shape](self.params, prefix=self.encode(prefix), guesses=guesses, **scalars))

    def encode(self, prefix: Prefix) -> EncodedPrefix:
        """The pictures that are there encoded."""
        there = np.argwhere(prefix.image_mask)
        tokens = dict(zip(map(tuple, there.tolist()), self.encoder([prefix.images[row, slot] for row, slot in there]), strict=True))
        batch, cameras = prefix.image_mask.shape
        slots = tuple(tuple(tokens.get((row, slot), self.encoder.blank) for slot in range(cameras)) for row in range(batch))
        return EncodedPrefix(slots, prefix.image_mask, prefix.tokens, prefix.token_mask)

    def _compile(self, batch: int, cameras: int, prompt_slots: int) -> None:
        prefix = EncodedPrefix(
            image_tokens=((self.encoder.blank,) * cameras,) * batch,
            image_mask=np.empty((batch, cameras), np.bool_),
            tokens=np.empty((batch, prompt_slots), np.int32),
            token_mask=np.empty((batch, prompt_slots), np.bool_),
        )
        nodes = (batch, self.guesses)
        guesses = Guesses(np.empty(nodes, np.int32), np.empty(nodes, np.int32), np.empty((*nodes, self.guesses), np.bool_))
        # Without this, float32 products are TF32 or bfloat16 ones on accelerators. bfloat16 products are not affected.
        with jax.default_matmul_precision("highest"):
            self._programs[batch, cameras, prompt_slots] = self._lower(prefix=prefix, guesses=guesses).compile()

    @abstractmethod
    def _lower(self, **arguments: Any) -> Any:
        """The program for arguments of these shapes, not compiled yet."""


class Decoder(_Programs):
    """Compiled :func:`decode` programs. Without ``guesses`` it decodes plainly."""

    def __init__(self, params: PlannerParams, dims: BackboneDims, *, guesses: int = 0) -> None:
        super().__init__(params, dims, guesses=guesses)

    def __call__(self, prefix: Prefix, max_tokens: int, trees: Sequence[TokenTree] = ()) -> Decoded:
        """Runs :func:`decode` and waits until the result is on the host, as numpy arrays.

        Args:
            trees: each row's guesses, of :attr:`guesses` nodes and less than ``max_tokens`` deep (see :meth:`tree`); the last tree is also
                that of the rows beyond.
        """
        decoded: Decoded = self._run(prefix, trees or [self.tree((), max_tokens)], max_tokens=np.int32(max_tokens))
        return decoded

    def tree(self, drafts: Iterable[Sequence[int]], max_tokens: int) -> TokenTree:
        """A row's guesses, the likeliest first, without the end of text; what does not fit in the nodes or in ``max_tokens`` is left out."""
        return token_tree((draft[: max_tokens - 1] for draft in drafts), self.guesses)

    def _lower(self, **arguments: Any) -> Any:
        return jax.jit(functools.partial(decode, dims=self.dims)).lower(self.params, **arguments, max_tokens=np.int32(1))


class TreeReader(_Programs):
    """Compiled :func:`read_tree` programs."""

    def __call__(self, prefix: Prefix, trees: Sequence[TokenTree]) -> TreeReading:
        """Runs :func:`read_tree`, as :class:`Decoder` runs :func:`decode`."""
        reading: TreeReading = self._run(prefix, trees)
        return reading

    def _lower(self, **arguments: Any) -> Any:
        return jax.jit(functools.partial(read_tree, dims=self.dims)).lower(self.params, **arguments)
