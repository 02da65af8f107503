"""The action slot: PyTorch pi0 and pi0.5 policies. The only package that imports torch.

:class:`ActionPolicy` is imported on first use, so that config names and robots can be looked up without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from action.configs import CONFIGS, PolicyConfig, get_config

if TYPE_CHECKING:
    from action.policy import ActionPolicy

__all__ = ["CONFIGS", "ActionPolicy", "PolicyConfig", "get_config", "set_num_threads"]


def set_num_threads(count: int) -> None:
    """CPU threads of one operation, for the thread that calls this and runs the model."""
    import torch

    torch.set_num_threads(count)


def __getattr__(name: str) -> Any:
    if name == "ActionPolicy":
        from action.policy import ActionPolicy

        return ActionPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
