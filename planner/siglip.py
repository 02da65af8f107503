"""The SigLIP image tower (reference/model.md §2): images → tokens as wide as the language model.

The numerics, bfloat16 ones included, are those of openpi's JAX model: patches and layer-norm statistics in float32, attention
logits and softmax in the compute dtype. Layers run with one scan over the stacked leaves, so depth costs no compile time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pi0.param_tree import VisionDims

_LAYER_NORM_EPSILON = 1e-6


@struct.dataclass
class LayerNormParams:
    """``[D]`` each, ``[layers, D]`` when stacked."""

    scale: jax.Array
    bias: jax.Array


@struct.dataclass
class DenseParams:
    """A linear layer in the checkpoint's layout; attention projections keep their head axes."""

    kernel: jax.Array
    bias: jax.Array


@struct.dataclass
class EncoderBlockParams:
    """One pre-norm block; every leaf has a leading layer axis when stacked. V heads of size U, width D, MLP width F."""

    norm_attention: LayerNormParams
    query: DenseParams
    """``[D, V, U]``, ``[V, U]``"""
    key: DenseParams
    value: DenseParams
    out: DenseParams
    """``[V, U, D]``, ``[D]``"""
    norm_mlp: LayerNormParams
    mlp_in: DenseParams
    """``[D, F]``, ``[F]``"""
    mlp_out: DenseParams


@struct.dataclass
class SiglipParams:
    """All weights of the tower. ``patch.kernel`` is ``[patch, patch, 3, D]``, ``head`` maps to the language model's width."""

    patch: DenseParams
    position: jax.Array
    blocks: EncoderBlockParams
    norm: LayerNormParams
    head: DenseParams


def encode_images(params: SiglipParams, dims: VisionDims, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``images`` ``[B, 224, 224, 3]`` float32 in [-1, 1] → ``[B, tokens, W]`` of ``dtype``, patches in row-major order."""
    x = _embed_patches(params, dims, images).astype(dtype)
    x, _ = lax.scan(lambda carry, block: (_encoder_block(block, carry), None), x, params.blocks)
    return _dense("btd,dw->btw", _layer_norm(x, params.norm), params.head)


def _embed_patches(params: SiglipParams, dims: VisionDims, images: jax.Array) -> jax.Array:
    """``[B, tokens, D]`` float32, whatever dtype the weights have: a stride-``patch`` convolution as one matrix product."""
    batch, grid, patch = images.shape[0], images.shape[1] // dims.patch, dims.patch
    # VALID padding: pixels beyond the last whole patch are not seen.
    pixels = images[:, : grid * patch, : grid * patch].astype(jnp.float32)
    patches = pixels.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, patch * patch * 3)
    kernel = params.patch.kernel.astype(jnp.float32).reshape(patch * patch * 3, dims.width)
    tokens = jnp.matmul(patches, kernel, precision=lax.Precision.HIGHEST)
    return tokens + params.patch.bias.astype(jnp.float32) + params.position.astype(jnp.float32)


def _encoder_block(block: EncoderBlockParams, x: jax.Array) -> jax.Array:
    x = x + _attention(block, _layer_norm(x, block.norm_attention))
    hidden = jax.nn.gelu(_dense("btd,df->btf", _layer_norm(x, block.norm_mlp), block.mlp_in), approximate=True)
    return x + _dense("btf,fd->btd", hidden, block.mlp_out)


def _attention(block: EncoderBlockParams, x: jax.Array) -> jax.Array:
    query, key, value = (_dense("btd,dnh->btnh", x, projection) for projection in (block.query, block.key, block.value))
    # The divisor is rounded to the compute dtype: for 72-wide heads in bfloat16 it is exactly 8.5, and released weights expect it.
    query = query / jnp.sqrt(query.shape[-1]).astype(x.dtype)
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key), axis=-1)
    return _dense("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, value), block.out)


def _layer_norm(x: jax.Array, params: LayerNormParams) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean))
    scale = lax.rsqrt(variance + _LAYER_NORM_EPSILON) * params.scale.astype(jnp.float32)
    return ((wide - mean) * scale + params.bias.astype(jnp.float32)).astype(x.dtype)


def _dense(contraction: str, x: jax.Array, params: DenseParams) -> jax.Array:
    return jnp.einsum(contraction, x, params.kernel.astype(x.dtype)) + params.bias.astype(x.dtype)
