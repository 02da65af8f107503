"""A service whose models sleep, as one would whose models run on other devices, in a process of its own; and robots that ask it by the clock."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from hosting.clients import Client
from hosting.config import ActionConfig, ActionTransportConfig, AdminConfig, PlannerConfig, PlannerTransportConfig, ServiceConfig
from hosting.service import Loaders, Service

HORIZON = 10
ACTIONS = np.zeros((HORIZON, 14))
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


class SleepingPolicy:
    """An action policy that takes ``seconds`` for any batch; its reply says whom it was asked for and with which prompt."""

    metadata: dict[str, Any] = {"action_horizon": HORIZON, "image_specs": []}  # noqa: RUF012 - never modified
    default_prompt = None

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Any = None) -> list[dict[str, Any]]:
        time.sleep(self._seconds)
        return [{"actions": ACTIONS, "robot": int(obs["state"][0]), "asked": {"prompt": obs["prompt"]}} for obs in observations]


class SleepingPlanner:
    """A planner that takes ``seconds`` for any batch; its subtask names the task."""

    metadata: dict[str, Any] = {}  # noqa: RUF012 - never modified

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def infer(self, obs: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        return self.infer_batch([obs], **settings)[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        time.sleep(self._seconds)
        return [{"subtask": {"text": subtask_of(obs["prompt"]), "ms": self._seconds * 1e3}} for obs in observations]


def subtask_of(task: str) -> str:
    """What :class:`SleepingPlanner` says."""
    return f"begin to {task}"


def service_config(**fields: Any) -> ServiceConfig:
    """Both slots on free ports, WebSocket only, and an admin port."""
    values: dict[str, Any] = {
        "action": ActionConfig(model_config_name="stub", checkpoint_dir="none"),
        "planner": PlannerConfig(checkpoint_dir="none"),
        "action_transport": ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        "planner_transport": PlannerTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        "admin": AdminConfig(port=0),
    }
    return ServiceConfig(**{**values, **fields})


def run_service(config: ServiceConfig, load_action: Callable[[], Any] | None, load_planner: Callable[[], Any] | None, ready: Connection) -> int:
    """Serve in this process until a signal stops it; returns the exit code.

    Args:
        load_action, load_planner: None loads what is configured.
        ready: gets endpoint → URL.
    """
    logging.basicConfig(level=logging.CRITICAL)
    # The line that every request leaves costs what it costs elsewhere; nobody reads it here.
    logging.getLogger("hosting.requests").setLevel(logging.INFO)
    logging.getLogger("hosting.requests").propagate = False
    logging.getLogger("hosting.requests").addHandler(_Formatting())

    async def main() -> int:
        loaders = None if load_action is None or load_planner is None else Loaders(lambda config: load_action(), lambda config: load_planner())
        service = Service(config, loaders=loaders)
        serving = asyncio.create_task(service.serve())
        waiting = asyncio.create_task(service.ready.wait())
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not serving.done():
            ready.send(service.addresses)
        return await serving

    return asyncio.run(main())


class _Formatting(logging.Handler):
    """Makes every line, and drops it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


def observation(robot: int, task: str, *, pixels: int = 224) -> dict[str, Any]:
    """What a robot sees; no two robots see the same."""
    rng = np.random.default_rng(robot)
    images = {camera: rng.integers(0, 256, (pixels, pixels, 3), np.uint8) for camera in CAMERAS}
    return {"images": images, "state": np.full(14, robot, np.float64), "prompt": task}


@dataclass
class Ticks:
    """What came of a robot's ticks.

    Attributes:
        latencies_ms: of those that were answered, from the moment they were due.
        missed: ticks that had passed when the reply to an earlier one came.
        replies: in their order.
    """

    latencies_ms: list[float] = field(default_factory=list)
    missed: int = 0
    replies: list[dict[str, Any]] = field(default_factory=list)


def by_the_clock(ask: Callable[[], dict[str, Any]], *, period_s: float, start_s: float, end_s: float) -> Ticks:
    """Ask at every tick from ``start_s`` (:func:`time.perf_counter`) on; late where the last reply is, and then for the newest tick that is due."""
    ticks = Ticks()
    tick = 0
    while (due_s := start_s + tick * period_s) < end_s:
        time.sleep(max(0.0, due_s - time.perf_counter()))
        reply = ask()
        now_s = time.perf_counter()
        ticks.latencies_ms.append((now_s - due_s) * 1e3)
        ticks.replies.append(reply)
        newest = max(tick + 1, int((now_s - start_s) / period_s))
        ticks.missed += newest - tick - 1
        tick = newest
    return ticks


def side_by_side(robots: Sequence[Callable[[], Any]]) -> list[Any]:
    """All of them at once, each on a thread; what they return, in their order."""
    results: list[Any] = [None] * len(robots)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = robots[index]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=partial(run, index)) for index in range(len(robots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def check_own_answer(reply: Mapping[str, Any], obs: Mapping[str, Any]) -> None:
    """A robot got another one's answer.

    Raises:
        AssertionError: it did.
    """
    assert reply["robot"] == int(obs["state"][0]), "a robot got another one's answer"


def infer(client: Client, obs: Mapping[str, Any]) -> dict[str, Any]:
    """One round trip, checked."""
    reply = client.infer(obs)
    check_own_answer(reply, obs)
    return reply
