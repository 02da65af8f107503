"""The life of the process: bind → load → warm up → serve → drain → stop. :meth:`Service.serve` is that life on one screen."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from hosting import __version__
from hosting.admin import create_admin_app
from hosting.admin_page import Page
from hosting.cadence import Cadence
from hosting.calls import Slot
from hosting.certificates import Certificate, load_certificate, local_certificate
from hosting.combined import CombinedPolicy
from hosting.config import ActionConfig, PlannerConfig, ServiceConfig, pytorch_compile_mode
from hosting.conversation import Conversation
from hosting.endpoint import Endpoint
from hosting.listeners import HTTPListener, Listener, address_url
from hosting.metrics import Metrics
from hosting.observer import Observer, Observers
from hosting.policy import ConfigError, PlannerPolicy, Policy, PromptPreview, Warmable
from hosting.protocol.connection import Connection
from hosting.protocol.profiles import Profile
from hosting.recent import Recent
from hosting.request_queue import RequestQueue
from hosting.routing import Route, action_route, planner_route
from hosting.scheduler import SlotWorker, Watch
from hosting.sessions import SessionStore
from hosting.settings_file import SettingsFile
from hosting.templates import LiveSettings, PromptSettings
from hosting.transports.quic import QuicTransport
from hosting.transports.socket_file import remove_all
from hosting.transports.unix_socket import UnixSocketTransport
from hosting.transports.websocket import WebSocketTransport

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TYPED = Profile("openpi", errors="map")
"""How clients of the Unix sockets and QUIC are answered."""

_ASK_DEADLINE_S = 20.0
"""How long a person's question to the planner waits for robots to leave it a turn."""


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
        self._exit_code = 0
        self.ready = asyncio.Event()
        self.addresses: dict[str, str] = {}
        """Endpoint → URL, once bound: ``action``, ``action quic``, ``action unix``, the same of ``planner``, ``admin``."""
        self._live = LiveSettings(_prompt_settings(config), file=_settings_file(config))
        self._sessions = SessionStore(ttl_s=config.sessions.ttl_s, max_sessions=config.sessions.max_sessions)
        self._metrics = Metrics(
            config.slots,
            queue_depth=lambda slot: self._workers[slot].depth,
            sessions=lambda: len(self._sessions),
            template_revision=lambda: self._live.current.revision,
            ready=lambda slot: self._slot_state(slot) == "ready",
        )
        self._recent = Recent(self._sessions) if config.admin.page else None
        self._observer: Observer = self._metrics if self._recent is None else Observers(self._metrics, self._recent)
        self._workers: dict[Slot, SlotWorker] = {slot: self._worker(slot) for slot in config.slots}
        self._endpoints = {
            slot: Endpoint(
                slot,
                self._workers,
                sessions=self._sessions,
                deadline_ms=_slot_config(config, slot).scheduler.deadline_ms,
                max_image_bytes=config.max_message_bytes,
                observer=self._observer,
            )
            for slot in config.slots
        }
        self._policies: dict[Slot, Any] = {}
        self._warming: set[Slot] = set()
        self._listeners: dict[str, Listener] = {}
        self._certificate: Certificate | None = None

    async def serve(self) -> int:
        """Serve until told to stop; returns the exit code: 0, or 1 when accepted requests did not finish in ``drain_s`` or an endpoint broke down.

        Raises:
            ConfigError: an address cannot be bound.
            CheckpointError: a slot cannot be loaded.
        """
        started_s = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self._handle_signals:
                stack.enter_context(self._signals())
            stack.enter_context(self._sweeping())
            try:
                self._bind()
                for listener in self._listeners.values():
                    await listener.start()
                await self._until_stopped(self._load())
                if not self._stop.is_set():
                    if self._handle_signals:
                        # The process is ours: what is loaded by now stays, and the garbage collector need not look at it while robots wait.
                        gc.collect()
                        gc.freeze()
                    logger.info("%s (after %.1f s)", self.ready_line(), time.perf_counter() - started_s)
                    self.ready.set()
                    await self._stop.wait()
                code = await self._drain() or self._exit_code
            finally:
                for endpoint in self._endpoints.values():
                    endpoint.close()
                await asyncio.gather(*(listener.close() for listener in self._listeners.values()))
                for worker in self._workers.values():
                    worker.close()
        if self._handle_signals and any(worker.running for worker in self._workers.values()):
            # A refresh that nobody waits for, or a call that is stuck. A thread that comes back to an interpreter that is ending aborts the process.
            _exit_now(code)
        return code

    @property
    def stopping(self) -> bool:
        """Whether it has been told to stop."""
        return self._stop.is_set()

    def _broken(self, failed: asyncio.Future[None]) -> None:
        """An endpoint cannot go on: end the process in good order, so that whoever supervises it starts a new one."""
        if failed.cancelled():
            return
        error = failed.exception()
        if self._stop.is_set():
            return
        logger.critical("an endpoint broke down (%s); stopping", error)
        self._exit_code = 1
        self._stop.set()

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

    def status(self) -> dict[str, Any]:
        """What is served, where, and whether it is ready; for people and probes."""
        slots = {slot: self._slot_state(slot) for slot in self.config.slots}
        return {
            "ready": self.ready.is_set() and not self._stop.is_set() and all(state == "ready" for state in slots.values()),
            "mode": self.config.mode,
            "slots": slots,
            "addresses": dict(self.addresses),
            "quic_certificate_sha256": self._certificate and self._certificate.sha256,
        }

    def _slot_state(self, slot: Slot) -> str:
        endpoint = self._endpoints[slot]
        if endpoint.draining:
            return "draining"
        if endpoint.ready:
            return "stuck" if self._workers[slot].stuck else "ready"
        return "warming" if slot in self._warming else "loading"

    def _slot_details(self) -> dict[str, Any]:
        """What each slot does right now."""
        details: dict[str, Any] = {}
        for slot, worker in self._workers.items():
            scheduler = _slot_config(self.config, slot).scheduler
            details[slot] = {
                "state": self._slot_state(slot),
                "queued": worker.depth,
                "running": worker.running,
                "running_s": round(worker.running_s, 3),
                **scheduler.model_dump(),
                "metadata": dict(self._endpoints[slot].metadata),
            }
        return details

    def _previews(self) -> dict[Slot, PromptPreview]:
        return {slot: policy for slot, policy in self._policies.items() if isinstance(policy, PromptPreview)}

    def _worker(self, slot: Slot) -> SlotWorker:
        scheduler, watchdog = _slot_config(self.config, slot).scheduler, self.config.watchdog
        queue = RequestQueue(max_queue=scheduler.max_queue, max_batch=scheduler.max_batch, max_wait_s=scheduler.max_wait_ms / 1e3)
        watch = Watch(watchdog.stuck_after_s, watchdog.fatal_after_s, self._given_up)
        return SlotWorker(slot, queue, watch=watch, observer=self._observer)

    def _given_up(self, slot: Slot) -> None:
        """A model call does not come back, and no thread can be ended: the process has to."""
        if not self._stop.is_set():
            logger.critical("the %s is stuck; stopping", slot)
        self._exit_code = 1
        self._stop.set()

    def _bind(self) -> None:
        """Take every address before anything is loaded, so that early clients wait instead of being refused."""
        config = self.config
        for slot in config.slots:
            transport = config.action_transport if slot == "action" else config.planner_transport
            field = f"{slot}_transport"
            websocket = WebSocketTransport(
                self._endpoints[slot],
                api_key=config.api_key,
                profile=config.websocket.profile,
                reply=config.websocket.reply,
                idle_timeout_s=config.websocket.idle_timeout_s,
                status=self.status,
            )
            http = HTTPListener(
                f"{field}.websocket_port", config.host, transport.websocket_port, websocket.app, config, websocket=websocket, tls=True
            )
            self._listen(slot, http)
            self.addresses[slot] = http.url
            if transport.quic_port is not None:
                quic = self._quic(slot, f"{field}.quic_port", transport.quic_port)
                self._listen(f"{slot} quic", quic)
                self.addresses[f"{slot} quic"] = address_url("quic", quic.address)
            if transport.unix_socket_path is not None:
                path = Path(transport.unix_socket_path).absolute()
                self._listen(f"{slot} unix", self._unix(slot, path))
                self.addresses[f"{slot} unix"] = f"unix://{path}"
        if config.admin.port is not None:
            app = create_admin_app(
                self._live if config.planner else None,
                mode=config.mode,
                slots=config.slots,
                status=self.status,
                version=__version__,
                api_key=config.admin.api_key,
                metrics=self._metrics.render,
                slot_details=self._slot_details,
                sessions=lambda limit: (len(self._sessions), self._sessions.snapshot(limit)),
                previews=self._previews,
                page=self._page(),
            )
            admin = HTTPListener("admin.port", config.admin.host, config.admin.port, app, config)
            self._listen("admin", admin)
            self.addresses["admin"] = admin.url

    def _page(self) -> Page | None:
        """What the admin port's page shows, where there is one."""
        if self._recent is None:
            return None
        planner = self._endpoints.get("planner")
        return Page(self._recent, self._sessions, partial(planner.ask, deadline_s=_ASK_DEADLINE_S) if planner is not None else None)

    def _listen(self, name: str, listener: Listener) -> None:
        self._listeners[name] = listener
        listener.bind()

    def _converse(self, slot: Slot, transport: Literal["quic", "unix"], api_key: str | None) -> Conversation:
        return Conversation(self._endpoints[slot], Connection(_TYPED, api_key=api_key), transport=transport)

    def _unix(self, slot: Slot, path: Path) -> UnixSocketTransport:
        converse = partial(self._converse, slot, "unix", None)
        return UnixSocketTransport(path, converse, max_message_bytes=self.config.max_message_bytes, mode=int(self.config.unix_socket_mode, 8))

    def _quic(self, slot: Slot, field: str, port: int) -> QuicTransport:
        config = self.config
        if self._certificate is None:
            self._certificate = _certificate(config)
            logger.info("QUIC clients can pin this server's certificate: sha256 %s", self._certificate.sha256)
        transport = QuicTransport(
            config.host,
            port,
            partial(self._converse, slot, "quic", config.api_key),
            certificate=self._certificate,
            max_message_bytes=config.max_message_bytes,
            loop=asyncio.get_running_loop(),
            field=field,
        )
        transport.failed.add_done_callback(self._broken)
        return transport

    async def _load(self) -> None:
        """Load and warm up the slots side by side, then open their endpoints together."""
        load: dict[Slot, Callable[[ServiceConfig], Any]] = {"action": self._loaders.action, "planner": self._loaders.planner}
        loading = [self._workers[slot].run(partial(self._load_slot, slot, load[slot])) for slot in self.config.slots]
        self._policies = dict(zip(self.config.slots, await asyncio.gather(*loading), strict=True))
        action: Policy | None = self._policies.get("action")
        planner: PlannerPolicy | None = self._policies.get("planner")
        if action is not None and planner is not None and self.config.planner is not None:
            slot = self.config.planner
            combined = CombinedPolicy(
                planner,
                action,
                live=self._live,
                on_failure=slot.on_failure,
                cadence=Cadence(slot.refresh, slot.interval_s, slot.max_age_s, slot.on_task_change),
                timeout_s=slot.timeout_s,
                min_confidence=slot.min_confidence,
                done_subtasks=slot.done_subtasks,
                observer=self._observer,
            )
            self._open("action", combined.steps, combined.metadata)
            # A planner client sends the same cameras; it resizes them by the same list.
            shared = {key: value for key, value in action.metadata.items() if key == "image_specs"}
            self._open("planner", self._planner_route(planner), {**planner.metadata, **shared})
        elif action is not None:
            self._open("action", action_route(action), action.metadata)
        elif planner is not None:
            self._open("planner", self._planner_route(planner), planner.metadata)

    def _planner_route(self, planner: PlannerPolicy) -> Route:
        assert self.config.planner is not None
        return planner_route(planner, self._live, self._observer, done_subtasks=self.config.planner.done_subtasks)

    def _load_slot(self, slot: Slot, load: Callable[[ServiceConfig], T]) -> T:
        """On the slot's thread."""
        logger.info("%s: loading", slot)
        started_s = time.perf_counter()
        policy = load(self.config)
        loaded_s = time.perf_counter()
        logger.info("%s: loaded in %.1f s", slot, loaded_s - started_s)
        if isinstance(policy, Warmable):
            logger.info("%s: warming up (compiling)", slot)
            self._warming.add(slot)
            policy.warmup(max_batch=_slot_config(self.config, slot).scheduler.max_batch)
            logger.info("%s: warmed up in %.1f s", slot, time.perf_counter() - loaded_s)
        return policy

    def _open(self, slot: Slot, route: Route, metadata: Mapping[str, Any]) -> None:
        """Let the clients of ``slot`` in, and tell them what the policy and the configuration say."""
        http = self._listeners[slot]
        assert isinstance(http, HTTPListener)
        told: dict[str, Any] = {**metadata, "roboarena": self.config.roboarena.handshake()}
        if http.congestion_control is not None:
            told["tcp_congestion_control"] = http.congestion_control
        self._endpoints[slot].open(route, told)

    async def _until_stopped(self, work: Awaitable[None]) -> None:
        """``work``, or leave at once when the service is stopped before it is done: a thread that loads a model cannot be interrupted."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            if self._handle_signals:
                logger.info("stopped while loading")
                _exit_now(self._exit_code)
            working.cancel()
            return
        stopping.cancel()
        working.result()

    async def _drain(self) -> int:
        """Finish what was accepted, then close every connection."""
        draining = [asyncio.create_task(endpoint.drain()) for endpoint in self._endpoints.values()]
        await asyncio.sleep(0)  # let them refuse new requests before idle connections are closed
        await asyncio.gather(*(listener.close_idle() for listener in self._listeners.values()))
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
    def _sweeping(self) -> Iterator[None]:
        """Forget sessions whose time is over, also while nobody asks."""
        loop = asyncio.get_running_loop()
        every_s = min(self.config.sessions.ttl_s / 4, 60.0)
        timer: asyncio.TimerHandle

        def sweep() -> None:
            nonlocal timer
            if swept := self._sessions.sweep():
                logger.info("sessions: forgot %d that were not used for %g s", swept, self.config.sessions.ttl_s)
            if self._recent is not None:
                self._recent.sweep()
            timer = loop.call_later(every_s, sweep)

        timer = loop.call_later(every_s, sweep)
        try:
            yield
        finally:
            timer.cancel()

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


def load_action(config: ServiceConfig) -> Policy:
    """The configured action policy. Imports torch."""
    from action import ActionPolicy, get_config, set_num_threads

    assert config.action is not None
    slot = config.action
    model_config = get_config(slot.model_config_name)  # before the checkpoint, which may have to be fetched
    if config.planner is not None and "OMP_NUM_THREADS" not in os.environ:
        # Torch's threads wait for each other spinning. With the planner on the same cores, one that has to wait for its core makes all of
        # them spin: an action call of 27 ms became 800 ms. (docs/benchmarks.md)
        set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    mode = pytorch_compile_mode()
    policy: Policy = ActionPolicy.load(
        model_config,
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
    from pi0.locations import default_data_home
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
        drafts=slot.drafts,
        decode=slot.decode,
        subtasks=_listed(slot.subtasks),
        cameras=slot.cameras,
        compilation_cache=slot.compilation_cache or default_data_home() / "tandem" / "compiled",
    )
    return generator


def _listed(subtasks: Sequence[str] | str | None) -> Sequence[str] | None:
    """``planner.subtasks``, read from its file if it is one."""
    if not isinstance(subtasks, str):
        return subtasks
    try:
        lines = Path(subtasks).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"planner.subtasks: cannot read {subtasks}: {error}; give a text file with one subtask per line, or a list") from error
    return [line for line in lines if line.strip()]


def _local(checkpoint_dir: str) -> Path:
    """The checkpoint on this machine; a remote one is fetched on first use."""
    from pi0.locations import default_data_home, resolve
    from pi0.progress import show_progress

    with show_progress() as progress:
        return resolve(checkpoint_dir, data_home=default_data_home(), progress=progress)


def _slot_config(config: ServiceConfig, slot: Slot) -> ActionConfig | PlannerConfig:
    chosen = config.action if slot == "action" else config.planner
    assert chosen is not None, slot
    return chosen


def _settings_file(config: ServiceConfig) -> SettingsFile | None:
    return SettingsFile(Path(config.admin.settings_file)) if config.planner and config.admin.settings_file else None


def _prompt_settings(config: ServiceConfig) -> PromptSettings:
    if config.planner is None:
        return PromptSettings()
    return PromptSettings(
        generation_prompt_format=config.planner.generation_prompt_format,
        action_prompt_template=config.planner.action_prompt_template,
        max_generation_tokens=config.planner.max_generation_tokens,
    )


def _certificate(config: ServiceConfig) -> Certificate:
    """QUIC cannot do without one."""
    if config.tls is not None:
        fields = {"cert_field": "tls.certificate", "key_field": "tls.private_key"}
        return load_certificate(Path(config.tls.certificate), Path(config.tls.private_key), **fields)
    from pi0.locations import default_data_home

    directory = Path(config.quic_certificate_dir) if config.quic_certificate_dir else default_data_home() / "tls"
    return local_certificate(directory, field="quic_certificate_dir")


def _exit_now(code: int) -> None:
    remove_all()
    logging.shutdown()
    os._exit(code)
