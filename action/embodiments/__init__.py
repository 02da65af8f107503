"""The robots Tandem speaks to, by name. A new one is one module beside these and one row here; see docs/embodiments.md."""

from __future__ import annotations

from action.embodiments.aloha import Aloha
from action.embodiments.base import Embodiment, ImageSpec, PolicyInputs
from action.embodiments.droid import Droid
from action.embodiments.libero import Libero
from action.embodiments.table import Table

EMBODIMENTS: dict[str, Embodiment] = {embodiment.name: embodiment for embodiment in (Aloha(), Droid(), Libero(), Table())}
"""Name → embodiment."""

__all__ = ["EMBODIMENTS", "Aloha", "Droid", "Embodiment", "ImageSpec", "Libero", "PolicyInputs", "Table"]
