"""The life of the process: bind → load → warm up → serve → drain → stop. :meth:`Service.serve` is that life on one screen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import uvicorn
from starlette.types import ASGIApp

from hosting import __version__
from hosting.admin import create_admin_app
from hosting.combined import CombinedPolicy
from hosting.config import ServiceConfig, pytorch_compile_mode
from hosting.endpoint import Endpoint
from hosting.policy import ConfigError, PlannerPolicy, Policy
from hosting.routing import Slot, action_route, planner_route
from hosting.scheduler import SlotWorker
from hosting.templates import LiveSettings, PromptSettings
from hosting.transports.bulk_websocket import BulkWebSocketProtocol
from hosting.transports.websocket import WebSocketTransport

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PING_S = 20.0
"""Interval and timeout of the server's own pings, as openpi's server has them."""


@runtime_checkable
class Warmable(Protocol):
    """A policy that has something to compile before it serves."""

    def warmup(self) -> None: ...


@dataclass(frozen=True)
class Loaders:
    """How each slot is loaded; both run on their slot's own thread."""

    action: Callable[[ServiceConfig], Policy]
    planner: Callable[[ServiceConfig], PlannerPolicy]


class Service:
    """One process's slots and endpoints.

    Args:
        config: what to serve.
        loaders: how to load the slots; by default from the configured checkpoints.
        handle_signals: whether SIGINT and SIGTERM stop the service (only in the main thread).
    """

    def __init__(self, config: ServiceConfig, *, loaders: Loaders | None = None, handle_signals: bool = True) -> None:
        self.config = config
        self._loaders = loaders or Loaders(load_action, load_planner)
        self._handle_signals = handle_signals
        self._stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.addresses: dict[str, str] = {}
        """Endpoint → URL, once bound: ``action``, ``planner``, ``admin``."""
        self._workers: dict[Slot, SlotWorker] = {slot: SlotWorker(slot) for slot in config.slots}
        self._endpoints = {slot: Endpoint(slot, self._workers) for slot in config.slots}
        self._transports = {slot: WebSocketTransport(endpoint) for slot, endpoint in self._endpoints.items()}
        self._live = LiveSettings(_prompt_settings(config))

    async def serve(self) -> int:
        """Serve until told to stop; returns the exit code: 0, or 1 when accepted requests did not finish in ``drain_s``.

        Raises:
            ConfigError: an address cannot be bound.
            CheckpointError: a slot cannot be loaded.
        """
        started_s = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self._handle_signals:
                stack.enter_context(self._signals())
            servers = self._bind()
            tasks = [asyncio.create_task(server.serve(sockets=[bound])) for server, bound in servers]
            try:
                await self._until_stopped(self._load())
                if not self._stop.is_set():
                    logger.info("%s (after %.1f s)", self.ready_line(), time.perf_counter() - started_s)
                    self.ready.set()
                    await self._stop.wait()
                return await self._drain()
            finally:
                for endpoint in self._endpoints.values():
                    endpoint.close()
                for server, _ in servers:
                    server.should_exit = True
                await asyncio.gather(*tasks)
                for worker in self._workers.values():
                    worker.close()

    def stop(self) -> None:
        """Begin to drain; a second call ends the process at once, whatever is in flight."""
        if self._stop.is_set():
            logger.warning("stopped a second time: leaving at once")
            _exit_now(1)
        logger.info("stopping: no new requests, what is in flight is finished (again to force)")
        self._stop.set()

    def ready_line(self) -> str:
        """The one line that says that the service is up, and where."""
        where = ", ".join(f"{name} {url}" for name, url in self.addresses.items())
        return f"Service ready (mode={self.config.mode}, slots={list(self.config.slots)}): {where}"

    def _is_ready(self) -> bool:
        return self.ready.is_set() and not self._stop.is_set()

    def _bind(self) -> list[tuple[uvicorn.Server, socket.socket]]:
        """Bind every port before anything is loaded, so that early clients wait instead of being refused."""
        config = self.config
        apps: list[tuple[str, str, str, int, ASGIApp]] = []
        for slot in config.slots:
            port = (config.action_transport if slot == "action" else config.planner_transport).websocket_port
            apps.append((slot, f"{slot}_transport.websocket_port", config.host, port, self._transports[slot].app))
        if config.planner:
            app = create_admin_app(self._live, mode=config.mode, slots=config.slots, is_ready=self._is_ready, version=__version__)
            apps.append(("admin", "admin.port", config.admin.host, config.admin.port, app))
        servers: list[tuple[uvicorn.Server, socket.socket]] = []
        try:
            for name, field, host, port, asgi in apps:
                bound = _bound(field, host, port)
                self.addresses[name] = _url("http" if name == "admin" else "ws", bound)
                servers.append((_Server(_server_config(asgi, config.max_message_bytes)), bound))
        except ConfigError:
            for _, bound in servers:
                bound.close()
            raise
        return servers

    async def _load(self) -> None:
        """Load and warm up the slots side by side, then open their endpoints together."""
        loading: list[Awaitable[Any]] = []
        if self.config.action:
            loading.append(self._workers["action"].run(partial(_load_slot, "action", self._loaders.action, self.config)))
        if self.config.planner:
            loading.append(self._workers["planner"].run(partial(_load_slot, "planner", self._loaders.planner, self.config)))
        loaded = dict(zip(self.config.slots, await asyncio.gather(*loading), strict=True))
        action: Policy | None = loaded.get("action")
        planner: PlannerPolicy | None = loaded.get("planner")
        if action is not None and planner is not None and self.config.planner is not None:
            combined = CombinedPolicy(planner, action, live=self._live, on_failure=self.config.planner.on_failure)
            self._endpoints["action"].open(combined.steps, combined.metadata)
            # A planner client sends the same cameras; it resizes them by the same list.
            shared = {key: value for key, value in action.metadata.items() if key == "image_specs"}
            self._endpoints["planner"].open(planner_route(planner, self._live), {**planner.metadata, **shared})
        elif action is not None:
            self._endpoints["action"].open(action_route(action), action.metadata)
        elif planner is not None:
            self._endpoints["planner"].open(planner_route(planner, self._live), planner.metadata)

    async def _until_stopped(self, work: Awaitable[None]) -> None:
        """``work``, or leave at once when the service is stopped before it is done: a thread that loads a model cannot be interrupted."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            if self._handle_signals:
                logger.info("stopped while loading")
                _exit_now(0)
            working.cancel()
            return
        stopping.cancel()
        working.result()

    async def _drain(self) -> int:
        """Finish what was accepted, then close every connection."""
        draining = [asyncio.create_task(endpoint.drain()) for endpoint in self._endpoints.values()]
        await asyncio.sleep(0)  # let them refuse new requests before idle connections are closed
        for transport in self._transports.values():
            await transport.close_idle()
        _, unfinished = await asyncio.wait(draining, timeout=self.config.drain_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            logger.error("requests were still running after drain_s=%g s; leaving without their answers", self.config.drain_s)
            if self._handle_signals:
                _exit_now(1)
        logger.info("stopped")
        return 1 if unfinished else 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """uvicorn without signal handling: the service decides when its servers end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def load_action(config: ServiceConfig) -> Policy:
    """The configured action policy. Imports torch."""
    from action import ActionPolicy, set_num_threads

    assert config.action is not None
    slot = config.action
    if config.planner is not None and "OMP_NUM_THREADS" not in os.environ:
        # Torch's threads wait for each other spinning. With the planner on the same cores, one that has to wait for its core makes all of
        # them spin: an action call of 27 ms became 800 ms. (docs/benchmarks.md)
        set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    mode = pytorch_compile_mode()
    policy: Policy = ActionPolicy.load(
        slot.model_config_name,
        _local(slot.checkpoint_dir),
        tokenizer=slot.tokenizer,
        dtype=slot.dtype,
        device=slot.device,
        default_prompt=slot.default_prompt,
        num_steps=slot.num_steps,
        on_long_prompt=slot.on_long_prompt,
        compile_mode="auto" if mode == "unset" else mode,
    )
    return policy


def load_planner(config: ServiceConfig) -> PlannerPolicy:
    """The configured subtask generator. Imports jax."""
    from planner import SubtaskGenerator

    assert config.planner is not None
    slot = config.planner
    generator: PlannerPolicy = SubtaskGenerator.load(
        _local(slot.checkpoint_dir),
        tokenizer=slot.tokenizer,
        dtype=slot.dtype,
        max_generation_tokens=slot.max_generation_tokens,
        generation_prompt_format=slot.generation_prompt_format,
        allowed_tokens=slot.allowed_tokens,
        missing_cameras=slot.missing_cameras,
        on_long_prompt=slot.on_long_prompt,
    )
    return generator


def _local(checkpoint_dir: str) -> Path:
    """The checkpoint on this machine; a remote one is fetched on first use."""
    from pi0.locations import default_data_home, resolve
    from pi0.progress import show_progress

    with show_progress() as progress:
        return resolve(checkpoint_dir, data_home=default_data_home(), progress=progress)


def _load_slot(slot: Slot, load: Callable[[ServiceConfig], T], config: ServiceConfig) -> T:
    logger.info("%s: loading", slot)
    started_s = time.perf_counter()
    policy = load(config)
    loaded_s = time.perf_counter()
    logger.info("%s: loaded in %.1f s", slot, loaded_s - started_s)
    if isinstance(policy, Warmable):
        logger.info("%s: warming up (compiling)", slot)
        policy.warmup()
        logger.info("%s: warmed up in %.1f s", slot, time.perf_counter() - loaded_s)
    return policy


def _prompt_settings(config: ServiceConfig) -> PromptSettings:
    if config.planner is None:
        return PromptSettings()
    return PromptSettings(
        generation_prompt_format=config.planner.generation_prompt_format,
        action_prompt_template=config.planner.action_prompt_template,
        max_generation_tokens=config.planner.max_generation_tokens,
    )


def _server_config(app: ASGIApp, max_message_bytes: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws=BulkWebSocketProtocol,
        ws_max_size=max_message_bytes,
        ws_per_message_deflate=False,
        ws_ping_interval=_PING_S,
        ws_ping_timeout=_PING_S,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _bound(field: str, host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ConfigError: the address cannot be bound; names ``field``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, TypeError, UnicodeError) as error:  # the latter two for a name that no host can have
        # The errno of a failed look-up is not one that os.strerror() knows; what create_server() adds is said here already.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        raise ConfigError(f"{field}: cannot listen on {host} port {port} ({reason}); stop what uses it, or choose another port or host") from error


def _url(scheme: str, bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _exit_now(code: int) -> None:
    logging.shutdown()
    os._exit(code)
