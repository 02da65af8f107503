"""Runs with numpy 1: our clients over every transport, raw and JPEG. Arguments: the addresses as JSON; prints what came back as JSON."""

import asyncio
import json
import sys
from typing import Any

import numpy as np

from hosting.clients import connect, connect_async


def observation() -> dict[str, Any]:
    y, x = np.mgrid[0:60, 0:80]
    image = np.stack([y * 4, x * 3, np.full_like(x, 90)], -1).astype(np.uint8)
    return {"images": {"cam_high": image}, "state": np.arange(3, dtype=np.float32), "step": np.float32(1.5), "prompt": "x"}


def main() -> None:
    addresses, pin = json.loads(sys.argv[1]), sys.argv[2]
    results: dict[str, Any] = {"numpy": np.__version__}
    for name, address in addresses.items():
        for encode in (None, "jpeg"):
            with connect(address, pin=pin if name == "quic" else None, encode=encode, seed=3) as client:
                reply = client.infer(observation())
                batch = client.infer_batch([observation(), observation()])
                client.reset()
            results[f"{name} {encode}"] = [str(reply["actions"].dtype), reply["actions"].tolist(), reply["saw"], list(batch["actions"].shape)]

    async def twin() -> list[Any]:
        async with await connect_async(addresses["websocket"], seed=3) as client:
            actions: list[Any] = (await client.infer(observation()))["actions"].tolist()
            return actions

    results["async"] = asyncio.run(twin())
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
