"""Rebuilds the objects that tests/golden/wire/wire.json describes."""

import base64
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
