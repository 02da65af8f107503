"""A long inference drops nobody. The keepalive of a default client, sped up; `benchmarks/keepalive.py` takes the real 60 s."""

import threading

import httpx
from websockets.sync.client import connect

from hosting.protocol import msgpack_numpy
from tests.serving import EchoPolicy, service_config, start, stubs


def test_pings_and_health_are_answered_while_an_inference_runs():
    working, finish = threading.Event(), threading.Event()

    def block(obs):
        working.set()
        assert finish.wait(60)

    # The client drops a server that leaves a ping unanswered for ping_timeout; it pings all the time here.
    keepalive = {"ping_interval": 0.05, "ping_timeout": 5}
    with (
        start(service_config("action"), stubs(EchoPolicy(block))) as service,
        connect(service.addresses["action"], compression=None, **keepalive) as websocket,
        httpx.Client() as http,
    ):
        websocket.recv()
        websocket.send(msgpack_numpy.pack({"prompt": "x"}))
        assert working.wait(30)
        for _ in range(20):
            assert websocket.ping().wait(5), "a ping was not answered while the model ran"
            assert http.get(service.http("action") + "/healthz").text == "OK\n"
        with connect(service.addresses["action"], compression=None) as other:
            assert "action_horizon" in msgpack_numpy.unpack(other.recv(timeout=5)), "a new client is greeted at once"
        finish.set()
        assert "actions" in msgpack_numpy.unpack(websocket.recv(timeout=30))
