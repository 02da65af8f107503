"""Does a long inference drop an unmodified client? The real openpi-client (its own venv) waits for one inference of 60 s.

    python -m benchmarks.keepalive [--quick] [--json FILE]

Its keepalive is what drops it from openpi's own server: a ping every 20 s that must be answered within 20 s. ``--quick`` waits 42 s, just
beyond both. The peer, openpi's design with the policy inline, runs beside ours at the same time.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.overhead import running, serve_ours, serve_peer
from benchmarks.report import Goal, arguments, finish, machine

CLIENT_PYTHON = Path(__file__).parents[1] / ".venv-openpi-client" / "bin" / "python"
CLIENT = """
import sys
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy(host=sys.argv[1], port=None)
try:
    policy.infer({"prompt": "x", "sleep_s": float(sys.argv[2])})
    print("answered")
except Exception as error:
    print(f"dropped: {type(error).__name__}: {error}")
"""


def outcome(url: str, seconds: float) -> str:
    """What the client says after one inference of ``seconds``."""
    done = subprocess.run([str(CLIENT_PYTHON), "-c", CLIENT, url, str(seconds)], capture_output=True, text=True, timeout=seconds + 120, check=True)
    return done.stdout.strip()


def main() -> None:
    options = arguments(__doc__)
    if not CLIENT_PYTHON.exists():
        raise SystemExit("the unmodified openpi-client is missing; `make .venv-openpi-client/.ok` installs it")
    seconds = 42.0 if options.quick else 60.0
    print(machine())
    with running(serve_ours) as ours, running(serve_peer) as peer, ThreadPoolExecutor(2) as pool:
        answers = {name: pool.submit(outcome, url, seconds) for name, url in {"tandem": ours, "openpi design": peer}.items()}
        outcomes = {name: answer.result() for name, answer in answers.items()}
    print(f"\none inference of {seconds:.0f} s, unmodified openpi-client")
    for name, text in outcomes.items():
        print(f"  {name:14}{text}")
    survived = outcomes["tandem"] == "answered"
    finish([Goal(f"client survives a {seconds:.0f} s inference", float(survived), "= 1", survived)], {"outcomes": outcomes}, options.json)


if __name__ == "__main__":
    main()
