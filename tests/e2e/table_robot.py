"""Robots at the demo's table for tests of the page, without any trained model: the policies are the scripted rules, which see the tables themselves.

usage: python -m tests.e2e.table_robot [PORT] — serves with the page on (any free port by default) and two robots at work, until Ctrl-C.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import gymnasium
import numpy as np

from demo.expert import HORIZON, plan
from demo.instructions import ALL_DONE, DONE, SUBTASKS, InstructionError, goal_table, next_subtask, parse
from demo.render import render
from demo.world import Scenes
from hosting.clients.client import Client
from hosting.config import AdminConfig
from hosting.policy import ObservationError
from tests.serving import RunningService, service_config, start, stubs

CONTROL_S = 0.05


class Tables:
    """The tables of all robots; whose an observation is, its picture tells."""

    def __init__(self) -> None:
        self.environments: list[Any] = []

    def of(self, obs: Mapping[str, Any]) -> Scenes:
        scenes: list[Scenes] = [environment.unwrapped.scenes for environment in self.environments]
        return next(own for own in scenes if len(scenes) == 1 or np.array_equal(render(own)[0], obs["base_0_rgb"]))


class TablePlanner:
    """Says what the scripted rule would do for the task; every prompt format that it was asked with is kept."""

    def __init__(self, tables: Tables) -> None:
        self.metadata: dict[str, Any] = {}
        self.formats: list[str | None] = []
        self._tables = tables

    def infer(
        self, obs: Mapping[str, Any], *, generation_prompt_format: str | None = None, max_generation_tokens: int | None = None
    ) -> dict[str, Any]:
        self.formats.append(generation_prompt_format)
        if "state" not in obs:  # a try-out on the page: a picture and a task
            return {"subtask": {"text": f"look at {np.asarray(obs['base_0_rgb']).shape[1]} pixels", "ms": 1.0}}
        scenes = self._tables.of(obs)
        try:
            goals = parse(str(obs["prompt"])).goals(scenes.rims[0], scenes.present[0])
        except InstructionError as error:
            raise ObservationError(f"prompt: {error}") from error
        return {"subtask": {"text": SUBTASKS[int(next_subtask(scenes.place, goal_table([goals]))[0])], "ms": 31.0}}

    def preview_prompt(self, prompt: str) -> dict[str, Any]:
        words = prompt.split()
        return {"text": prompt, "token_ids": [len(word) for word in words], "tokens": len(words), "max_tokens": 200, "not_fitting": ""}


class TablePolicy:
    """Does the subtask that its prompt names, and keeps every prompt."""

    metadata: Mapping[str, Any] = {"action_horizon": HORIZON, "image_specs": []}

    def __init__(self, tables: Tables) -> None:
        self.prompts: list[str] = []
        self._tables = tables

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        prompt = str(obs["prompt"])
        self.prompts.append(prompt)
        named = [number for number, text in enumerate(SUBTASKS) if text in prompt]
        return {"actions": plan(self._tables.of(obs), np.array([named[-1] if named else DONE]))[0], "policy_timing": {"infer_ms": 1.0}}

    preview_prompt = TablePlanner.preview_prompt


class Robot(threading.Thread):
    """The ordinary loop around a server, as an unmodified client has it.

    Args:
        pause: calls that it makes when all is done until it begins a new episode; None: it never does.

    Attributes:
        instructions: the ``instruction`` of each reply, None where there is none.
    """

    def __init__(self, url: str, environment: Any, *, name: str, seed: int, control_s: float = CONTROL_S, pause: int | None = None) -> None:
        super().__init__(name=name)
        self.instructions: list[str | None] = []
        self._url = url
        self._environment = environment
        self._seed = seed
        self._control_s = control_s
        self._pause = pause
        self._halt = threading.Event()

    def run(self) -> None:
        obs, info = self._environment.reset(seed=self._seed)
        begins, done = True, 0
        with Client(self._url, session_id=self.name) as client:
            while not self._halt.is_set():
                reply = client.infer({**obs, "prompt": info["instruction"], "reset": begins})
                self.instructions.append(reply.get("instruction"))
                for action in reply["actions"]:
                    obs, *_ = self._environment.step(action)
                    self._halt.wait(self._control_s)
                begins, done = False, done + 1 if reply["subtask"]["text"] == ALL_DONE else 0
                if self._pause is not None and done > self._pause:
                    self._seed += 1
                    obs, info = self._environment.reset(seed=self._seed)
                    begins, done = True, 0

    def stop(self) -> None:
        self._halt.set()
        self.join(30)
        assert not self.is_alive(), f"{self.name} did not stop"


class Table:
    """A service with its page, and robots that it serves."""

    def __init__(self, service: RunningService, planner: TablePlanner, policy: TablePolicy, robots: list[Robot]) -> None:
        self.service = service
        self.planner = planner
        self.policy = policy
        self.robots = robots
        self.url = service.http("admin")


@contextmanager
def at_the_table(*names: str, port: int = 0, api_key: str | None = None, control_s: float = CONTROL_S, pause: int | None = None) -> Iterator[Table]:
    """A service with robots of these names at work."""
    tables = Tables()
    planner, policy = TablePlanner(tables), TablePolicy(tables)
    config = service_config(admin=AdminConfig(port=port, page=True, api_key=api_key))
    with ExitStack() as stack:
        service = stack.enter_context(start(config, stubs(policy, planner)))
        robots = []
        for number, name in enumerate(names):
            environment = gymnasium.make("demo.table:tandem/Table-v0", max_episode_steps=1_000_000)
            environment.reset(seed=number)
            tables.environments.append(environment)
            robots.append(Robot(service.addresses["action"], environment, name=name, seed=number, control_s=control_s, pause=pause))
        for robot in robots:
            robot.start()
            stack.callback(robot.stop)
        yield Table(service, planner, policy, robots)


if __name__ == "__main__":
    with at_the_table("robot-1", "robot-2", port=int(sys.argv[1]) if len(sys.argv) > 1 else 0, pause=1) as table:
        sys.stdout.write(f"{table.url}\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.stdout.write("stopping\n")
