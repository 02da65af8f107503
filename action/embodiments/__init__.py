"""The robots of openpi, by name. One of your own is a module anywhere; see docs/your-own-robot.md."""

from __future__ import annotations

from action.embodiments.aloha import Aloha
from action.embodiments.base import Embodiment, ImageSpec, PolicyInputs
from action.embodiments.droid import Droid
from action.embodiments.libero import Libero

EMBODIMENTS: dict[str, Embodiment] = {embodiment.name: embodiment for embodiment in (Aloha(), Droid(), Libero())}
"""Name → embodiment."""

__all__ = ["EMBODIMENTS", "Aloha", "Droid", "Embodiment", "ImageSpec", "Libero", "PolicyInputs"]
