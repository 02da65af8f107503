"""The named policy configurations: what a checkpoint was trained for and its weights do not say (reference/embodiments.md §2).

Names and values are openpi's. Dimensions are not here: they are read off the checkpoint. A robot that openpi does not know brings its
configuration in a module of its own, which :func:`get_config` imports.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any

from action.embodiments import Aloha, Droid, Embodiment, Libero
from action.embodiments.delta import Mask, delta_mask
from pi0.errors import ConfigError
from pi0.param_tree import ModelKind


@dataclass(frozen=True)
class PolicyConfig:
    """How one family of checkpoints is served.

    Attributes:
        name: openpi's name of the config, or your own; what messages and the log call it.
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
    )
}
"""Name → configuration, for every pi0 and pi0.5 config of openpi that can be served."""

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
    """The configuration called ``name``: one of openpi's, or ``module:NAME``, a :class:`PolicyConfig` in a module that Python can import.

    Raises:
        ConfigError: there is none (suggests the closest), it is one of openpi's that cannot be served, or the module cannot be imported.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    if ":" in name:
        return _own_config(name)
    if name in _FAST_CONFIGS:
        raise ConfigError(f"action.model_config_name: {name!r} is a pi0-FAST config; not supported yet, use a pi0 or pi0.5 config and checkpoint")
    if name in _DEBUG_CONFIGS:
        raise ConfigError(f"action.model_config_name: {name!r} is a debug config; it has no robot and no norm stats, so it cannot be served")
    close = difflib.get_close_matches(name, CONFIGS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(CONFIGS))}, or module:NAME for one of your own"
    raise ConfigError(f"action.model_config_name: there is no config {name!r}; {hint}")


def _own_config(name: str) -> PolicyConfig:
    """``module:NAME``; the module is imported, so it can do whatever the user who wrote its name into the configuration can."""
    module_name, _, attribute = name.partition(":")
    parts = module_name.split(".")
    if parts[-1] == "py" or not all(part.isidentifier() for part in (*parts, attribute)):
        raise ConfigError(
            f"action.model_config_name: got {name!r}, expected module:NAME, such as my_robot:PI05_UR5 for PI05_UR5 = PolicyConfig(…) in my_robot.py"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (missing == module_name or module_name.startswith(f"{missing}.")):
            raise ConfigError(
                f"action.model_config_name: there is no module {missing!r} for {name!r}; start the server in the directory that it lies in, "
                "install it, or name its directory in PYTHONPATH"
            ) from None
        raise ConfigError(
            f"action.model_config_name: the module {module_name!r} of {name!r} cannot be imported: {type(error).__name__}: "
            f"{' '.join(str(error).split())}{_place(error)}"
        ) from error
    found = getattr(module, attribute, None)
    if isinstance(found, PolicyConfig):
        return found
    configs = [other for other, value in vars(module).items() if isinstance(value, PolicyConfig)]
    close = difflib.get_close_matches(attribute, configs, n=1)
    if close:
        hint = f"did you mean {module_name}:{close[0]}?"
    else:
        hint = f"it has {', '.join(configs)}" if configs else f"it has no PolicyConfig at all; write {attribute} = PolicyConfig(…) there"
    problem = f"is of type {type(found).__name__}, expected a PolicyConfig" if hasattr(module, attribute) else "is not there"
    raise ConfigError(f"action.model_config_name: {attribute} of {module_name!r} ({_file(module)}) {problem}; {hint}")


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "a module without a file"


def _place(error: BaseException) -> str:
    """Where it was raised, as far as that is somebody's source line; a SyntaxError says it itself."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in lines if frame.filename not in (__file__, importlib.__file__)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
