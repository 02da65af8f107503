"""Rebuilds the objects that tests/golden/wire/wire.json describes, and compares what came over a wire with what was sent."""

import base64
import math
from typing import Any

import numpy as np


def build(spec: dict[str, Any]) -> Any:
    match spec["type"]:
        case "dict":
            return {build(key): build(value) for key, value in spec["items"]}
        case "list":
            return [build(item) for item in spec["items"]]
        case "tuple":
            return tuple(build(item) for item in spec["items"])
        case "str":
            return spec["value"]
        case "bytes":
            return base64.b64decode(spec["b64"])
        case "int":
            return int(spec["value"])
        case "float":
            return float.fromhex(spec["hex"])
        case "bool":
            return bool(spec["value"])
        case "none":
            return None
        case "numpy_scalar":
            return np.frombuffer(base64.b64decode(spec["data_b64"]), np.dtype(spec["dtype"]))[0]
        case "ndarray":
            return _array(spec)
    raise ValueError(f"unknown type {spec['type']}")


def _array(spec: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(spec["data_c_order_b64"]), np.dtype(spec["dtype"]))
    array = flat.reshape(spec["shape"])
    match spec["layout"]:
        case "C":
            return array
        case "F":
            return np.asfortranarray(array)
        case "every_second_last_axis":
            return np.repeat(array, 2, axis=-1)[..., ::2]
        case "reversed_first_axis":
            return array[::-1].copy()[::-1]
        case "transposed_view":
            return np.ascontiguousarray(array.T).T
    raise ValueError(f"unknown layout {spec['layout']}")


def same(a: Any, b: Any) -> bool:
    """Equal in value and in kind; sequences come back as lists."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic) and not isinstance(a, float | str | bytes):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and isinstance(b, type(a).__mro__[-2] if isinstance(a, np.generic) else type(a))
