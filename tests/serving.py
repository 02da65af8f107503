"""A service on free loopback ports in a thread of its own, for tests that talk to it through real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hosting.config import ActionConfig, ActionTransportConfig, AdminConfig, PlannerConfig, PlannerTransportConfig, ServiceConfig
from hosting.service import Loaders, Service

HORIZON = 10


class EchoPolicy:
    """An action policy that says what it was asked; ``hook`` runs first and may block or raise."""

    def __init__(self, hook: Callable[[Mapping[str, Any]], None] = lambda obs: None) -> None:
        self.hook = hook
        self.metadata = {"action_horizon": HORIZON, "image_specs": [], "reset_pose": [0.0] * 6}
        self.default_prompt: str | None = None

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        self.hook(obs)
        return {"actions": np.zeros((HORIZON, 14)), "policy_timing": {"infer_ms": 1.0}, "asked": {"prompt": str(obs.get("prompt"))}}


class EchoPlanner:
    """A planner whose subtask names what it was asked."""

    def __init__(self, hook: Callable[[Mapping[str, Any]], None] = lambda obs: None) -> None:
        self.hook = hook
        self.metadata: dict[str, Any] = {}

    def infer(
        self, obs: Mapping[str, Any], *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> dict[str, Any]:
        self.hook(obs)
        return {
            "subtask": {"text": f"first step of {obs.get('prompt')}", "ms": 1.0, "format": generation_prompt_format, "limit": max_generation_tokens}
        }


def service_config(*slots: str, **fields: Any) -> ServiceConfig:
    """Both slots (or the named ones) on free ports; WebSocket only."""
    slots = slots or ("action", "planner")
    values: dict[str, Any] = {
        "action_transport": ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        "planner_transport": PlannerTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        "admin": AdminConfig(port=0),
    }
    if "action" in slots:
        values["action"] = ActionConfig(model_config_name="unused", checkpoint_dir="unused")
    if "planner" in slots:
        values["planner"] = PlannerConfig(checkpoint_dir="unused")
    return ServiceConfig(**{**values, **fields})


class RunningService:
    """Handle on a service in another thread."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, result: dict[str, Any], thread: threading.Thread) -> None:
        self.service = service
        self.addresses = service.addresses
        self._loop = loop
        self._result = result
        self._thread = thread
        self.stopping = self.waited = False

    def http(self, endpoint: str) -> str:
        return self.addresses[endpoint].replace("ws://", "http://")

    def stop(self) -> None:
        """Begin to drain, once: a second stop would end the process."""
        if self.stopping:
            return
        self.stopping = True
        self._loop.call_soon_threadsafe(self.service.stop)

    def wait_stopped(self) -> int:
        """The exit code, once the service has ended."""
        self.waited = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the service did not stop"
        if "error" in self._result:
            raise self._result["error"]
        return self._result["code"]


@contextmanager
def start(config: ServiceConfig, loaders: Loaders | None, *, wait_ready: bool = True) -> Iterator[RunningService]:
    """Run a service; it is stopped at the end and must exit with code 0, unless the test waits for that itself."""
    up, result = threading.Event(), {}
    holder: list[Any] = []

    async def main() -> int:
        service = Service(config, loaders=loaders, handle_signals=False)
        holder.extend([service, asyncio.get_running_loop()])
        serving = asyncio.create_task(service.serve())
        if wait_ready:
            ready = asyncio.create_task(service.ready.wait())
            await asyncio.wait([serving, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
        else:
            while not service.addresses and not serving.done():
                await asyncio.sleep(0)
        if not serving.done():  # else its outcome is told first
            up.set()
        return await serving

    def run() -> None:
        try:
            result["code"] = asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            result["error"] = error
        up.set()

    thread = threading.Thread(target=run, name="service under test")
    thread.start()
    assert up.wait(90), "the service did not come up"
    if "error" in result:
        thread.join(10)
        raise result["error"]
    running = RunningService(holder[0], holder[1], result, thread)
    try:
        yield running
    finally:
        if not running.waited:
            running.stop()
            assert running.wait_stopped() == 0


def stubs(action: Any = None, planner: Any = None) -> Loaders:
    """Loaders that give these policies (echoes by default)."""
    return Loaders(lambda config: action or EchoPolicy(), lambda config: planner or EchoPlanner())
