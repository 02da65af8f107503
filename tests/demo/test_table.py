"""The Gymnasium environment, as a robot loop uses it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from action.embodiments import Table
from demo.expert import plan
from demo.instructions import ALL_DONE, FAMILIES, SUBTASKS, InstructionError, parse
from demo.table import MAX_CALLS, MAX_STEPS, TableEnv
from demo.world import GREEN_IS_FREE as _unused  # type: ignore[attr-defined]  # noqa: F401
