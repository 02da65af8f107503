"""``tandem test``: how long requests take, over any transport, seen from the client, the server and the policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from hosting.clients.client import Client, ClientOptions, connect
from hosting.clients.errors import AuthenticationError, ConnectError, ConnectionLostError
from hosting.clients.examples import EMBODIMENTS, Embodiment, embodiment_of, example_observation
from pi0.errors import TandemError


class TestError(TandemError):
    """The server under test cannot be measured."""

    __test__ = False  # not a test class for pytest


def measure(
    url: str, *, mode: str | None, embodiment: Embodiment | None, prompt: str, iterations: int, **options: Unpack[ClientOptions]
) -> dict[str, Any]:
    """One call to warm up and ``iterations`` timed ones, each with fresh random images.

    Args:
        options: of the :class:`~hosting.clients.client.Client`.

    Returns:
        ``{"url", "embodiment", "mode", "metadata", "reply", "ms": {row: {"mean", "min", "max"}}}`` with the rows ``client`` (the whole call),
        ``network`` (what of it passed outside the server: the wire, packing and unpacking), ``server``, ``overhead`` (what of that
        passed outside the models: waiting for its turn, mostly), ``policy`` and ``planner``; without those that the server does not report.

    Raises:
        TestError: the server cannot be reached, goes away, or its embodiment cannot be told.
        InferenceError: it refuses the observation.
    """
    with reach(url, **options) as client:
        metadata = client.get_server_metadata()
        chosen = embodiment or known_embodiment(client)
        rng = np.random.default_rng(0)
        times: dict[str, list[float]] = {name: [] for name in ("client", "network", "server", "overhead", "policy", "planner")}
        reply: dict[str, Any] = {}
        for i in range(iterations + 1):
            obs = example_observation(chosen, rng, prompt=prompt)
            if mode is not None:
                obs["mode"] = mode
            started_s = time.perf_counter()
            try:
                reply = client.infer(obs)
            except (ConnectError, ConnectionLostError) as error:
                raise TestError(f"call {i + 1}: {error}; see the server's log") from error
            elapsed_ms = (time.perf_counter() - started_s) * 1e3
            if i:
                for name, ms in _split(elapsed_ms, reply).items():
                    times[name].append(ms)
    return {
        "url": url,
        "embodiment": chosen,
        "mode": mode or "default",
        "metadata": metadata,
        "reply": {key: f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else value for key, value in reply.items()},
        "ms": {name: {"mean": float(np.mean(ms)), "min": min(ms), "max": max(ms)} for name, ms in times.items() if ms},
    }


def reach(url: str, **options: Unpack[ClientOptions]) -> Client:
    """A client of the server at ``url`` that repeats nothing by itself.

    Raises:
        TestError: it cannot be reached, or an option has no meaning.
    """
    try:
        once: ClientOptions = {**options, "retry_lost": False}
        return connect(url, **once)
    except AuthenticationError as error:
        raise TestError(str(error)) from error
    except ConnectError as error:
        # The others ask this themselves.
        hint = "; is the server running, and is this its WebSocket port?" if url.startswith("ws") else ""
        raise TestError(f"{error}{hint}") from error
    except ValueError as error:
        raise TestError(str(error)) from error


def known_embodiment(client: Client) -> Embodiment:
    """The embodiment whose cameras the server asks for.

    Raises:
        TestError: it asks for none that is known.
    """
    chosen = embodiment_of(client.get_server_metadata())
    if chosen is None:
        raise TestError(
            f"the server at {client.address} names no known cameras; say which observation to send with --embodiment {'|'.join(EMBODIMENTS)}"
        )
    return chosen


def _split(client_ms: float, reply: Mapping[str, Any]) -> dict[str, float]:
    """Where the time of one call went, as far as the reply says."""
    reported = {
        name: float(reply[key][field])
        for name, key, field in (("server", "server_timing", "infer_ms"), ("policy", "policy_timing", "infer_ms"), ("planner", "subtask", "ms"))
        if key in reply
    }
    ms = {"client": client_ms, **reported}
    if "server" in reported:
        ms["network"] = client_ms - reported["server"]
        if len(reported) > 1:
            ms["overhead"] = 2 * reported["server"] - sum(reported.values())
    return ms


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['url']}  mode {report['mode']}, {report['embodiment']} observations"]
    if "subtask" in report["reply"]:
        subtask = report["reply"]["subtask"]
        lines.append(f"subtask: {subtask['text']!r}{' (done: nothing left to do, so no actions)' if subtask.get('done') else ''}")
    if "actions" in report["reply"]:
        lines.append(f"actions: {report['reply']['actions']}")
    lines.append(f"{'ms':9}{'mean':>10}{'min':>10}{'max':>10}")
    lines += [f"{name:9}{ms['mean']:10.2f}{ms['min']:10.2f}{ms['max']:10.2f}" for name, ms in report["ms"].items()]
    return "\n".join(lines)
