"""Whatever comes, the clients that were there before get their own right answers (see ``hostile.py`` for what comes, and for what must hold)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.e2e import hostile
from tests.e2e.hostile import Ground


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with hostile.ground() as ground:
        yield ground


@pytest.mark.parametrize("path", ["/", "/v1/realtime/robot/openpi", "/?profile=empty&reply=arrays&response_key=action&errors=map"])
def test_damaged_requests_over_websocket(ground: Ground, path: str):
    assert hostile.damaged_bodies(ground.link("websocket", path), random.Random(path), 2000) == 2000
    ground.check()


@pytest.mark.parametrize("transport", ["unix", "quic"])
def test_damaged_requests(ground: Ground, transport: str):
    hostile.damaged_bodies(ground.link(transport), random.Random(transport), 4000)
    ground.check()


def test_damaged_websocket_frames(ground: Ground):
    hostile.damaged_websocket_frames(ground.websocket, random.Random(1), 1500)
    ground.check()


def test_damaged_http(ground: Ground):
    hostile.damaged_http(ground.websocket, random.Random(2), 1500)
    ground.check()


def test_damaged_unix_streams(ground: Ground):
    hostile.damaged_unix_streams(ground.unix, random.Random(3), 1500)
    ground.check()


def test_damaged_quic_streams(ground: Ground):
    hostile.damaged_quic_streams(ground.link("quic"), random.Random(4), 3000)
    ground.check()
