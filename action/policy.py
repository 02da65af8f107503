"""The action policy: raw observations in, chunks of robot actions out."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from action.checkpoint import load_model
from action.configs import PolicyConfig, get_config
from action.embodiments.base import Observation
from action.processing import PreparedObservation, Processor
from action.sampler import COMPILE_MODES, FlowSampler, ModelInput
from pi0.errors import CheckpointError, ConfigError, PolicyError, RequestError
from pi0.locations import default_data_home, resolve
from pi0.norm_stats import load_norm_stats
from pi0.tokenizer import OnLongPrompt, PromptTokenizer, find_tokenizer

logger = logging.getLogger(__name__)

MAX_BATCH = 256
"""Observations in one model call; more are served in several."""

Noise = NDArray[np.floating[Any]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sampler(Protocol):
    """What the policy needs of a model: a blocking call that returns when the actions are on the host."""

    def sample(self, inputs: ModelInput, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """``noise`` ``[B, H, A]`` at flow time 1 → normalised actions ``[B, H, A]`` at flow time 0."""


class ActionPolicy:
    """A pi0 or pi0.5 checkpoint behind one robot's interface. Not for concurrent calls: one thread owns it."""

    def __init__(self, config: PolicyConfig, processor: Processor, sampler: Sampler, *, action_dim: int, compiled: bool = False) -> None:
        self.config = config
        self._processor = processor
        self._sampler = sampler
        self._noise_shape = (config.action_horizon, action_dim)
        self._compiled = compiled
        self._max_rows = MAX_BATCH

    @classmethod
    def load(
        cls,
        model_config_name: str | PolicyConfig,
        checkpoint_dir: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        default_prompt: str | None = None,
        num_steps: int = 10,
        on_long_prompt: OnLongPrompt = "error",
        compile_mode: str | None = None,
    ) -> Self:
        """A policy from an openpi, LeRobot or Orbax checkpoint.

        Args:
            model_config_name: an openpi config name, or a config of your own: itself, or its ``module:NAME``.
            checkpoint_dir: the checkpoint root or its ``params/``, local or ``gs://``, ``s3://``, ``hf://``; norm stats come from its ``assets/``.
            tokenizer: a SentencePiece model; None takes the checkpoint's, else the cached PaliGemma one.
            dtype: ``"float32"`` or ``"bfloat16"``; None is bfloat16 on CUDA and float32 elsewhere.
            device: None is CUDA where there is one, else the CPU.
            default_prompt: the instruction for observations without one; goes before the config's own.
            num_steps: denoising steps.
            on_long_prompt: ``"error"`` refuses a prompt that does not fit, ``"truncate"`` cuts it and flags the reply.
            compile_mode: None runs eagerly, else a mode of ``torch.compile``; ``"auto"`` compiles (``default``) on CUDA only, because on
                a CPU compiling costs minutes and gains little.

        Raises:
            ConfigError: an unknown config, dtype, device or compile mode, or no denoising steps.
            CheckpointError: weights, norm stats or tokenizer are missing, or do not fit each other or the config.
        """
        config = model_config_name if isinstance(model_config_name, PolicyConfig) else get_config(model_config_name)
        if num_steps < 1:
            raise ConfigError(f"action.num_steps: got {num_steps}, expected at least 1")
        torch_device = _device(device)
        if compile_mode == "auto":
            compile_mode = "default" if torch_device.type == "cuda" else None
        if compile_mode is not None and compile_mode not in COMPILE_MODES:
            raise ConfigError(f"compile mode: got {compile_mode!r}, expected None (eager), auto, or one of {', '.join(COMPILE_MODES)}")
        torch_dtype = _dtype(dtype, torch_device)
        root = resolve(checkpoint_dir, data_home=default_data_home())
        # The small files first: a wrong name should not cost the minutes that the weights take.
        norm_stats = load_norm_stats(root, config.asset_id, quantiles=config.use_quantiles)
        prompts = PromptTokenizer(find_tokenizer(tokenizer, root))
        model = load_model(root, dtype=torch_dtype, device=torch_device)
        dims = model.dims
        if dims.kind != config.kind:
            raise CheckpointError(
                f"config {config.name!r} is for a {config.kind} model, but the checkpoint {root} is a {dims.kind} one; use a {dims.kind} config"
            )
        if prompts.vocab_size > dims.backbone.vocab_size:
            raise CheckpointError(
                f"tokenizer {prompts.path} has {prompts.vocab_size} tokens, but the model embeds {dims.backbone.vocab_size}; "
                "give the tokenizer that the checkpoint was trained with"
            )
        processor = Processor(config, prompts, norm_stats, dims.action_dim, default_prompt=default_prompt, on_long_prompt=on_long_prompt)
        sampler = FlowSampler(model, num_steps=num_steps, compile_mode=compile_mode)
        logger.info("action policy %s loaded: %s on %s, %d denoising steps", config.name, torch_dtype, torch_device, num_steps)
        return cls(config, processor, sampler, action_dim=dims.action_dim, compiled=compile_mode is not None)

    @property
    def metadata(self) -> dict[str, Any]:
        """What clients are told: the config's ``policy_metadata``, ``image_specs`` and ``action_horizon``. No arrays."""
        extra = copy.deepcopy(dict(self.config.policy_metadata))
        specs = [spec.as_metadata() for spec in self.config.embodiment.image_specs]
        return {**extra, "image_specs": specs, "action_horizon": self.config.action_horizon}

    @property
    def default_prompt(self) -> str | None:
        """The instruction for observations that carry none; None where one is required."""
        return self._processor.default_prompt

    def infer(self, obs: Observation, /, *, noise: Noise | None = None, seed: int | None = None) -> dict[str, Any]:
        """One observation → ``{"actions": float64 [H, d], "policy_timing": {"infer_ms": float}}``.

        ``prompt_truncated`` is there, and True, where the prompt was cut. ``infer_ms`` is the time from the prepared input to
        the model's actions on the host. ``obs`` is not modified.

        Args:
            noise: ``[H, A]`` or ``[1, H, A]``, x at flow time 1.
            seed: draws the noise; the same seed gives the same noise on every machine. With neither, the noise is fresh.

        Raises:
            ObservationError: a key is missing or wrong.
            PolicyError: the model gave actions that are not finite.
            ValueError: both ``noise`` and ``seed``, or noise of the wrong shape.
        """
        if noise is not None and np.shape(noise) == (1, *self._noise_shape):
            noise = np.asarray(noise)[0]
        return self.infer_batch([obs], noise=None if noise is None else [noise], seeds=None if seed is None else [seed])[0]

    def infer_batch(
        self, observations: Sequence[Observation], /, *, noise: Sequence[Noise] | Noise | None = None, seeds: Sequence[int | None] | None = None
    ) -> list[dict[str, Any]]:
        """One model call for several observations; each reply is what :meth:`infer` gives for it.

        More than :data:`MAX_BATCH` observations, or than a compiled model was warmed up for, are served in several calls; ``infer_ms`` is the
        time of all of them.

        Args:
            noise: ``[B, H, A]``, or one ``[H, A]`` per observation.
            seeds: one per observation; None in it for fresh noise.

        Raises:
            As :meth:`infer`; with more than one observation the message says which. One bad observation fails the call.
        """
        if not observations:
            return []
        drawn = self._noise(len(observations), noise, seeds)
        prepared = [self._prepare(observation, row, len(observations)) for row, observation in enumerate(observations)]
        start = time.perf_counter()
        chunks: list[NDArray[np.float32]] = []
        for first in range(0, len(prepared), self._max_rows):
            rows = slice(first, first + self._max_rows)
            chunks.extend(self._sample(prepared[rows], drawn[rows]))
        infer_ms = (time.perf_counter() - start) * 1000
        return [self._reply(chunk, row, infer_ms) for chunk, row in zip(chunks, prepared, strict=True)]

    def example_observation(self, rng: np.random.Generator) -> dict[str, Any]:
        """What a client of this robot sends, drawn from ``rng``."""
        return self.config.embodiment.example(rng)

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        """What the model reads of ``prompt``: ``{"text": str, "token_ids": list[int], "tokens": int, "max_tokens": int, "not_fitting": str}``.

        A pi0.5 prompt carries the robot's state as well; ``text`` shows it for a state that takes as many tokens as any can, every value at
        its upper end, so that what fits here fits with every state. Safe on any thread: the model is not touched.
        """
        state = np.ones(self.config.embodiment.state_dim) if self.config.discrete_state_input else None
        return self._processor.tokenizer.preview_action_prompt(prompt, self.config.max_token_len, state=state)

    def warmup(self, *, max_batch: int = 1) -> None:
        """Runs the model on an example, so that no later call with up to ``max_batch`` observations (at most :data:`MAX_BATCH`) compiles anything.

        Where the model is compiled, that is once per batch size, 1, 2, 4, … up to the first that holds ``max_batch``, and prompt length that
        requests may need. Eager, one run does.

        Raises:
            ValueError: ``max_batch`` is less than 1.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, expected at least 1")
        example = self._processor.prepare(self.example_observation(np.random.default_rng(0)))
        ids = example.prompt.ids
        largest = _program_rows(min(max_batch, MAX_BATCH)) if self._compiled else 1
        lengths = self._processor.buckets if self._compiled else (len(ids),)
        for rows, length in product([2**power for power in range(largest.bit_length())], lengths):
            start = time.perf_counter()
            cut = dataclasses.replace(example, prompt=dataclasses.replace(example.prompt, ids=ids[:length]))
            self._sampler.sample(_model_input([cut] * rows, length), np.zeros((rows, *self._noise_shape), np.float32))
            logger.info("action policy warmed up for %d prompts of %d tokens in %.1f s", rows, length, time.perf_counter() - start)
        if self._compiled:
            self._max_rows = largest

    def _sample(self, prepared: Sequence[PreparedObservation], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """One model call; a compiled model is given a power of two of rows, of which those that fill up repeat the last one and are dropped."""
        count = len(prepared)
        if self._compiled and (fill := _program_rows(count) - count):
            prepared, noise = [*prepared, *[prepared[-1]] * fill], np.concatenate([noise, np.repeat(noise[-1:], fill, axis=0)])
        length = max(len(row.prompt.ids) for row in prepared)
        if self._compiled:
            length = self._processor.bucket(length)
        return self._sampler.sample(_model_input(prepared, length), noise)[:count]

    def _prepare(self, observation: Observation, row: int, count: int) -> PreparedObservation:
        try:
            return self._processor.prepare(observation)
        except RequestError as error:
            if count == 1:
                raise
            raise type(error)(f"observation {row} of the batch of {count}: {error}") from error

    def _noise(self, count: int, noise: Sequence[Noise] | Noise | None, seeds: Sequence[int | None] | None) -> NDArray[np.float32]:
        """``[count, H, A]``."""
        if noise is not None and seeds is not None:
            raise ValueError("noise and seed were both given; give one of them")
        if noise is None:
            generators = [np.random.default_rng(seed) for seed in (seeds if seeds is not None else [None] * count)]
            if len(generators) != count:
                raise ValueError(f"{len(generators)} seeds for {count} observations; give one for each")
            return np.stack([generator.standard_normal(self._noise_shape, np.float32) for generator in generators])
        if len(noise) != count:
            raise ValueError(f"noise for {len(noise)} observations, but there are {count}; give one [H, A] array for each")
        for row in noise:
            array = np.asarray(row)
            if array.shape != self._noise_shape or array.dtype.kind != "f":
                came, expected = f"shape {list(array.shape)} and dtype {array.dtype}", f"{list(self._noise_shape)} floats (horizon, action_dim)"
                raise ValueError(f"noise: got {came}, expected {expected}")
        return np.stack([np.asarray(row, np.float32) for row in noise])

    def _reply(self, chunk: NDArray[np.float32], prepared: PreparedObservation, infer_ms: float) -> dict[str, Any]:
        actions = self._processor.robot_actions(chunk, prepared.state)
        if not np.isfinite(actions).all():
            count = np.count_nonzero(~np.isfinite(actions))
            raise PolicyError(f"{count} of {actions.size} action values are NaN or infinite; check the checkpoint's weights and norm stats")
        reply: dict[str, Any] = {"actions": actions, "policy_timing": {"infer_ms": infer_ms}}
        if prepared.prompt.truncated:
            reply["prompt_truncated"] = True
        return reply


def _program_rows(count: int) -> int:
    """Rows of the compiled program that serves ``count`` observations."""
    return 1 << (count - 1).bit_length()


def _model_input(prepared: Sequence[PreparedObservation], length: int) -> ModelInput:
    """One batch with prompts padded to ``length`` tokens."""
    prompts = [row.prompt.padded(length) for row in prepared]
    return ModelInput(
        images=np.stack([row.images for row in prepared]),
        image_masks=np.stack([row.image_masks for row in prepared]),
        tokens=np.stack([ids for ids, _ in prompts]),
        token_mask=np.stack([mask for _, mask in prompts]),
        state=np.stack([row.model_state for row in prepared]),
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"action.device: {device!r} is not a device of PyTorch; expected cpu, cuda or cuda:<index>") from error
    if chosen.type == "cuda" and not (torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()):
        seen = torch.cuda.device_count()
        raise ConfigError(
            f"action.device: {str(chosen)!r} is not there (PyTorch sees {seen} CUDA devices); set cpu, or install a CUDA build of PyTorch"
        )
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ConfigError(f"action.dtype: got {dtype!r}, expected one of {', '.join(_DTYPES)}")
    return chosen
