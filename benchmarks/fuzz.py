"""A million damaged inputs: every codec in memory, every transport on a live service.

    python -m benchmarks.fuzz [--cases N] [--seed S] [--quick] [--json FILE]

What is damaged are recorded frames of the reference implementations and whole conversations of ours (``tests/e2e/hostile.py``). A codec must give a
value or a MessageError; a transport must answer in its own terms, while clients that were connected before get their own right answers after
each 10,000 cases. Anything else is a crash; more than a second for one case of a codec, or 20 s without an answer, is a hang. The same
seed gives the same cases.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Goal, finish, machine
from hosting.clients.errors import ReplyTimeoutError
from hosting.clients.quic import QuicLink
from hosting.protocol import jpeg, local_frame, msgpack_numpy
from hosting.protocol.connection import Connection
from hosting.protocol.framing import MessageReader
from hosting.protocol.messages import Message, MessageType
from hosting.protocol.striping import Assembler, split
from pi0.errors import RequestError
from tests.e2e import hostile
from tests.hosting.protocol.fuzz import mutations
from tests.hosting.transports.unix_support import framed

BATCH = 10_000
SLOW_S = 1.0
LIMIT = 1 << 20
KEPT_MIB = 128

# Shares of all cases; a live one takes ten times as long as one in memory.
CODECS = {"msgpack": 20, "local frame": 20, "conversation": 15, "byte stream": 6, "striping": 6, "JPEG": 4}
LIVE = {
    "WebSocket requests": 5,
    "WebSocket frames": 3,
    "HTTP": 2,
    "Unix requests": 5,
    "Unix streams": 3,
    "QUIC requests": 3,
    "QUIC streams": 3,
    "QUIC datagrams": 5,
}


@dataclass
class Row:
    """What one target was given and did."""

    target: str
    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    crashes: int = 0
    hangs: int = 0


def codec_cases(name: str, rng: random.Random, count: int) -> Iterator[Callable[[], None]]:
    """``count`` cases of a codec; each raises what the codec raises."""
    match name:
        case "msgpack":
            return (lambda m=m: _drop(msgpack_numpy.unpack(m)) for m in mutations(hostile.MSGPACK_SEEDS, rng, count))  # type: ignore[misc]
        case "local frame":
            return (lambda m=m: _drop(local_frame.decode(m)) for m in mutations(hostile.FRAME_SEEDS, rng, count))  # type: ignore[misc]
        case "conversation":
            return (lambda m=m: _drop(Connection().receive(Message(*m), 0.0)) for m in hostile.bodies(rng, count))  # type: ignore[misc]
        case "byte stream":
            streams = [b"".join(framed(*next(hostile.bodies(rng, 1))) for _ in range(3)) for _ in range(100)]
            return (lambda m=m: _read(m) for m in mutations(streams, rng, count))  # type: ignore[misc]
        case "striping":
            parts = [b"".join(part) for number in (1, 2, 5) for part in split(MessageType.INFER, [bytes(3000)], number, rng.randbytes(16))]
            assembler: Assembler[int] = Assembler(max_message_bytes=LIMIT)
            return (lambda m=m: _assemble(assembler, m) for m in enumerate(mutations(parts, rng, count)))  # type: ignore[misc]
        case _:
            return (lambda m=m: _decode(m) for m in mutations([_picture()], rng, count))  # type: ignore[misc]


def _drop(value: Any) -> None:
    """It was read; nothing of it is kept."""


def _read(stream: bytes) -> None:
    reader = MessageReader(LIMIT)
    while stream:
        buffer = reader.get_buffer()
        count = min(len(buffer), len(stream))
        buffer[:count] = stream[:count]
        reader.received(count)
        stream = stream[count:]
        while reader.next() is not None:
            pass


def _assemble(assembler: Assembler[int], numbered: tuple[int, bytes]) -> None:
    number, part = numbered
    assembler.expire(number / 10)
    assembler.add(part, number, number / 10)


def _picture() -> bytes:
    import numpy as np

    return jpeg.encode(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


def _decode(image: bytes) -> None:
    image = b"\xff\xd8\xff" + image[3:]
    jpeg.decoded({"image": image}, [("image",)], max_bytes=LIMIT)


def fuzz_codec(name: str, rng: random.Random, count: int) -> Row:
    """Run ``count`` cases of a codec."""
    row = Row(name, cases=count)
    begun_s = time.perf_counter()
    for case in codec_cases(name, rng, count):
        case_s = time.perf_counter()
        try:
            case()
        except RequestError:
            row.refused += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            row.crashes += 1
            traceback.print_exc()
        took_s = time.perf_counter() - case_s
        row.slowest_s = max(row.slowest_s, took_s)
        row.hangs += took_s > SLOW_S
    row.seconds = time.perf_counter() - begun_s
    return row


def live_attack(name: str, ground: hostile.Ground) -> Callable[[random.Random, int], int]:
    """What runs so many cases of a transport."""
    match name:
        case "WebSocket requests":
            return lambda rng, count: hostile.damaged_bodies(ground.link("websocket", rng.choice(["/", "/openpi/policy"])), rng, count)
        case "WebSocket frames":
            return lambda rng, count: hostile.damaged_websocket_frames(ground.websocket, rng, count)
        case "HTTP":
            return lambda rng, count: hostile.damaged_http(ground.websocket, rng, count)
        case "Unix requests":
            return lambda rng, count: hostile.damaged_bodies(ground.link("unix"), rng, count)
        case "Unix streams":
            return lambda rng, count: hostile.damaged_unix_streams(ground.unix, rng, count)
        case "QUIC requests":
            return lambda rng, count: hostile.damaged_bodies(ground.link("quic"), rng, count)
        case "QUIC streams":
            return lambda rng, count: hostile.damaged_quic_streams(_quic(ground), rng, count)
        case _:
            return lambda rng, count: hostile.damaged_quic_datagrams(ground, rng, count)


def _quic(ground: hostile.Ground) -> QuicLink:
    link = ground.link("quic")
    assert isinstance(link, QuicLink)
    return link


def fuzz_live(name: str, ground: hostile.Ground, rng: random.Random, count: int) -> Row:
    """Run ``count`` cases of a transport; after each ten thousand the other clients are looked after."""
    row = Row(name)
    attack = live_attack(name, ground)
    begun_s = time.perf_counter()
    while row.cases < count:
        batch = min(BATCH, count - row.cases)
        try:
            attack(rng, batch)
            ground.check()
        except (TimeoutError, ReplyTimeoutError):
            row.hangs += 1
            traceback.print_exc()
        except Exception:  # noqa: BLE001 - as above
            row.crashes += 1
            traceback.print_exc()
        row.cases += batch
    row.seconds = time.perf_counter() - begun_s
    return row


@contextmanager
def peak_resident() -> Iterator[list[int]]:
    """Yields ``[bytes before, most bytes so far]``, looked at ten times a second."""
    seen = [hostile.resident_bytes()] * 2
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen[1] = max(seen[1], hostile.resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def show(row: Row) -> None:
    refused = f"{100 * row.refused / row.cases:4.0f} % refused" if row.target in CODECS else ""
    slowest = f"slowest {row.slowest_s * 1e3:6.1f} ms" if row.target in CODECS else ""
    rate = row.cases / row.seconds
    print(f"{row.target:20} {row.cases:9,} {rate:9,.0f}/s  {row.crashes} crashes  {row.hangs} hangs  {refused:15} {slowest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--quick", action="store_true", help="30,000 cases, a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    cases = 30_000 if options.quick else options.cases
    logging.basicConfig(level=logging.CRITICAL)  # the service's own log of all that it refuses is not what this is about
    print(machine())
    print(f"{cases:,} cases, seed {options.seed}\n")
    rows: list[Row] = []
    with peak_resident() as resident:
        for name, share in CODECS.items():
            rows.append(fuzz_codec(name, random.Random(f"{name} {options.seed}"), cases * share // 100))
            show(rows[-1])
        with hostile.ground() as ground:
            for name, share in LIVE.items():
                rows.append(fuzz_live(name, ground, random.Random(f"{name} {options.seed}"), cases * share // 100))
                show(rows[-1])
    grown_mib = (resident[1] - resident[0]) / 2**20
    print(f"\nmemory of this process, service and attackers: {resident[0] >> 20} MiB at the beginning, {resident[1] >> 20} MiB at most")
    crashes, hangs = sum(row.crashes for row in rows), sum(row.hangs for row in rows)
    goals = [Goal("cases", sum(row.cases for row in rows), f">= {cases:,}", sum(row.cases for row in rows) >= cases * 0.999)]
    goals += [Goal("crashes", crashes, "0", crashes == 0), Goal("hangs", hangs, "0", hangs == 0)]
    goals.append(Goal("memory growth, MiB", grown_mib, f"<= {KEPT_MIB}", grown_mib <= KEPT_MIB))
    finish(goals, {row.target: asdict(row) for row in rows}, options.json)
    sys.exit(0 if all(goal.reached for goal in goals) else 1)


if __name__ == "__main__":
    main()
