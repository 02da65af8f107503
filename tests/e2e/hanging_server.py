"""A service whose action policy never returns, for tests of the watchdog.

usage: python -m tests.e2e.hanging_server — logs ``hanging`` when it does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

from hosting import logs
from hosting.config import WatchdogConfig
from hosting.service import Loaders, Service
from tests.serving import EchoPlanner, EchoPolicy, service_config

logger = logging.getLogger("stub")


def hang(obs: Mapping[str, Any]) -> None:
    logger.info("hanging")
    threading.Event().wait()


def main() -> int:
    logs.configure("plain")
    config = service_config(watchdog=WatchdogConfig(stuck_after_s=0.1, fatal_after_s=0.2))
    return asyncio.run(Service(config, loaders=Loaders(lambda config: EchoPolicy(hang), lambda config: EchoPlanner())).serve())


if __name__ == "__main__":
    sys.exit(main())
