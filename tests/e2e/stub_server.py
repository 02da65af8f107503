"""A service whose action policy waits for a line on standard input, for tests of signals: nothing in it takes time by itself.

usage: python -m tests.e2e.stub_server {load,infer,nothing} [DRAIN_S] — what waits; logs ``waiting in …`` when it does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from typing import Any

from hosting import logs
from hosting.service import Loaders, Service
from tests.serving import EchoPlanner, EchoPolicy, service_config

logger = logging.getLogger("stub")


def wait(where: str) -> None:
    logger.info("waiting in %s", where)
    sys.stdin.readline()


def main() -> int:
    waits, *drain_s = sys.argv[1:]

    def hook(obs: Mapping[str, Any]) -> None:
        if waits == "infer":
            wait("infer")

    def load(config: Any) -> EchoPolicy:
        if waits == "load":
            wait("load")
        return EchoPolicy(hook)

    logs.configure("plain")
    config = service_config(**({"drain_s": float(drain_s[0])} if drain_s else {}))
    return asyncio.run(Service(config, loaders=Loaders(load, lambda config: EchoPlanner())).serve())


if __name__ == "__main__":
    sys.exit(main())
