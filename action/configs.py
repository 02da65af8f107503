"""The named policy configurations: what a checkpoint was trained for and its weights do not say (reference/embodiments.md §2).

Names and values are openpi's, but for the demo's. Dimensions are not here: they are read off the checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from action.embodiments import Aloha, Droid, Embodiment, Libero, Table
from action.embodiments.delta import Mask, delta_mask
from pi0.errors import ConfigError
from pi0.param_tree import ModelKind


@dataclass(frozen=True)
class PolicyConfig:
    """How one family of checkpoints is served.

    Attributes:
        name: openpi's name of the config.
        kind: model family; the checkpoint's must be the same.
        embodiment: the robot.
        asset_id: which norm stats of the checkpoint's ``assets/`` apply.
        action_horizon: steps per chunk.
        max_token_len: text tokens that the model was trained with.
        discrete_state_input: whether the prompt carries the state (pi0.5's form).
        delta_mask: action columns that are relative to the state; None where all are absolute.
        default_prompt: the instruction where neither client nor server gives one.
        policy_metadata: what clients are told on connecting.
    """

    name: str
    kind: ModelKind
    embodiment: Embodiment
    asset_id: str
    action_horizon: int
    max_token_len: int
    discrete_state_input: bool
    delta_mask: Mask | None = None
    default_prompt: str | None = None
    policy_metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def use_quantiles(self) -> bool:
        """Whether states and actions are normalised by quantiles rather than z-scores: by all models but pi0."""
        return self.kind != "pi0"


_ALOHA, _DROID, _LIBERO = Aloha(adapt_to_pi=True), Droid(), Libero()
_LIBERO_ASSET = "physical-intelligence/libero"
_ALOHA_DELTA = delta_mask(6, -1, 6, -1)
_LIBERO_DELTA = delta_mask(6, -1)
_DROID_DELTA = delta_mask(7, -1)
_RESET_POSE = MappingProxyType({"reset_pose": [0, -1.5, 1.5, 0, 0, 0]})


def _pi0(name: str, embodiment: Embodiment, asset_id: str, horizon: int, *, max_token_len: int = 48, **rest: Any) -> PolicyConfig:
    return PolicyConfig(name, "pi0", embodiment, asset_id, horizon, max_token_len, discrete_state_input=False, **rest)


def _pi05(name: str, embodiment: Embodiment, asset_id: str, horizon: int, *, discrete_state_input: bool = True, **rest: Any) -> PolicyConfig:
    return PolicyConfig(name, "pi05", embodiment, asset_id, horizon, 200, discrete_state_input, **rest)


_TOWEL = "fold the towel"
_TUPPERWARE = "open the tupperware and put the food on the plate"
_PEN = "uncap the pen"

CONFIGS: dict[str, PolicyConfig] = {
    config.name: config
    for config in (
        _pi0("pi0_aloha", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, policy_metadata=_RESET_POSE),
        _pi05("pi05_aloha", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, policy_metadata=_RESET_POSE),
        _pi0("pi0_aloha_towel", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, policy_metadata=_RESET_POSE, default_prompt=_TOWEL),
        _pi0("pi0_aloha_tupperware", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, policy_metadata=_RESET_POSE, default_prompt=_TUPPERWARE),
        _pi0("pi0_aloha_pen_uncap", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, default_prompt=_PEN),
        _pi05("pi05_aloha_pen_uncap", _ALOHA, "trossen", 50, delta_mask=_ALOHA_DELTA, default_prompt=_PEN),
        _pi0("pi0_aloha_sim", _ALOHA, "lerobot/aloha_sim_transfer_cube_human", 50, default_prompt="Transfer cube"),
        _pi0("pi0_droid", _DROID, "droid", 10),
        _pi05("pi05_droid", _DROID, "droid", 15),
        _pi05("pi05_droid_finetune", _DROID, "droid", 16),
        _pi05("pi05_full_droid_finetune", _DROID, "droid", 16, delta_mask=_DROID_DELTA),
        _pi0("pi0_droid_jointpos_polaris", _DROID, "droid", 10, max_token_len=100, delta_mask=_DROID_DELTA),
        _pi0("pi0_droid_jointpos_100k_polaris", _DROID, "droid", 10, max_token_len=100, delta_mask=_DROID_DELTA),
        _pi05("pi05_droid_jointpos_polaris", _DROID, "droid", 15, delta_mask=_DROID_DELTA),
        _pi0("paligemma_diffusion_droid", _DROID, "droid", 10),
        _pi0("pi0_libero", _LIBERO, _LIBERO_ASSET, 50, delta_mask=_LIBERO_DELTA),
        _pi0("pi0_libero_low_mem_finetune", _LIBERO, _LIBERO_ASSET, 50, delta_mask=_LIBERO_DELTA),
        # pi0.5 weights that were trained on pi0's prompt: no state reaches this model.
        _pi05("pi05_libero", _LIBERO, _LIBERO_ASSET, 10, discrete_state_input=False),
        # Not openpi's: the demo's simulated robot.
        _pi05("pi05_table", Table(), "table", 12),
    )
}
"""Name → configuration, for every pi0 and pi0.5 config of openpi that can be served, and for the demo."""

_FAST_CONFIGS = (
    "pi0_fast_droid",
    "pi0_fast_libero",
    "pi0_fast_libero_low_mem_finetune",
    "pi0_fast_full_droid_finetune",
    "pi0_fast_droid_jointpos_polaris",
    "paligemma_binning_droid",
    "paligemma_binning_droid_jointpos",
    "paligemma_fast_droid",
    "paligemma_fast_specialist_droid",
    "paligemma_vq_droid",
)
_DEBUG_CONFIGS = ("debug", "debug_restore", "debug_pi05")


def get_config(name: str) -> PolicyConfig:
    """The configuration called ``name``.

    Raises:
        ConfigError: there is none (suggests the closest), or it is one of openpi's that cannot be served.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    if name in _FAST_CONFIGS:
        raise ConfigError(f"action.model_config_name: {name!r} is a pi0-FAST config; not supported yet, use a pi0 or pi0.5 config and checkpoint")
    if name in _DEBUG_CONFIGS:
        raise ConfigError(f"action.model_config_name: {name!r} is a debug config; it has no robot and no norm stats, so it cannot be served")
    close = difflib.get_close_matches(name, CONFIGS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(CONFIGS))}"
    raise ConfigError(f"action.model_config_name: there is no config {name!r}; {hint}")
