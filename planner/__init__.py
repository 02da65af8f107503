"""The planner slot: a JAX pi0.5 subtask generator. The only package that imports jax."""

import os

# Without this, jax reserves most of a GPU's memory at its first use and leaves too little for the action policy beside it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from planner.generator import Subtask, SubtaskGenerator

__all__ = ["Subtask", "SubtaskGenerator"]
