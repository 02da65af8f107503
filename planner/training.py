"""Teaches a planner: the loss, over the very functions that serve, and the step that lowers it.

Cross-entropy on the tokens of the right subtask, answers fed back as in decoding, all positions of an answer in one pass. Nothing here is
imported by a server.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import struct
from numpy.typing import NDArray

from pi0.param_tree import BackboneDims
from pi0.tokenizer import PAD_ID
from planner import gemma, siglip
from planner.export import backbone_leaves
from planner.restore import restore


@struct.dataclass
class Probe:
    """A linear read-out of ``C`` classes at marked words of the prompt; it helps training and is dropped afterwards."""

    kernel: jax.Array
    """``[W, C]``"""


@struct.dataclass
class SubtaskBatch:
    """``B`` pictures and prompts with the right answers; P prompt and T answer slots, padded on the right."""

    images: Any
    """``[B, side, side, 3]`` uint8, one camera"""
    prompt: Any
    """``[B, P]`` int32"""
    answer: Any
    """``[B, T]`` int32, the end of text included"""
    probed: Any
    """``[B, P]`` int32: the class that the probe is to find at this token, -1 where none"""


def pixels(images: jax.Array) -> jax.Array:
    """uint8 → float32 in [-1, 1], as the planner prepares its cameras."""
    return images.astype(jnp.float32) / 127.5 - 1


def subtask_hidden(language: gemma.GemmaParams, vision: siglip.SiglipParams, dims: BackboneDims, batch: SubtaskBatch) -> tuple[jax.Array, jax.Array]:
    """Hidden states after the final norm: ``[B, P, W]`` at the prompt, and ``[B, T, W]`` where each answer token is predicted."""
    slots = batch.prompt.shape[1]
    given = batch.answer[:, :-1]  # each is what the next one is predicted from
    tokens = jnp.concatenate([batch.prompt, given], axis=1)
    images = siglip.encode_images(vision, dims.vision, pixels(batch.images), jnp.dtype(jnp.float32))
    x = jnp.concatenate([images, gemma.embed_tokens(language, tokens)], axis=1)
    asked = batch.prompt != PAD_ID
    before, length = images.shape[1], asked.sum(-1, keepdims=True)
    order = jnp.arange(given.shape[1])
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(before + slots), (len(x), before + slots)), before + length + order], axis=1)
    prefix = jnp.concatenate([jnp.ones(images.shape[:2], jnp.bool_), asked], axis=1)
    # Images and prompt see each other; an answer, which is padded on the right only, sees both and itself up to each token.
    visible = jnp.zeros((len(x), x.shape[1], x.shape[1]), jnp.bool_)
    visible = visible.at[:, :, : before + slots].set(prefix[:, None])
    visible = visible.at[:, before + slots :, before + slots :].set(order <= order[:, None])
    text = jnp.broadcast_to(jnp.arange(before, x.shape[1]), tokens.shape)
    hidden, _ = gemma.prefix_pass(language, dims, x, positions, visible, text, x.shape[1])
    hidden = gemma.final_norm(language, hidden)
    first = jnp.take_along_axis(hidden, length[..., None] - 1, axis=1)
    return hidden[:, :slots], jnp.concatenate([first, hidden[:, slots:]], axis=1)


def subtask_loss(
    language: gemma.GemmaParams, probe: Probe, vision: siglip.SiglipParams, batch: SubtaskBatch, *, dims: BackboneDims, probe_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the answers' tokens, plus ``probe_weight`` times that of the probe.

    Returns:
        the loss; ``loss`` and ``probe``, its parts; ``right``, the share of answers all of whose tokens greedy decoding would have chosen.
    """
    at_prompt, at_answer = subtask_hidden(language, vision, dims, batch)
    logits = at_answer @ language.embedding.T
    wanted = batch.answer != PAD_ID
    loss = (optax.softmax_cross_entropy_with_integer_labels(logits, batch.answer) * wanted).sum() / wanted.sum()
    right = ((logits.argmax(-1) == batch.answer) | ~wanted).all(-1).mean()
    probed = batch.probed >= 0
    probe_loss = optax.softmax_cross_entropy_with_integer_labels(at_prompt @ probe.kernel, jnp.maximum(batch.probed, 0))
    probe_loss = (probe_loss * probed).sum() / jnp.maximum(probed.sum(), 1)
    return loss + probe_weight * probe_loss, {"loss": loss, "probe": probe_loss, "right": right}


def optimiser(steps: int, *, rate: float, warm_up: int = 100, weight_decay: float = 0.01) -> optax.GradientTransformation:
    """Muon on the blocks' matrices, scaled to Adam's size, and Adam with decoupled weight decay on the rest; norm 1 clipping, linear warm-up,
    cosine to 0. (On this family's small models Muon reaches with a third of the steps what Adam alone does.)"""
    warm_up = min(warm_up, max(1, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, max(steps, warm_up + 1))
    update = optax.contrib.muon(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=_decayed,
        adam_b2=0.98,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def _muon_axes(params: Any) -> Any:
    """Which leaves Muon updates, and along which axes: the stacked matrices ``[L, in, out]`` of the blocks."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return optax.contrib.MuonDimensionNumbers(1, 2) if leaf.ndim == 3 and "bias" not in jax.tree_util.keystr(path) else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _decayed(params: Any) -> Any:
    """Which leaves weight decay applies to: neither norms nor biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not any(word in jax.tree_util.keystr(path) for word in ("norm", "bias")), params)


class SubtaskTrainer:
    """A planner that learns, from a checkpoint whose tower can see already.

    Args:
        checkpoint_dir: where it starts; one with as many tokens in its embedding as ``vocabulary``.
        steps: how many there will be; the learning rate falls to 0 over them.
        scale: how much smaller than 224 pixels the pictures are that it is trained on. The stored patch convolution is summed over
            ``scale`` × ``scale`` pixels for it: it sees the average of what it will see.
        classes: of the probe, which is weighted with ``probe_weight`` against the loss of the answers.
        train_tower: whether the vision tower learns, too.
        averaging: how much of the running average stays at each step; less at the beginning, where the average would be of nothing.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        vocabulary: int,
        steps: int,
        *,
        rate: float,
        scale: int,
        classes: int,
        probe_weight: float,
        seed: int,
        train_tower: bool = False,
        averaging: float = 0.998,
    ) -> None:
        params, self._dims = restore(checkpoint_dir, np.arange(vocabulary, dtype=np.int32), np.dtype(np.float32))
        self._scale, patch = scale, self._dims.vision.patch // scale
        self._tower = tower = _with_kernel(params.vision, _coarse(np.asarray(params.vision.patch.kernel), scale))
        self._train_tower = train_tower
        small = dataclasses.replace(self._dims, vision=dataclasses.replace(self._dims.vision, patch=patch))

        width = self._dims.vlm.width
        probe = Probe(jnp.asarray(np.random.default_rng(seed).normal(0, width**-0.5, (width, classes)), jnp.float32))
        # The step takes its arguments' memory for its results, so no two of them may be one.
        start = (params.language, probe, tower) if train_tower else (params.language, probe)
        self._trained, self._averaged = (jax.tree.map(jnp.copy, start) for _ in range(2))
        self._averaging, self._steps = averaging, 0
        update = optimiser(steps, rate=rate)
        self._state = update.init(self._trained)

        def loss(trained: tuple[Any, ...], batch: SubtaskBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            language, probe, *trained_tower = trained
            vision = trained_tower[0] if trained_tower else tower
            return subtask_loss(language, probe, vision, batch, dims=small, probe_weight=probe_weight)

        @partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(trained: Any, state: Any, averaged: Any, keep: Any, batch: SubtaskBatch) -> Any:
            (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained, batch)
            updates, state = update.update(gradient, state, trained)
            trained = optax.apply_updates(trained, updates)
            averaged = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, averaged, trained)
            return trained, state, averaged, metrics

        self._step = step
        self._measure = jax.jit(lambda trained, batch: loss(trained, batch)[1])

    def step(self, batch: SubtaskBatch) -> dict[str, float]:
        """One step; the metrics of ``batch`` before it (:func:`subtask_loss`)."""
        self._steps += 1
        keep = np.float32(min(self._averaging, self._steps / (self._steps + 10)))
        self._trained, self._state, self._averaged, metrics = self._step(self._trained, self._state, self._averaged, keep, batch)
        return {name: float(value) for name, value in metrics.items()}

    def measure(self, batch: SubtaskBatch) -> dict[str, float]:
        """The metrics of the averaged weights."""
        return {name: float(value) for name, value in self._measure(self._averaged, batch).items()}

    def leaves(self) -> dict[str, NDArray[Any]]:
        """The averaged weights as a checkpoint's leaves, for pictures of full size."""
        tower = self._averaged[2] if self._train_tower else self._tower
        kernel = np.asarray(tower.patch.kernel).repeat(self._scale, axis=0).repeat(self._scale, axis=1) / np.float32(self._scale**2)
        return backbone_leaves(_with_kernel(tower, kernel), self._averaged[0], self._dims)


def _coarse(kernel: NDArray[np.float32], scale: int) -> NDArray[np.float32]:
    """A patch convolution ``[patch, patch, 3, D]`` for pictures that are smaller by ``scale``."""
    patch = kernel.shape[0] // scale
    return kernel.reshape(patch, scale, patch, scale, *kernel.shape[2:]).sum(axis=(1, 3))


def _with_kernel(vision: siglip.SiglipParams, kernel: NDArray[np.float32]) -> siglip.SiglipParams:
    tower: siglip.SiglipParams = vision.replace(patch=siglip.DenseParams(jnp.asarray(kernel), vision.patch.bias))  # type: ignore[attr-defined]
    return tower
