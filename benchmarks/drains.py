"""How much a restart costs: SIGTERM at random moments on a server under load, and the requests that robots lost by it.

    python -m benchmarks.drains [--quick] [--json FILE]

Each drain is a server process of its own, combined mode with stub models, asked by ten robots over WebSocket, Unix socket and QUIC, one request after
the other or several at once. A request counts as accepted when the stub policy began it or the server's log has it as answered; it is lost when its
robot got no reply. Every other request must end with a reply or with its connection closed in good order: 1001, the end of the stream between two
messages, QUIC's close with the reason. (``tests/e2e/drains.py``)
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.report import Goal, arguments, finish, machine
from tests.e2e.drains import DRAIN_S, Drain, drain


def main() -> None:
    options = arguments(__doc__)
    count = 20 if options.quick else 100
    print(machine())
    drains: list[Drain] = []
    with tempfile.TemporaryDirectory(prefix="tandem-", dir="/tmp") as directory:
        for seed in range(count):
            drains.append(drain(Path(directory) / str(seed), seed))
            for fault in drains[-1].faults:
                print(f"  drain {seed}: {fault}")
    replies = sum((drained.replies for drained in drains), Counter[str]())
    took_ms = [drained.took_s * 1e3 for drained in drains]
    figures = {
        "drains": count,
        "under way at the signal": sum(drained.under_way for drained in drains),
        "replies": dict(replies),
        "closed unanswered": sum(len(books.unanswered) for drained in drains for books in drained.robots),
        "lost": sum(len(drained.lost) for drained in drains),
        "ms to the end": {f"p{percent}": float(np.percentile(took_ms, percent)) for percent in (50, 99)},
    }
    print(f"\n{count} drains, up to {DRAIN_S:g} s each")
    for name, figure in figures.items():
        print(f"  {name:24} {figure}")
    good, zero = sum(not drained.faults for drained in drains), sum(drained.exit_code == 0 for drained in drains)
    goals = [
        Goal("drains that lost no accepted request", sum(not drained.lost for drained in drains), f"{count}", figures["lost"] == 0),
        Goal("drains with every connection closed in good order", good, f"{count}", good == count),
        Goal("exit code 0", zero, f"{count}", zero == count),
    ]
    finish(goals, figures, options.json)


if __name__ == "__main__":
    main()
