"""The demo's configuration, and its service in this process: what ``tandem demo`` and ``tandem eval-demo`` talk to through sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from demo.instructions import ALL_DONE
from hosting.config import (
    ActionConfig,
    ActionTransportConfig,
    AdminConfig,
    PlannerConfig,
    PlannerSchedulerConfig,
    PlannerTransportConfig,
    SchedulerConfig,
    ServiceConfig,
)
from hosting.service import Service

CHECKPOINTS: Final = Path(__file__).with_name("checkpoints")
"""The trained pair that the demo ships: ``planner/`` and ``action/``, as any user's checkpoints are."""
MODEL_CONFIG: Final = "demo.robot:PI05_TABLE"


def demo_config(checkpoints: Path = CHECKPOINTS, *, free_ports: bool = False, page: bool = False, rows: int = 1, **planner: Any) -> ServiceConfig:
    """Both slots on the demo's checkpoints; nothing that a configuration file could not say.

    Args:
        free_ports: any free ports, and WebSocket alone, instead of the usual addresses.
        page: serve the page.
        rows: the largest batch; one robot needs no more than 1.
        planner: more fields of the planner slot.
    """
    ports: dict[str, Any] = {}
    if free_ports:
        ports = {
            "action_transport": ActionTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
            "planner_transport": PlannerTransportConfig(websocket_port=0, quic_port=None, unix_socket_path=None),
        }
    return ServiceConfig(
        action=ActionConfig(model_config_name=MODEL_CONFIG, checkpoint_dir=str(checkpoints / "action"), scheduler=SchedulerConfig(max_batch=rows)),
        planner=PlannerConfig(
            checkpoint_dir=str(checkpoints / "planner"),
            done_subtasks=(ALL_DONE,),
            cameras=1,  # the table has one; programs for more would take half of the time until the robot moves
            scheduler=PlannerSchedulerConfig(max_batch=min(rows, 8)),
            **planner,
        ),
        admin=AdminConfig(port=0 if free_ports else 8001, page=page),
        **ports,
    )


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[asyncio.Task[int]]:
    """``service`` in this event loop, ready; the task ends with its exit code. Left while it still runs, the service is stopped and drained.

    Raises:
        Exception: what the service failed to start with.
    """
    running = asyncio.create_task(service.serve())
    try:
        becoming_ready = asyncio.create_task(service.ready.wait())
        await asyncio.wait([running, becoming_ready], return_when=asyncio.FIRST_COMPLETED)
        becoming_ready.cancel()
        if running.done():
            running.result()
        yield running
    finally:
        if not running.done() and not service.stopping:  # a second stop would force it
            service.stop()
        await running
