"""The language model: PaliGemma's Gemma, expert 0 of pi0 and pi0.5 (reference/model.md §4).

Two passes share the weights. :func:`prefix_pass` reads many tokens at once and leaves their keys and values in a preallocated
cache; :func:`decode_pass` runs one token against that cache and writes its own there, in place. Layers run with one scan over
the stacked leaves, so depth costs no compile time; only the last of the prefix pass, which computes less, stands apart.
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

Turn = tuple[jax.Array, jax.Array]

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
    """Room for ``capacity`` tokens per row."""
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
    params: GemmaParams, dims: BackboneDims, x: jax.Array, positions: jax.Array, visible: jax.Array, read: jax.Array, capacity: int
) -> tuple[jax.Array, KeysValues]:
    """Runs S tokens at once.

    Of the last block, what is not read is not computed but for its keys and values: nearly all of it, where only an answer is asked for.

    Args:
        x: ``[B, S, W]`` embeddings.
        positions: ``[B, S]``.
        visible: ``[B, S, S]``, which tokens each of them attends to, at least one.
        read: ``[B, R]``, at which of the S tokens the hidden state is wanted.
        capacity: of the cache, at least S.

    Returns:
        ``[B, R, W]`` hidden states before the final norm, and the keys and values of all, in slots 0 … S - 1 of a cache.
    """
    turn = _turn(dims, positions)

    def layer(carry: tuple[jax.Array, KeysValues], index: jax.Array) -> tuple[tuple[jax.Array, KeysValues], None]:
        x, cache = carry
        block = _block(params, index)
        query, key, value = _project(block, dims, _rms_norm(x, block.norm_attention), turn)
        x = _finish_block(block, x, _attention(query, key, value, visible))
        return (x, _written(cache, KeysValues(key, value), index, 0)), None

    start = x, empty_cache(dims, len(x), capacity, x.dtype)
    (x, cache), _ = lax.scan(layer, start, jnp.arange(dims.depth - 1))
    last, own = _block(params, dims.depth - 1), dims.heads * dims.head_dim
    y = _rms_norm(x, last.norm_attention)
    key, value = _keys_values(dims, y @ last.qkv[:, own:], turn)
    x, y, seen = (jnp.take_along_axis(tokens, read[..., None], axis=1) for tokens in (x, y, visible))
    query = _queries(dims, y @ last.qkv[:, :own], _turn(dims, jnp.take_along_axis(positions, read, axis=1)))
    return _finish_block(last, x, _attention(query, key, value, seen)), _written(cache, KeysValues(key, value), dims.depth - 1, 0)


def decode_pass(
    params: GemmaParams, dims: BackboneDims, x: jax.Array, positions: jax.Array, visible: jax.Array, slot: jax.Array, cache: KeysValues
) -> tuple[jax.Array, KeysValues]:
    """Runs one generated token per row.

    Args:
        x: ``[B, 1, W]`` its embedding.
        positions: ``[B, 1]`` its position, counting valid tokens only.
        visible: ``[B, capacity]``, which slots of the cache it attends to, its own one included.
        slot: scalar, where its keys and values go.
        cache: those of the tokens before it; given back with ``slot`` written.

    Returns:
        ``[B, 1, W]`` hidden states before the final norm, and the cache.
    """
    turn = _turn(dims, positions)

    def layer(carry: tuple[jax.Array, KeysValues], inputs: tuple[GemmaBlockParams, jax.Array]) -> tuple[tuple[jax.Array, KeysValues], None]:
        x, cache = carry
        block, index = inputs
        query, key, value = _project(block, dims, _rms_norm(x, block.norm_attention), turn)
        cache = _written(cache, KeysValues(key, value), index, slot)
        keys, values = (lax.dynamic_index_in_dim(buffer, index, keepdims=False) for buffer in (cache.keys, cache.values))
        return (_finish_block(block, x, _attention(query, keys, values, visible[:, None])), cache), None

    (x, cache), _ = lax.scan(layer, (x, cache), (params.blocks, jnp.arange(dims.depth)))
    return x, cache


def _written(cache: KeysValues, new: KeysValues, layer: jax.Array | int, slot: jax.Array | int) -> KeysValues:
    """The cache with ``new`` (of one layer, ``[B, T, K, H]``) in its slots from ``slot`` on; in place, where the cache is a loop's."""
    at = (layer, 0, slot, 0, 0)
    return KeysValues(lax.dynamic_update_slice(cache.keys, new.keys[None], at), lax.dynamic_update_slice(cache.values, new.values[None], at))


def _block(params: GemmaParams, index: jax.Array | int) -> GemmaBlockParams:
    """One of the stacked blocks. (A slice of many of them would be a copy of most of the weights.)"""
    block: GemmaBlockParams = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), params.blocks)
    return block


def _project(block: GemmaBlockParams, dims: BackboneDims, y: jax.Array, turn: Turn) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised input ``[B, T, W]`` → :func:`_queries`, and keys and values, in one product."""
    own = dims.heads * dims.head_dim
    qkv = y @ block.qkv
    return _queries(dims, qkv[..., :own], turn), *_keys_values(dims, qkv[..., own:], turn)


def _queries(dims: BackboneDims, projected: jax.Array, turn: Turn) -> jax.Array:
    """``[B, T, N·H]`` → rotated and scaled queries ``[B, T, K, N/K, H]``."""
    heads, kv_heads, head_dim = dims.heads, dims.kv_heads, dims.head_dim
    query = _rotate(projected.reshape(*projected.shape[:2], heads, head_dim), turn) * head_dim**-0.5
    return query.reshape(*projected.shape[:2], kv_heads, heads // kv_heads, head_dim)


def _keys_values(dims: BackboneDims, projected: jax.Array, turn: Turn) -> tuple[jax.Array, jax.Array]:
    """``[B, T, 2K·H]`` → rotated keys and values ``[B, T, K, H]``."""
    key, value = jnp.split(projected.reshape(*projected.shape[:2], 2 * dims.kv_heads, dims.head_dim), 2, axis=2)
    return _rotate(key, turn), value


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array) -> jax.Array:
    """What T queries ``[B, T, K, N/K, H]`` gather from S keys and values ``[B, S, K, H]``, each from those ``visible`` ``[B, T, S]`` to it.

    On a CPU in pieces whose logits stay in its cache, half the time of all at once; an accelerator would rather have few large operations.
    """
    batch, length, kv_heads, group, head_dim = query.shape

    def piece(query: jax.Array, visible: jax.Array) -> jax.Array:
        # Queries of all heads in one axis: with them apart, XLA would turn the weights around before it multiplies by them.
        rows = query.swapaxes(1, 2).reshape(batch, kv_heads, -1, head_dim)
        logits = jnp.einsum("bkqh,bskh->bkqs", rows, key, preferred_element_type=jnp.float32)
        seen = jnp.repeat(visible[:, None], group, axis=2)
        weights = jax.nn.softmax(jnp.where(seen, logits, _MASKED_LOGIT), axis=-1).astype(query.dtype)
        attended = jnp.einsum("bkqs,bskh->bkqh", weights, value, preferred_element_type=jnp.float32).astype(query.dtype)
        return attended.reshape(batch, kv_heads, -1, group, head_dim).swapaxes(1, 2)

    of_one_query = kv_heads * group * key.shape[1]
    if jax.default_backend() != "cpu" or length * of_one_query <= _LOGITS_IN_CACHE:
        return piece(query, visible)
    size = min(length, max(_FEWEST_QUERIES, _LOGITS_IN_CACHE // (batch * of_one_query)))

    def with_piece(number: jax.Array, attended: jax.Array) -> jax.Array:
        first = jnp.minimum(number * size, length - size)  # the last one begins in the one before, so that all are of one size
        own = (lax.dynamic_slice_in_dim(tokens, first, size, axis=1) for tokens in (query, visible))
        return lax.dynamic_update_slice_in_dim(attended, piece(*own), first, axis=1)

    return lax.fori_loop(0, -(-length // size), with_piece, jnp.zeros_like(query))


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


def _turn(dims: BackboneDims, positions: jax.Array) -> Turn:
    """By how much tokens at ``positions`` ``[B, T]`` are rotated, the same in every block: sine and cosine ``[B, T, 1, H/2]``, float32."""
    half = dims.head_dim // 2
    timescale = _ROPE_BASE ** (2.0 / dims.head_dim * jnp.arange(half, dtype=jnp.float32))
    angle = (positions[..., None].astype(jnp.float32) / timescale)[:, :, None, :]
    return jnp.sin(angle), jnp.cos(angle)


def _rotate(x: jax.Array, turn: Turn) -> jax.Array:
    """Rotary embedding in the half-split layout (reference/model.md §4.6), in float32. x ``[B, T, n, H]``."""
    sine, cosine = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
