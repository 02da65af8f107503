"""The golden policy calls as observations, and policies whose model is a stub."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from action.configs import PolicyConfig, get_config
from action.policy import ActionPolicy
from action.processing import Processor
from action.sampler import ModelInput
from pi0.norm_stats import load_norm_stats
from pi0.tokenizer import OnLongPrompt, PromptTokenizer
from tests.golden_data import CHECKPOINTS, GOLDEN, TOKENIZER

POLICY_CASES = sorted(path.stem for path in (GOLDEN / "policy").glob("*.npz"))
COMBINED_CASES = sorted(path.stem for path in (GOLDEN / "planner").glob("combined_*.npz"))
MODEL_ACTION_DIM = 32


@dataclass(frozen=True)
class GoldenCall:
    """One recorded call of openpi's policy."""

    meta: dict[str, Any]
    observation: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    @property
    def noise(self) -> NDArray[np.float32]:
        return self.arrays["noise"]


def golden_call(name: str) -> GoldenCall:
    folder = "planner" if name.startswith("combined_") else "policy"
    with np.load(GOLDEN / folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    observation: dict[str, Any] = {}
    for key, value in arrays.items():
        if key == "obs/prompt":
            observation["prompt"] = str(value)
        elif key.startswith("obs/images/"):
            observation.setdefault("images", {})[key.removeprefix("obs/images/")] = value
        elif key.startswith("obs/"):
            observation[key.removeprefix("obs/")] = value
    return GoldenCall(json.loads(str(arrays["meta_json"])), observation, arrays)


@cache
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TOKENIZER)


def processor(
    config: str | PolicyConfig, checkpoint: Path | None = None, *, default_prompt: str | None = None, on_long_prompt: OnLongPrompt = "error"
) -> Processor:
    """The transforms of a config, with the norm stats of the golden checkpoint of its kind."""
    config = get_config(config) if isinstance(config, str) else config
    stats = load_norm_stats(checkpoint or CHECKPOINTS / f"{config.kind}_orbax", config.asset_id, quantiles=config.use_quantiles)
    return Processor(config, tokenizer(), stats, MODEL_ACTION_DIM, default_prompt=default_prompt, on_long_prompt=on_long_prompt)


@dataclass
class EchoSampler:
    """A stand-in for the model: gives the noise back and remembers what it was asked."""

    calls: list[tuple[ModelInput, NDArray[np.float32]]] = field(default_factory=list)

    def sample(self, inputs: ModelInput, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        self.calls.append((inputs, noise))
        return noise.copy()


def echo_policy(config: str, *, compiled: bool = False, **options: Any) -> tuple[ActionPolicy, EchoSampler]:
    sampler = EchoSampler()
    policy = ActionPolicy(get_config(config), processor(config, **options), sampler, action_dim=MODEL_ACTION_DIM, compiled=compiled)
    return policy, sampler
