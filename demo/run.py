"""``tandem demo``: the ordinary service on the demo's checkpoints, and a robot loop that talks to it over WebSocket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo import scene
from demo.checkpoints import MODEL_CONFIG, ensure_checkpoints
from hosting import logs
from hosting.clients.client import Client
from hosting.clients.errors import ConnectError, ConnectionLostError
from hosting.config import (
    ActionConfig,
    ActionTransportConfig,
    AdminConfig,
    PlannerConfig,
    PlannerSchedulerConfig,
    PlannerTransportConfig,
    ServiceConfig,
)
from hosting.service import Service

_SHOWN = 8


@dataclass(frozen=True)
class Exchange:
    """One request of the robot loop, as it is shown."""

    task: str
    subtask: str
    actions: str
    planner_ms: float
    policy_ms: float
    server_ms: float
    round_trip_ms: float

    def __str__(self) -> str:
        return (
            f"{self.task!r} → subtask {self.subtask!r}, actions {self.actions}, planner {self.planner_ms:.0f} ms, "
            f"policy {self.policy_ms:.0f} ms, server {self.server_ms:.0f} ms, round trip {self.round_trip_ms:.0f} ms"
        )


@dataclass
class Display:
    """Prints exchanges: as a live table on a terminal, else a line each."""

    console: Console
    live: Live | None
    recent: list[Exchange] = field(default_factory=list)

    def show(self, exchange: Exchange) -> None:
        """Add one exchange."""
        if self.live is None:
            self.console.print(str(exchange), highlight=False, markup=False, soft_wrap=True)
            return
        self.recent = [*self.recent, exchange][-_SHOWN:]
        table = Table("task", "subtask (a random planner's words)", "actions", "planner", "policy", "server", "round trip", expand=True)
        for row in self.recent:
            times = (row.planner_ms, row.policy_ms, row.server_ms, row.round_trip_ms)
            table.add_row(Text(row.task), Text(row.subtask), row.actions, *(f"{ms:.0f} ms" for ms in times))
        self.live.update(Group(table))


def run_demo(directory: Path, *, steps: int, stay: bool, headless: bool, free_ports: bool) -> int:
    """Serve, stream ``steps`` observations, then (``stay``) leave the server up until Ctrl-C. Returns the exit code.

    Args:
        directory: where the demo's checkpoints are, or are written on first use.
        headless: plain lines even on a terminal.
        free_ports: any free ports instead of the usual ones.
    """
    console = Console()
    headless = headless or not console.is_terminal
    logs.configure("plain", requests=False)  # the table says as much of each request
    planner_dir, action_dir = ensure_checkpoints(directory)
    config = _config(planner_dir, action_dir, free_ports=free_ports)
    return asyncio.run(_run(config, console, steps=steps, stay=stay, headless=headless))


async def _run(config: ServiceConfig, console: Console, *, steps: int, stay: bool, headless: bool) -> int:
    service = Service(config)
    serving = asyncio.create_task(service.serve())
    becoming_ready = asyncio.create_task(service.ready.wait())
    await asyncio.wait([serving, becoming_ready], return_when=asyncio.FIRST_COMPLETED)
    becoming_ready.cancel()
    if not serving.done():
        with _display(console, headless) as display:
            streaming = asyncio.create_task(_stream(service.addresses["action"], steps, display))
            await asyncio.wait([serving, streaming], return_when=asyncio.FIRST_COMPLETED)
        if not streaming.done():
            streaming.cancel()
        elif isinstance(streaming.exception(), ConnectError | ConnectionLostError) and service.stopping:
            return await serving  # Ctrl-C in the middle of the stream
        else:
            streaming.result()
        if not serving.done():
            if stay:
                console.print(_what_next(service.addresses))
            else:
                service.stop()
    return await serving


async def _stream(url: str, steps: int, display: Display) -> None:
    client = await asyncio.to_thread(Client, url, retry_lost=False)
    try:
        for frame in range(steps):
            obs = scene.observation(frame)
            started_s = time.perf_counter()
            reply = await asyncio.to_thread(client.infer, obs)
            display.show(_exchange(obs, reply, (time.perf_counter() - started_s) * 1e3))
    finally:
        await asyncio.to_thread(client.close)


def _exchange(obs: dict[str, Any], reply: dict[str, Any], round_trip_ms: float) -> Exchange:
    return Exchange(
        task=obs["prompt"],
        subtask=reply["subtask"]["text"],
        actions=" × ".join(map(str, reply["actions"].shape)),
        planner_ms=reply["subtask"]["ms"],
        policy_ms=reply["policy_timing"]["infer_ms"],
        server_ms=reply["server_timing"]["infer_ms"],
        round_trip_ms=round_trip_ms,
    )


@contextmanager
def _display(console: Console, headless: bool) -> Iterator[Display]:
    if headless:
        yield Display(console, None)
        return
    with Live(console=console, refresh_per_second=10) as live:
        yield Display(console, live)


def _what_next(addresses: dict[str, str]) -> Panel:
    action, planner, admin = (addresses[name] for name in ("action", "planner", "admin"))
    return Panel(
        Text(
            "The server is still up. In another terminal:\n\n"
            f"  python main.py test ws {action}\n"
            f"  python main.py test ws {action} --mode action_only\n"
            f"  python main.py test ws {planner} --embodiment aloha\n"
            f"  curl -X PATCH {admin}/config -H 'content-type: application/json' -d '{{\"action_prompt_template\": \"{{subtask}}\"}}'\n\n"
            f"Prompt templates in the browser: {admin}/docs\n"
            f"Health: curl {action.replace('ws://', 'http://')}/healthz\n"
            "An unmodified openpi-client works as well. Ctrl-C stops the server."
        ),
        title="What to try next",
        title_align="left",
    )


def _config(planner_dir: Path, action_dir: Path, *, free_ports: bool) -> ServiceConfig:
    ports: dict[str, Any] = {}
    if free_ports:
        ports = {
            "action_transport": ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
            "planner_transport": PlannerTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
            "admin": AdminConfig(port=0),
        }
    return ServiceConfig(
        action=ActionConfig(model_config_name=MODEL_CONFIG, checkpoint_dir=str(action_dir)),
        planner=PlannerConfig(checkpoint_dir=str(planner_dir), scheduler=PlannerSchedulerConfig(max_batch=1)),
        **ports,
    )
