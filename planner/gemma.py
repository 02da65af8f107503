"""The language model: PaliGemma's Gemma, expert 0 of pi0 and pi0.5 (reference/model.md §4).

Two passes share the weights. :func:`prefix_pass` reads images and prompt at once and returns the keys and values that every
later token attends to; :func:`decode_pass` runs one token against those and against a preallocated buffer of the tokens
generated so far, into which it writes in place. Layers run with one scan over the stacked leaves, so depth costs no compile
time; only the last of the prefix pass, which computes less, stands apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pi0.param_tree import BackboneDims

_RMS_NORM_EPSILON = 1e-6
_ROPE_BASE = 10_000.0
_MASKED_LOGIT = -2.3819763e38
"""What replaces (not: is added to) the logit of a key that may not be seen."""

_LOGITS_IN_CACHE, _FEWEST_QUERIES = 1 << 19, 16


@struct.dataclass
class GemmaBlockParams:
    """One block; every leaf has a leading layer axis when stacked. N heads, K kv heads, head size H, width W, MLP width F."""

    norm_attention: jax.Array
    """``[W]``, an offset from 1"""
    qkv: jax.Array
    """``[W, (N + 2K)·H]``: queries, keys, values side by side, so a decoded token reads one matrix"""
    out: jax.Array
    """``[N·H, W]``"""
    norm_mlp: jax.Array
    gate: jax.Array
    """``[W, F]``"""
    up: jax.Array
    down: jax.Array
    """``[F, W]``"""


@struct.dataclass
class GemmaParams:
    """All weights of the language model. The output head is the embedding itself."""

    embedding: jax.Array
    """``[vocabulary, W]``"""
    blocks: GemmaBlockParams
    norm: jax.Array


@struct.dataclass
class KeysValues:
    """Keys (rotated) and values of all layers, each ``[L, B, S, K, H]``."""

    keys: jax.Array
    values: jax.Array


def empty_cache(dims: BackboneDims, batch: int, capacity: int, dtype: jnp.dtype) -> KeysValues:
    """Room for ``capacity`` generated tokens per row."""
    zeros = jnp.zeros((dims.depth, batch, capacity, dims.kv_heads, dims.head_dim), dtype)
    return KeysValues(zeros, zeros)


def embed_tokens(params: GemmaParams, ids: jax.Array) -> jax.Array:
    """``ids`` ``[…]`` → ``[…, W]``, times sqrt(W) rounded to the table's dtype, as the reference rounds it."""
    table = params.embedding
    return table[ids] * jnp.sqrt(table.shape[-1]).astype(table.dtype)


def final_norm(params: GemmaParams, x: jax.Array) -> jax.Array:
    """The norm between the last block and the output head."""
    return _rms_norm(x, params.norm)


def prefix_pass(
    params: GemmaParams, dims: BackboneDims, x: jax.Array, mask: jax.Array, read: jax.Array, tail_sees: jax.Array | None = None
) -> tuple[jax.Array, KeysValues]:
    """Runs the whole prefix: every token sees every valid one. With a tail, also tokens that might follow it.

    Of the last block, what is not read is not computed but for its keys and values: nearly all of it, where only an answer is asked for.

    Args:
        x: ``[B, S + N, W]`` embeddings, of the prefix and of the N tokens of the tail.
        mask: ``[B, S]``, which of the prefix are valid. Only keys are masked: what comes out at an invalid position is never read,
            and a row of logits without any visible key cannot arise.
        read: ``[B, R]``, at which of the S + N tokens the hidden state is wanted.
        tail_sees: ``[B, N, N]``, which tokens of the tail each of them sees beside the prefix: itself and those between the prefix and it. Nothing
            before the tail sees it, so they come out as :func:`decode_pass` would give them one by one.

    Returns:
        ``[B, R, W]`` hidden states before the final norm, and keys and values of all.
    """
    length = mask.shape[1]
    positions = jnp.cumsum(mask, axis=-1) - 1
    visible = mask[:, None, :]
    if tail_sees is not None:
        behind = tail_sees.shape[1]
        positions = jnp.concatenate([positions, mask.sum(-1, keepdims=True) + tail_sees.sum(-1) - 1], axis=1)
        before_tail = jnp.broadcast_to(visible, (*tail_sees.shape[:2], length))
        tail_visible = jnp.concatenate([before_tail, tail_sees], axis=2)

    def layer(x: jax.Array, index: jax.Array) -> tuple[jax.Array, KeysValues]:
        block = _block(params, index)
        query, key, value = _project(block, dims, _rms_norm(x, block.norm_attention), positions)
        # The prefix attends to itself in the operations of a pass without a tail, whose mask is small.
        attended = _attention(query[:, :length], key[:, :length], value[:, :length], visible)
        if tail_sees is not None:
            attended = jnp.concatenate([attended, _attention(query[:, length:], key, value, tail_visible)], axis=1)
        return _finish_block(block, x, attended), KeysValues(key, value)

    x, before = lax.scan(layer, x, jnp.arange(dims.depth - 1))
    last, own = _block(params, dims.depth - 1), dims.heads * dims.head_dim
    y = _rms_norm(x, last.norm_attention)
    key, value = _keys_values(dims, y @ last.qkv[:, own:], positions)
    x, y = (jnp.take_along_axis(tokens, read[..., None], axis=1) for tokens in (x, y))
    query = _queries(dims, y @ last.qkv[:, :own], jnp.take_along_axis(positions, read, axis=1))
    seen = visible
    if tail_sees is not None:
        views = jnp.concatenate([jnp.pad(visible, ((0, 0), (0, 0), (0, behind))), tail_visible], axis=1)
        seen = jnp.take_along_axis(views, jnp.maximum(read - length + 1, 0)[..., None], axis=1)
    cache = jax.tree.map(lambda layers, own: jnp.concatenate([layers, own[None]]), before, KeysValues(key, value))
    return _finish_block(last, x, _attention(query, key, value, seen)), cache


def decode_pass(
    params: GemmaParams,
    dims: BackboneDims,
    x: jax.Array,
    step: jax.Array,
    positions: jax.Array,
    prefix: KeysValues,
    prefix_mask: jax.Array,
    cache: KeysValues,
) -> tuple[jax.Array, KeysValues]:
    """Runs one generated token per row.

    Args:
        x: ``[B, 1, W]`` its embedding.
        step: scalar, its slot in ``cache``; slots before it hold the tokens generated earlier.
        positions: ``[B, 1]`` its position, counting valid tokens only.
        prefix: keys and values of :func:`prefix_pass`, only read.
        prefix_mask: ``[B, S]``.
        cache: ``[L, B, capacity, K, H]``; given back with slot ``step`` written.

    Returns:
        ``[B, 1, W]`` hidden states before the final norm, and the cache.
    """
    prefix_length = prefix.keys.shape[2]
    visible_prefix = prefix_mask[:, None, None, None, :]
    visible_cache = jnp.arange(cache.keys.shape[2]) <= step

    def layer(
        carry: tuple[jax.Array, KeysValues], inputs: tuple[GemmaBlockParams, KeysValues, jax.Array]
    ) -> tuple[tuple[jax.Array, KeysValues], None]:
        x, cache = carry
        block, prefix, index = inputs
        query, key, value = _project(block, dims, _rms_norm(x, block.norm_attention), positions)
        slot = (index, 0, step, 0, 0)
        cache = KeysValues(lax.dynamic_update_slice(cache.keys, key[None], slot), lax.dynamic_update_slice(cache.values, value[None], slot))
        own = jax.tree.map(lambda buffer: lax.dynamic_index_in_dim(buffer, index, keepdims=False), cache)
        # Two products instead of one over concatenated keys: joining prefix and cache would copy both at every layer of every token.
        logits = jnp.concatenate(
            [
                jnp.where(visible_prefix, _logits(query, prefix.keys), _MASKED_LOGIT),
                jnp.where(visible_cache, _logits(query, own.keys), _MASKED_LOGIT),
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        attended = _attend(weights[..., :prefix_length], prefix.values) + _attend(weights[..., prefix_length:], own.values)
        return (_finish_block(block, x, attended.astype(x.dtype)), cache), None

    (x, cache), _ = lax.scan(layer, (x, cache), (params.blocks, prefix, jnp.arange(dims.depth)))
    return x, cache


def _block(params: GemmaParams, index: jax.Array | int) -> GemmaBlockParams:
    """One of the stacked blocks. (A slice of many of them would be a copy of most of the weights.)"""
    block: GemmaBlockParams = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), params.blocks)
    return block


def _project(block: GemmaBlockParams, dims: BackboneDims, y: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised input ``[B, T, W]`` → :func:`_queries`, and keys and values, in one product."""
    own = dims.heads * dims.head_dim
    qkv = y @ block.qkv
    return _queries(dims, qkv[..., :own], positions), *_keys_values(dims, qkv[..., own:], positions)


def _queries(dims: BackboneDims, projected: jax.Array, positions: jax.Array) -> jax.Array:
    """``[B, T, N·H]`` → rotated and scaled queries ``[B, T, K, N/K, H]``."""
    heads, kv_heads, head_dim = dims.heads, dims.kv_heads, dims.head_dim
    query = _rotate(projected.reshape(*positions.shape, heads, head_dim), positions) * head_dim**-0.5
    return query.reshape(*positions.shape, kv_heads, heads // kv_heads, head_dim)


def _keys_values(dims: BackboneDims, projected: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[B, T, 2K·H]`` → rotated keys and values ``[B, T, K, H]``."""
    key, value = jnp.split(projected.reshape(*positions.shape, 2 * dims.kv_heads, dims.head_dim), 2, axis=2)
    return _rotate(key, positions), value


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """What T queries ``[B, T, K, N/K, H]`` gather from S keys and values ``[B, S, K, H]``, each from those ``visible`` ``[B, T or 1, S]`` to it.

    On a CPU in pieces whose logits stay in its cache, half the time of all at once; an accelerator would rather have few large operations.
    """
    batch, length, kv_heads, group, _ = query.shape

    def piece(query: jax.Array, visible: jax.Array) -> jax.Array:
        logits = jnp.where(visible[:, None, :, None, :], _logits(query, key), _MASKED_LOGIT)
        return _attend(jax.nn.softmax(logits, axis=-1).astype(query.dtype), value).astype(query.dtype)

    of_one_query = kv_heads * group * key.shape[1]
    if jax.default_backend() != "cpu" or length * of_one_query <= _LOGITS_IN_CACHE:
        return piece(query, visible)
    size = max(_FEWEST_QUERIES, _LOGITS_IN_CACHE // (batch * of_one_query))
    pieces = -(-length // size)
    visible = jnp.broadcast_to(visible, (batch, length, key.shape[1]))

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, pieces * size - length), *((0, 0),) * (x.ndim - 2)))
        return padded.reshape(batch, pieces, size, *x.shape[2:]).swapaxes(0, 1)

    attended = lax.map(lambda inputs: piece(*inputs), (cut(query), cut(visible)))
    return attended.swapaxes(0, 1).reshape(batch, pieces * size, *query.shape[2:])[:, :length]


def _logits(query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum("btkgh,bskh->bktgs", query, key, preferred_element_type=jnp.float32)


def _attend(weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.einsum("bktgs,bskh->btkgh", weights, value, preferred_element_type=jnp.float32)


def _finish_block(block: GemmaBlockParams, x: jax.Array, attended: jax.Array) -> jax.Array:
    """Output projection of ``attended`` ``[B, T, K, N/K, H]`` and the GeGLU MLP, each added to the stream."""
    x = x + attended.reshape(*x.shape[:2], -1) @ block.out
    y = _rms_norm(x, block.norm_mlp)
    return x + (jax.nn.gelu(y @ block.gate, approximate=True) * (y @ block.up)) @ block.down


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    normalised = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _RMS_NORM_EPSILON)
    # 1 + scale is summed in the dtype of scale: the reference rounds it there.
    return (normalised * (1 + scale)).astype(x.dtype)


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout (reference/model.md §4.6), in float32. x ``[B, T, n, H]``, positions ``[B, T]``."""
    half = x.shape[-1] // 2
    timescale = _ROPE_BASE ** (2.0 / x.shape[-1] * jnp.arange(half, dtype=jnp.float32))
    angle = (positions[..., None].astype(jnp.float32) / timescale)[:, :, None, :]
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
