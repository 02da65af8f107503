"""Runs in a venv with the real HUD harness (``hud[robot]``): models, rollouts and task sets against a policy server; prints what came as JSON.

usage: python hud_driver.py CHECKS URL — ``all`` makes one report; ``restart`` infers, says ``ready``, waits for a line, infers again.

``PooledModel`` of this repository is imported from PYTHONPATH. Needs neither network nor key: nothing is reported to HUD's platform.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace

os.environ["HUD_TELEMETRY_ENABLED"] = "false"

import numpy as np
from hud import Environment, LocalRuntime, Taskset
from hud.agents.base import Agent
from hud.agents.robot import BatchedAgent, OpenPIAdapter, RemoteModel, RobotAgent
from hud.environment.robot import RobotBridge, RobotEndpoint
from hud.eval.run import rollout
from websockets.exceptions import ConnectionClosed

from hosting.clients.errors import InferenceError
from hosting.clients.hud import PooledModel

TICKS = 3
CALLERS, CALLS = 8, 20
SLOTS = 3
CONTRACT = {
    "robot_type": "stub",
    "control_rate": 10,
    "features": {
        "observation/image": {"role": "observation", "type": "rgb", "dtype": "uint8", "shape": [16, 16, 3]},
        "observation/wrist_image": {"role": "observation", "type": "rgb", "dtype": "uint8", "shape": [16, 16, 3]},
        "observation/state": {"role": "observation", "dtype": "float32", "shape": [2], "names": ["x", "y"]},
        "action": {"role": "action", "dtype": "float32", "shape": [2], "names": ["x", "y"]},
    },
}


class StubSim(RobotBridge):
    """``slots`` robots in lockstep; the state of slot i is (i + 1, tick), the score the sum of the first action components."""

    def __init__(self, task: str, slots: int) -> None:
        super().__init__()
        self.task = task
        self.num_envs = slots
        self.contract = CONTRACT

    def reset(self) -> str:
        self.tick = 0
        self.totals = np.zeros(self.num_envs)
        return self.task

    def step(self, action: np.ndarray) -> None:
        self.tick += 1
        self.totals += action[:, 0]

    def get_observation(self):
        state = np.stack([np.arange(1, self.num_envs + 1), np.full(self.num_envs, self.tick)], axis=1).astype(np.float32)
        images = np.zeros((self.num_envs, 16, 16, 3), np.uint8)
        data = {"observation/image": images, "observation/wrist_image": images, "observation/state": state}
        return data, np.full(self.num_envs, self.tick >= TICKS)

    def result_slots(self):
        return [{"score": float(total), "success": True, "total_reward": float(total)} for total in self.totals]


@asynccontextmanager
async def simulator(task: str, slots: int):
    """A running sim, and what makes an environment of it for each rollout; the rollouts begin together."""
    bridge, together = StubSim(task, slots), asyncio.Barrier(slots)
    await bridge.start()
    control = await bridge.serve_control()
    host, port = control.sockets[0].getsockname()[:2]

    def environment(task=None) -> Environment:
        env, sim = Environment("stub"), RobotEndpoint.remote(host, port)
        sim.attach(env)

        @env.initialize
        async def up() -> None:
            await sim.start()
            for capability in await sim.capabilities():
                env.add_capability(capability)

        env.shutdown(sim.stop)

        @env.template(id="lift")
        async def lift():
            episode = await sim.reset()
            await together.wait()
            yield {"prompt": episode["prompt"], "bindings": {"robot": {"token": episode["token"]}}}
            yield await sim.result(token=episode["token"])

        return env

    try:
        yield environment
    finally:
        control.close()
        await control.wait_closed()
        await bridge.stop()


class Driver(RobotAgent):
    def __init__(self, model, chunk_size: int) -> None:
        super().__init__()
        self.model = model
        self.adapter = OpenPIAdapter(chunk_size=chunk_size)


# All that BatchedModel wants of PyTorch, which would be two gigabytes here; the observations have arrays where others have tensors.
sys.modules["torch"] = SimpleNamespace(is_tensor=lambda value: isinstance(value, np.ndarray), stack=np.stack)


class DriverPerRun(Agent):
    """``Taskset.run`` takes one agent for all runs; this one drives each with an agent of its own."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    async def __call__(self, run) -> None:
        await self.make()(run)


def sample(state) -> dict:
    data = {"observation/image": np.zeros((16, 16, 3), np.uint8), "observation/wrist_image": np.zeros((16, 16, 3), np.uint8)}
    return {"data": {**data, "observation/state": np.asarray(state, np.float32)}}


def adapted(state, prompt: str = "lift the cube") -> dict:
    adapter = OpenPIAdapter()
    features = CONTRACT["features"]
    adapter.bind(features["action"], {name: spec for name, spec in features.items() if spec["role"] == "observation"})
    assert adapter.image_keys == ["observation/image", "observation/wrist_image"] and adapter.state_key == "observation/state"
    return adapter.adapt_observation(sample(state), prompt)


def described(array: np.ndarray) -> dict:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "first": array.reshape(-1, array.shape[-1])[0].tolist()}


def remote(url: str, **options) -> RemoteModel:
    """A whole URL travels in ``host``; without a port the client appends nothing."""
    return RemoteModel(url, None, **options)


def unit(url: str) -> dict:
    with PooledModel(url) as pooled, PooledModel(f"{url}/?response_key=action", response_key="action") as renamed:
        models = {
            "remote": remote(url),
            "remote_action": remote(f"{url}/?response_key=action", response_key="action"),
            "pooled": pooled,
            "pooled_action": renamed,
        }
        report = {
            name: {"infer": described(model.infer(adapted([5, 6]))), "ainfer": described(asyncio.run(model.ainfer(adapted([7, 8]))))}
            for name, model in models.items()
        }
        rows = [adapted([row, 0]) for row in range(3)]
        stacked = {key: [row[key] for row in rows] if key == "prompt" else np.stack([row[key] for row in rows]) for key in rows[0]}
        for name, batch in (("list", rows), ("stacked", stacked)):
            actions = pooled.infer(batch)
            report[f"pooled_{name}"] = {"shape": list(actions.shape), "dtype": str(actions.dtype), "states": actions[:, 0, 0].tolist()}
    return report


def concurrency(url: str) -> dict:
    """8 callers × 20 calls, begun together: with a ``RemoteModel`` each, then with one ``PooledModel`` for all."""

    def wrong_answers(models) -> int:
        barrier = threading.Barrier(CALLERS)

        def caller(index: int) -> int:
            barrier.wait(60)
            answers = [models[index].infer(adapted([index, call]))[0, 0] for call in range(CALLS)]
            return sum(list(answer) != [index, call] for call, answer in enumerate(answers))

        with ThreadPoolExecutor(CALLERS) as threads:
            return sum(threads.map(caller, range(CALLERS)))

    async def gathered(model) -> int:
        answers = await asyncio.gather(*(model.ainfer(adapted([index, 1])) for index in range(CALLERS * 4)))
        return sum(int(answer[0, 0]) != index for index, answer in enumerate(answers))

    with PooledModel(url, size=CALLERS) as pooled, PooledModel(url, size=3) as small:
        return {
            "remote_wrong": wrong_answers([remote(url) for _ in range(CALLERS)]),
            "pooled_wrong": wrong_answers([pooled] * CALLERS),
            "pooled_gathered_wrong": asyncio.run(gathered(small)),
        }


def errors(url: str) -> dict:
    """The text that a user of HUD sees; the same model answers the next observation."""
    report = {}
    with PooledModel(url) as pooled:
        for name, model in {"remote": remote(url), "pooled": pooled}.items():
            broken = adapted([1, 2])
            del broken["observation/state"]
            try:
                model.infer(broken)
            except (RuntimeError, InferenceError) as error:
                report[name] = {"type": type(error).__name__, "text": str(error), "after": described(model.infer(adapted([3, 4])))}
    return report


async def full_rollout(url: str) -> dict:
    async with simulator("rollout", 1) as environment:
        env = environment()
        run = await rollout(env.tasks["lift"](), Driver(remote(url), chunk_size=2), runtime=LocalRuntime(env))
    return {"reward": run.reward, "error": run.grade.is_error}


async def multi_rollout(task: str, agent: Agent) -> dict:
    async with simulator(task, SLOTS) as environment:
        tasks = [environment().tasks["lift"]()]
        job = await Taskset("stub", tasks).run(agent, runtime=LocalRuntime(environment), group=SLOTS, max_concurrent=SLOTS, rollout_timeout=60)
    return {"rewards": sorted(run.reward for run in job.runs), "errors": len(job.errors)}


def all_checks(url: str) -> dict:
    with PooledModel(url, size=SLOTS) as pooled:
        agents = {
            "a RemoteModel per run": DriverPerRun(lambda: Driver(remote(url), chunk_size=1)),
            "one agent": Driver(pooled, chunk_size=1),
            "batched agent": BatchedAgent(Driver(pooled, chunk_size=1)),
        }
        return {
            "unit": unit(url),
            "concurrency": concurrency(url),
            "errors": errors(url),
            "rollout": asyncio.run(full_rollout(url)),
            **{name: asyncio.run(multi_rollout(name, agent)) for name, agent in agents.items()},
        }


def restart(url: str, say) -> dict:
    """What a model does when its server is replaced between two observations."""
    stock = remote(url)
    with PooledModel(url) as pooled:
        before = {name: described(model.infer(adapted([1, 2]))) for name, model in (("remote", stock), ("pooled", pooled))}
        say("ready")
        assert sys.stdin.readline() == "restarted\n"
        failures = []
        for _ in range(2):
            try:
                stock.infer(adapted([1, 2]))
            except ConnectionClosed as error:
                failures.append(type(error).__name__)
        return {"before": before, "remote_failures": failures, "pooled_after": described(pooled.infer(adapted([3, 4])))}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # the harness prints its progress

    def say(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    checks, url = sys.argv[1:]
    say(json.dumps({"numpy": np.__version__, **(all_checks(url) if checks == "all" else restart(url, say))}))


main()
