"""Images and prompt → tokens: the one compiled program of the planner.

Prefix pass, then a ``while_loop`` that ends as soon as every row has emitted the end of text. Its length limit is a traced
argument, so a live change of ``max_generation_tokens`` compiles nothing, and the graph has the same size for every limit.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from pi0.param_tree import IMAGE_SIZE, BackboneDims
from pi0.prompt import MAX_GENERATION_TOKENS
from pi0.tokenizer import EOS_ID, PAD_ID
from planner import gemma, siglip

logger = logging.getLogger(__name__)


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
class Decoded:
    """What the program returns."""

    tokens: Any
    """``[B, MAX_GENERATION_TOKENS]`` int32; after a row's last token, pad"""
    logprob: Any
    """``[B]`` float32: sum over a row's tokens, end of text included, of the log-softmax over the allowed tokens"""
    decode_steps: Any
    """``[B]`` int32: forward passes that a row needed, one less than it has tokens"""
    loop_steps: Any
    """scalar int32: forward passes that were run, those of the row that took longest"""


@struct.dataclass
class _Loop:
    """State of the decoding loop: ``count`` tokens per row are written, ``token`` is the last one."""

    count: jax.Array
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    logprob: jax.Array
    decode_steps: jax.Array
    cache: gemma.KeysValues


def embed_prefix(params: PlannerParams, dims: BackboneDims, prefix: Prefix, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """``[B, S, W]`` image tokens, camera after camera, then prompt tokens, and the mask ``[B, S]`` (reference/model.md §5.2)."""
    batch, cameras = prefix.image_mask.shape
    text = gemma.embed_tokens(params.language, prefix.tokens).astype(dtype)
    images = siglip.encode_images(params.vision, dims.vision, prefix.images.reshape(batch * cameras, *prefix.images.shape[2:]), dtype)
    images = images.reshape(batch, cameras * dims.vision.tokens, -1)
    image_mask = jnp.repeat(prefix.image_mask, dims.vision.tokens, axis=1)
    return jnp.concatenate([images, text], axis=1), jnp.concatenate([image_mask, prefix.token_mask], axis=1)


def read_prefix(params: PlannerParams, dims: BackboneDims, prefix: Prefix) -> tuple[jax.Array, gemma.KeysValues, jax.Array]:
    """The prefix pass.

    Returns:
        ``[B, W]`` hidden state at each row's last prompt token (after the final norm), keys and values, mask ``[B, S]``.
    """
    x, mask = embed_prefix(params, dims, prefix, params.language.embedding.dtype)
    hidden, keys_values = gemma.prefix_pass(params.language, dims, x, mask)
    last = mask.shape[1] - prefix.tokens.shape[1] + prefix.token_mask.sum(-1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return gemma.final_norm(params.language, hidden), keys_values, mask


def choose(params: PlannerParams, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Greedy choice among the allowed tokens from ``hidden`` ``[B, W]``: ids (ties: the lowest) and their log-probabilities, ``[B]``."""
    logits = jnp.einsum("bw,aw->ba", hidden, params.head, preferred_element_type=jnp.float32)
    best = jnp.argmax(logits, axis=-1)
    return params.head_ids[best], logits.max(-1) - jax.nn.logsumexp(logits, axis=-1)


def decode(params: PlannerParams, dims: BackboneDims, prefix: Prefix, max_tokens: jax.Array) -> Decoded:
    """Greedy decoding of at most ``max_tokens`` (scalar, 1 to ``MAX_GENERATION_TOKENS``) tokens per row."""
    hidden, prefix_kv, mask = read_prefix(params, dims, prefix)
    valid = mask.sum(-1, dtype=jnp.int32)
    batch = hidden.shape[0]
    token, logprob = choose(params, hidden)
    tokens = jnp.full((batch, MAX_GENERATION_TOKENS), PAD_ID, jnp.int32).at[:, 0].set(token)
    start = _Loop(
        count=jnp.ones((), jnp.int32),
        token=token,
        done=token == EOS_ID,
        tokens=tokens,
        logprob=logprob,
        decode_steps=jnp.zeros(batch, jnp.int32),
        cache=gemma.empty_cache(dims, batch, MAX_GENERATION_TOKENS, hidden.dtype),
    )

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.count < max_tokens) & ~loop.done.all()

    def step(loop: _Loop) -> _Loop:
        x = gemma.embed_tokens(params.language, loop.token)[:, None]
        slot = loop.count - 1
        # Positions count valid tokens; the slot of the last prefix token would be further along wherever a camera is masked.
        x, cache = gemma.decode_pass(params.language, dims, x, slot, (valid + slot)[:, None], prefix_kv, mask, loop.cache)
        token, logprob = choose(params, gemma.final_norm(params.language, x[:, 0]))
        token = jnp.where(loop.done, PAD_ID, token)
        return _Loop(
            count=loop.count + 1,
            token=token,
            done=loop.done | (token == EOS_ID),
            tokens=lax.dynamic_update_slice(loop.tokens, token[:, None], (0, loop.count)),
            logprob=loop.logprob + jnp.where(loop.done, 0.0, logprob),
            decode_steps=loop.decode_steps + ~loop.done,
            cache=cache,
        )

    end = lax.while_loop(unfinished, step, start)
    return Decoded(tokens=end.tokens, logprob=end.logprob, decode_steps=end.decode_steps, loop_steps=end.count - 1)


class Decoder:
    """Compiled :func:`decode` programs by shape, each compiled once, in :meth:`compile` or at its first use. For one thread at a time."""

    def __init__(self, params: PlannerParams, dims: BackboneDims) -> None:
        self.params = params
        self.dims = dims
        self._programs: dict[tuple[int, int, int], Any] = {}

    @property
    def programs(self) -> tuple[tuple[int, int, int], ...]:
        """(batch, cameras, prompt slots) of every compiled program."""
        return tuple(self._programs)

    def compile(self, shapes: Iterable[tuple[int, int, int]]) -> None:
        """Compiles a program for each of ``shapes`` (batch, cameras, prompt slots) that has none, side by side, as XLA keeps one core busy each."""
        missing = [shape for shape in shapes if shape not in self._programs]
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="planner-compile") as threads:
            self._programs.update(zip(missing, threads.map(lambda shape: self._compile(*shape), missing), strict=True))
        if missing:
            logger.info("compiled %d planner programs in %.1f s", len(missing), time.perf_counter() - started)

    def __call__(self, prefix: Prefix, max_tokens: int) -> Decoded:
        """Runs :func:`decode` and waits until the result is on the host, as numpy arrays."""
        batch, cameras = prefix.image_mask.shape
        shape = (batch, cameras, prefix.tokens.shape[1])
        if shape not in self._programs:
            self.compile([shape])
        result: Decoded = jax.device_get(self._programs[shape](self.params, prefix=prefix, max_tokens=np.int32(max_tokens)))
        return result

    def _compile(self, batch: int, cameras: int, prompt_slots: int) -> Any:
        prefix = Prefix(
            images=np.empty((batch, cameras, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32),
            image_mask=np.empty((batch, cameras), np.bool_),
            tokens=np.empty((batch, prompt_slots), np.int32),
            token_mask=np.empty((batch, prompt_slots), np.bool_),
        )
        program = jax.jit(functools.partial(decode, dims=self.dims))
        # Without this, float32 products are TF32 or bfloat16 ones on accelerators. bfloat16 products are not affected.
        with jax.default_matmul_precision("highest"):
            return program.lower(self.params, prefix=prefix, max_tokens=np.int32(1)).compile()
