"""A service on every transport whose models do as they are told, and the robots that ask it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from hosting.clients import Client, connect
from hosting.clients.link import Link
from hosting.clients.quic import QuicLink
from hosting.clients.unix_socket import UnixLink
from hosting.clients.websocket import WebSocketLink
from hosting.config import ActionConfig, ActionTransportConfig, PlannerConfig, PlannerTransportConfig
from hosting.policy import ObservationError
from tests.hosting.transports.unix_support import socket_directory
from tests.serving import HORIZON, RunningService, service_config, start, stubs

SECONDS = 30.0
"""No answer takes that long; what does is a hang."""

TRANSPORTS = ("websocket", "unix", "quic")


@dataclass
class Gate:
    """Holds a model: its calls wait in here while it is shut.

    Attributes:
        calls: the observations of each model call, in the order that they were begun.
    """

    calls: list[list[Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._begun = threading.Semaphore(0)

    def shut(self) -> None:
        """From the next call on."""
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def enter(self, observations: Sequence[Mapping[str, Any]]) -> None:
        """A model call begins."""
        self.calls.append(list(observations))
        self._begun.release()
        assert self._open.wait(SECONDS), "nobody opened the gate"

    def wait_begun(self, count: int = 1) -> None:
        """Returns when ``count`` more calls than were waited for before have begun."""
        for _ in range(count):
            assert self._begun.acquire(timeout=SECONDS), "the model was not called"

    def asked(self, key: str = "robot") -> list[list[Any]]:
        """What every call was asked about."""
        return [[obs[key] for obs in observations] for observations in self.calls]


class StartledError(Exception):
    """What a stub raises where a real policy has a bug."""


class StubPolicy:
    """Its reply says for which robot it is. An observation's ``wrong`` says how it fails, and with it every batch that it is in."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {"action_horizon": HORIZON, "image_specs": []}
        self.gate = Gate()

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], *, seeds: Any = None) -> list[dict[str, Any]]:
        self.gate.enter(observations)
        return [self._reply(obs) for obs in observations]

    def _reply(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        match obs.get("wrong"):
            case "request":
                raise ObservationError("state: missing, expected an array of numbers")
            case "bug":
                raise StartledError("a bug")
        padding = np.zeros((HORIZON, obs.get("padding", 1)), np.uint8)
        return {"actions": np.full((HORIZON, 2), float(obs["robot"])), "robot": obs["robot"], "asked": {"prompt": obs["prompt"]}, "padding": padding}


class StubPlanner:
    """Its subtask names the task. While :attr:`down`, it raises."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}
        self.gate = Gate()
        self.down = False

    def infer(self, obs: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        return self.infer_batch([obs], **settings)[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]], **settings: Any) -> list[dict[str, Any]]:
        self.gate.enter(observations)
        if self.down:
            raise StartledError("out of memory")
        return [{"subtask": {"text": f"begin to {obs['prompt']}", "ms": 1.0}} for obs in observations]


class Crowd:
    """A running service and its robots.

    Attributes:
        action, planner: the models.
    """

    def __init__(self, service: RunningService, action: Any, planner: StubPlanner, stack: ExitStack) -> None:
        self.service, self.action, self.planner = service, action, planner
        self._stack = stack
        self.pin: str = service.service.status()["quic_certificate_sha256"]

    def client(self, transport: str = "websocket", *, slot: Literal["action", "planner"] = "action", **options: Any) -> Client:
        """A new client; closed with the crowd."""
        url = self.service.addresses[slot if transport == "websocket" else f"{slot} {transport}"]
        options = {"retry_lost": False, **options}
        return self._stack.enter_context(connect(url, pin=self.pin if transport == "quic" else None, **options))

    def link(self, transport: str) -> Link:
        """A client's lower half, which sends any message; closed with the crowd."""
        addresses = self.service.addresses
        link: Link
        match transport:
            case "websocket":
                link = WebSocketLink(addresses["action"])
            case "unix":
                link = UnixLink(addresses["action unix"].removeprefix("unix://"))
            case _:
                host, port = addresses["action quic"].removeprefix("quic://").split(":")
                link = QuicLink(host, int(port), pin=self.pin)
        self._stack.callback(link.close)
        return link

    def ask(self, client: Client, obs: Mapping[str, Any], **options: Any) -> Future[dict[str, Any]]:
        """One request on a thread of its own."""
        future: Future[dict[str, Any]] = Future()

        def run() -> None:
            try:
                future.set_result(client.infer(obs, timeout_s=SECONDS, **options))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)

        threading.Thread(target=run, name="robot", daemon=True).start()
        return future

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of an admin page."""
        try:
            with urllib.request.urlopen(self.service.http("admin") + path, timeout=SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1].decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()]
        assert samples, f"there is no {name} with {labels}"
        return sum(sample.value for sample in samples)

    def until(self, true: Callable[[], bool]) -> None:
        """Returns when ``true()``, which looks at the service from outside."""
        deadline_s = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline_s, "it never came to be"

    def until_queued(self, count: int, slot: str = "action") -> None:
        """Returns when so many calls wait for a slot."""
        self.until(lambda: self.json("/slots")[slot]["queued"] == count)


def observation(robot: int, **own: Any) -> dict[str, Any]:
    """What a robot sees; no two see the same."""
    return {"robot": robot, "prompt": "fold the towel", "images": {"cam_high": np.full((8, 8, 3), robot, np.uint8)}, **own}


@contextmanager
def crowd(
    *, action: Any = None, scheduler: Mapping[str, Any] | None = None, planner: Mapping[str, Any] | None = None, **fields: Any
) -> Iterator[Crowd]:
    """Combined mode on every transport.

    Args:
        action: the action policy, if not a :class:`StubPolicy`.
        scheduler: the action slot's.
        planner: the planner slot's fields.
    """
    with ExitStack() as stack:
        directory = stack.enter_context(socket_directory())
        values: dict[str, Any] = {
            "action": ActionConfig.model_validate({"model_config_name": "unused", "checkpoint_dir": "unused", "scheduler": {**(scheduler or {})}}),
            "planner": PlannerConfig.model_validate({"checkpoint_dir": "unused", **(planner or {})}),
            "action_transport": ActionTransportConfig(websocket_port=0, quic_port=0, unix_socket_path=str(directory / "action")),
            "planner_transport": PlannerTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
            "quic_certificate_dir": str(directory / "tls"),
        }
        policy, generator = action or StubPolicy(), StubPlanner()
        service = stack.enter_context(start(service_config(**{**values, **fields}), stubs(policy, generator)))
        # What a test holds when it fails would hold up the end as well.
        for model in (policy, generator):
            if isinstance(gate := getattr(model, "gate", None), Gate):
                stack.callback(gate.open)
        yield Crowd(service, policy, generator, stack)
