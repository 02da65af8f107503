"""An independent greedy decoder in numpy: recomputes everything for every token, no cache, no padding, no masks.

A camera that is absent is simply not in the sequence and the prompt has no padding, so it shows what masking and counting
positions must amount to. Written from reference/model.md §2–5 on the checkpoint's own leaves, in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.param_tree import ATTENTION, BLOCK, IMG, LAYERS, LLM, BackboneDims, backbone_shapes

Array = NDArray[Any]


class RandomParams:
    """A source of random leaves for a model of any size, or of any leaves: ``shapes`` may be edited before it is read."""

    def __init__(self, dims: BackboneDims, *, seed: int = 0) -> None:
        self._shapes = backbone_shapes(dims)
        self._seed = seed

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, dtype: np.dtype[Any] | None = None) -> Array:
        shape = self._shapes[name]
        values = np.random.default_rng([self._seed, zlib.crc32(name.encode())]).standard_normal(shape)
        if name == f"{LLM}/final_norm/scale":
            # 1 + scale of either sign: with a plain final norm the tied head would repeat the last token for ever.
            values -= 1
        scale = 0.3 if "bias" in name or "_norm/" in name else 1.0 if len(shape) < 3 else 2 * shape[-2] ** -0.5
        if name in (f"{LLM}/final_norm/scale", f"{LLM}/embedder/input_embedding"):
            scale = 1.0
        return (values * scale).astype(dtype or np.float32)


class Oracle:
    """Greedy decoding with the leaves of a checkpoint."""

    def __init__(self, source: Any, dims: BackboneDims) -> None:
        self._leaves = {name: source.read(name).astype(np.float64) for name in backbone_shapes(dims)}
        self._dims = dims

    def generate(self, images: Sequence[Array], prompt: Sequence[int], allowed: Array, max_tokens: int) -> tuple[list[int], float, float]:
        """(tokens, log-probability, smallest gap between best and second-best logit) for images ``[224, 224, 3]`` in [-1, 1]."""
        seen = np.concatenate([self.encode_image(image) for image in images])
        tokens: list[int] = []
        logprob, margin = 0.0, np.inf
        while len(tokens) < max_tokens and (not tokens or tokens[-1] != 1):
            logits = self.next_logits(seen, [*prompt, *tokens], len(seen) + len(prompt))[allowed]
            best = int(np.argmax(logits))
            ordered = np.sort(logits)
            margin = min(margin, ordered[-1] - ordered[-2])
            logprob -= float(np.log(np.exp(logits - logits[best]).sum()))
            tokens.append(int(allowed[best]))
        return tokens, logprob, margin

    def encode_image(self, image: Array) -> Array:
        w, dims = self._leaves, self._dims.vision
        patch, grid = dims.patch, 224 // dims.patch
        corners = [(row * patch, column * patch) for row in range(grid) for column in range(grid)]
        patches = np.stack([image[y : y + patch, x : x + patch] for y, x in corners]).astype(np.float64)
        x = np.tensordot(patches, w[f"{IMG}/embedding/kernel"], 3) + w[f"{IMG}/embedding/bias"] + w[f"{IMG}/pos_embedding"][0]
        for layer in range(dims.depth):
            y = self._layer_norm(x, f"{BLOCK}/LayerNorm_0", layer)
            heads = []
            for head in range(dims.heads):
                q, k, v = (
                    y @ w[f"{ATTENTION}/{part}/kernel"][layer, :, head] + w[f"{ATTENTION}/{part}/bias"][layer, head]
                    for part in ("query", "key", "value")
                )
                heads.append(_softmax(q @ k.T / np.sqrt(dims.head_dim)) @ v @ w[f"{ATTENTION}/out/kernel"][layer, head])
            x = x + sum(heads) + w[f"{ATTENTION}/out/bias"][layer]
            y = self._layer_norm(x, f"{BLOCK}/LayerNorm_1", layer)
            y = _gelu(y @ w[f"{BLOCK}/MlpBlock_0/Dense_0/kernel"][layer] + w[f"{BLOCK}/MlpBlock_0/Dense_0/bias"][layer])
            x = x + y @ w[f"{BLOCK}/MlpBlock_0/Dense_1/kernel"][layer] + w[f"{BLOCK}/MlpBlock_0/Dense_1/bias"][layer]
        x = self._layer_norm(x, f"{IMG}/Transformer/encoder_norm", ...)
        return x @ w[f"{IMG}/head/kernel"] + w[f"{IMG}/head/bias"]

    def next_logits(self, seen: Array, ids: Sequence[int], prefix: int) -> Array:
        """Logits over the vocabulary after image tokens ``seen`` and ``ids``; the first ``prefix`` tokens all see each other."""
        w, dims = self._leaves, self._dims
        embedding = w[f"{LLM}/embedder/input_embedding"]
        x = np.concatenate([seen, embedding[list(ids)] * np.sqrt(dims.vlm.width)])
        index = np.arange(len(x))
        visible = (index[None] < prefix) | (index[None] <= index[:, None])
        for layer in range(dims.depth):
            y = _rms_norm(x, w[f"{LAYERS}/pre_attention_norm/scale"][layer])
            for head in range(dims.heads):
                q, k, v = self._projections(y, layer, head)
                logits = np.where(visible, _rotate(q) @ _rotate(k).T / np.sqrt(dims.head_dim), -np.inf)
                x = x + _softmax(logits) @ v @ w[f"{LAYERS}/attn/attn_vec_einsum/w"][layer, head]
            y = _rms_norm(x, w[f"{LAYERS}/pre_ffw_norm/scale"][layer])
            gate, up = w[f"{LAYERS}/mlp/gating_einsum"][layer]
            x = x + (_gelu(y @ gate) * (y @ up)) @ w[f"{LAYERS}/mlp/linear"][layer]
        return np.asarray(_rms_norm(x[-1], w[f"{LLM}/final_norm/scale"]) @ embedding.T)

    def _projections(self, y: Array, layer: int, head: int) -> tuple[Array, Array, Array]:
        w, attn = self._leaves, f"{LAYERS}/attn"
        if f"{attn}/qkv_einsum/w" in w:
            q, k, v = w[f"{attn}/qkv_einsum/w"][layer, :, head]
        else:
            q = w[f"{attn}/q_einsum/w"][layer, head]
            k, v = w[f"{attn}/kv_einsum/w"][layer, :, head * self._dims.kv_heads // self._dims.heads]
        return y @ q, y @ k, y @ v

    def _layer_norm(self, x: Array, name: str, at: Any) -> Array:
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return np.asarray(normal * self._leaves[f"{name}/scale"][at] + self._leaves[f"{name}/bias"][at])


def _rms_norm(x: Array, scale: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale))


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def _rotate(x: Array) -> Array:
    """Pairs (i, i + H/2) turned as complex numbers; row r has position r."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] / 10_000 ** (np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], axis=-1)
