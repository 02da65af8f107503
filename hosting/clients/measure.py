"""``tandem test``: how long requests take, seen from the client, the server and the policy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException

from hosting.clients.examples import EMBODIMENTS, Embodiment, embodiment_of, example_observation
from hosting.clients.websocket import WebSocketClient
from hosting.policy import TandemError


class TestError(TandemError):
    """The server under test cannot be measured."""

    __test__ = False  # not a test class for pytest


def measure(url: str, *, mode: str | None, embodiment: Embodiment | None, prompt: str, iterations: int) -> dict[str, Any]:
    """One call to warm up and ``iterations`` timed ones, each with fresh random images.

    Returns:
        ``{"url", "embodiment", "mode", "metadata", "reply", "ms": {"client" | "server" | "policy" | "planner": {"mean", "min", "max"}}}``;
        a time that the server does not report is absent.

    Raises:
        TestError: the server cannot be reached, goes away, or its embodiment cannot be told.
        InferenceError: it refuses the observation.
    """
    try:
        client = WebSocketClient(url)
    except (OSError, ValueError, WebSocketException) as error:
        raise TestError(f"cannot connect to {url}: {_one_line(error)}; is the server running, and is this its WebSocket port?") from error
    with client:
        metadata = client.get_server_metadata()
        chosen = embodiment or embodiment_of(metadata)
        if chosen is None:
            raise TestError(f"the server at {url} names no known cameras; say which observation to send with --embodiment {'|'.join(EMBODIMENTS)}")
        rng = np.random.default_rng(0)
        times: dict[str, list[float]] = {"client": [], "server": [], "policy": [], "planner": []}
        reply: dict[str, Any] = {}
        for i in range(iterations + 1):
            obs = example_observation(chosen, rng, prompt=prompt)
            if mode is not None:
                obs["mode"] = mode
            started_s = time.perf_counter()
            try:
                reply = client.infer(obs)
            except (OSError, WebSocketException) as error:
                raise TestError(f"the connection to {url} broke during call {i + 1}: {_one_line(error)}; see the server's log") from error
            elapsed_ms = (time.perf_counter() - started_s) * 1e3
            if i == 0:
                continue
            times["client"].append(elapsed_ms)
            for name, key, field in (("server", "server_timing", "infer_ms"), ("policy", "policy_timing", "infer_ms"), ("planner", "subtask", "ms")):
                if key in reply:
                    times[name].append(float(reply[key][field]))
    return {
        "url": url,
        "embodiment": chosen,
        "mode": mode or "default",
        "metadata": metadata,
        "reply": {key: f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else value for key, value in reply.items()},
        "ms": {name: {"mean": float(np.mean(ms)), "min": min(ms), "max": max(ms)} for name, ms in times.items() if ms},
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['url']}  mode {report['mode']}, {report['embodiment']} observations"]
    if "subtask" in report["reply"]:
        lines.append(f"subtask: {report['reply']['subtask']['text']!r}")
    if "actions" in report["reply"]:
        lines.append(f"actions: {report['reply']['actions']}")
    lines.append(f"{'ms':8}{'mean':>10}{'min':>10}{'max':>10}")
    lines += [f"{name:8}{ms['mean']:10.2f}{ms['min']:10.2f}{ms['max']:10.2f}" for name, ms in report["ms"].items()]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
