"""The three policies of molmospaces; two of them speak the arrays of the package ``msgpack-numpy``."""

from __future__ import annotations

import time
import uuid
from typing import Any, ClassVar

import msgpack
import msgpack_numpy
import numpy as np
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection

from tests.e2e.peers.dialing import dial
from tests.e2e.peers.openpi import OpenPIClient


def pack(value: Any) -> bytes:
    """With the real package, called as its documentation says."""
    return msgpack.packb(value, default=msgpack_numpy.encode)


def unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, object_hook=msgpack_numpy.decode)


class PiPolicy:
    """``pi_policy``: five tries to connect, and one more inference after a connection that was closed with an error."""

    connect_retry_s: ClassVar[float] = 1.0
    reconnect_pause_s: ClassVar[float] = 5.0

    def __init__(self, host: str, port: int, *, chunk_size: int = 8) -> None:
        self._address = (host, port)
        self._chunk_size = chunk_size
        self._buffer: np.ndarray | None = None
        self._index = 0
        self.model = self._prepare_model()

    def reset(self) -> None:
        self._buffer, self._index = None, 0

    def action(self, joints: np.ndarray, task: str) -> dict[str, np.ndarray]:
        if self._buffer is None or self._index >= self._chunk_size:
            model_input = {
                "observation/exterior_image_1_left": np.zeros((224, 224, 3), np.uint8),
                "observation/wrist_image_left": np.zeros((224, 224, 3), np.uint8),
                "observation/joint_position": joints,
                "observation/gripper_position": np.array(np.clip(0.3, 0, 1)).reshape(1),
                "prompt": task.lower(),
            }
            try:
                self._buffer = self.model.infer(model_input)["actions"]
            except ConnectionClosedError:
                self.model = self._prepare_model()
                time.sleep(self.reconnect_pause_s)
                self._buffer = self.model.infer(model_input)["actions"]
            self._index = 0
        output = self._buffer[self._index]
        self._index += 1
        return {"arm": output[:7].reshape(7), "gripper": np.array([255.0]) if output[7] > 0.5 else np.array([0.0])}

    def close(self) -> None:
        self.model.close()

    def _prepare_model(self) -> OpenPIClient:
        for _ in range(4):
            try:
                return OpenPIClient(*self._address)
            except Exception:  # noqa: BLE001 - as the original does
                time.sleep(self.connect_retry_s)
        return OpenPIClient(*self._address)


class DreamZeroPolicy:
    """``dreamzero_policy``: package ``msgpack-numpy``, ``ws`` then ``wss``, patient pings, and a lost connection is made again for ever."""

    reconnect_retry_s: ClassVar[float] = 2.0

    def __init__(self, host: str, port: int) -> None:
        self._uri = f"ws://{host}:{port}"
        try:
            self._ws, self.metadata = self._connect(self._uri)
        except Exception:  # noqa: BLE001 - as the original does
            self._uri = f"wss://{host}:{port}"
            self._ws, self.metadata = self._connect(self._uri)
        self._session_id = str(uuid.uuid4())

    def infer(self, joints: np.ndarray, prompt: str) -> np.ndarray:
        response = self._send(
            {
                **{f"observation/exterior_image_{index}_left": np.zeros((180, 320, 3), np.uint8) for index in (0, 1)},
                "observation/wrist_image_left": np.zeros((180, 320, 3), np.uint8),
                "observation/joint_position": joints.astype(np.float64),
                "observation/cartesian_position": np.zeros(6),
                "observation/gripper_position": np.zeros(1),
                "prompt": prompt,
                "session_id": self._session_id,
                "endpoint": "infer",
            }
        )
        if isinstance(response, str):
            raise RuntimeError(f"Error in inference server:\n{response}")
        result = unpack(response)
        return result["actions"] if isinstance(result, dict) else result

    def reset(self) -> Any:
        self._session_id = str(uuid.uuid4())
        return self._send({"endpoint": "reset"})

    def close(self) -> None:
        self._ws.close()

    def _send(self, message: dict[str, Any]) -> Any:
        data = pack(message)
        try:
            self._ws.send(data)
            return self._ws.recv()
        except ConnectionClosedError:
            self._reconnect()
            self._ws.send(data)
            return self._ws.recv()

    def _reconnect(self) -> None:
        while True:
            try:
                self._ws, self.metadata = self._connect(self._uri)
                return
            except Exception:  # noqa: BLE001 - as the original does
                time.sleep(self.reconnect_retry_s)

    def _connect(self, uri: str) -> tuple[ClientConnection, Any]:
        connection = dial(uri, compression=None, max_size=None, ping_interval=60, ping_timeout=600)
        return connection, unpack(connection.recv())


class WebsocketPolicy:
    """``websocket_policy``: package ``msgpack-numpy``, a handshake within 10 s, an answer within 10 s, the task under ``task``.

    A reset is a new connection.
    """

    timeout_s: ClassVar[float] = 10.0

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._open()

    def infer(self, joints: np.ndarray, task: str) -> dict[str, Any]:
        self._ws.send(pack({"observation/joint_position": joints, "observation/wrist_image_left": np.zeros((224, 224, 3), np.uint8), "task": task}))
        response = self._ws.recv(timeout=self.timeout_s)
        if isinstance(response, str):
            raise RuntimeError(response)
        result = unpack(response)
        if not isinstance(result, dict):
            raise TypeError(f"expected a map, got {type(result)}")
        return result

    def reset(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self._ws.close()

    def _open(self) -> None:
        self._ws = dial(self._uri, compression=None, max_size=None, open_timeout=self.timeout_s)
        self.metadata = unpack(self._ws.recv(timeout=self.timeout_s))
