"""The simulated table as a Gymnasium environment: the worked example of a robot loop around a policy server.

::

    import gymnasium

    env = gymnasium.make("demo.table:tandem/Table-v0")
    obs, info = env.reset(seed=0)
    for _ in range(MAX_CALLS):
        reply = client.infer({**obs, "prompt": info["instruction"]})
        if reply["subtask"]["done"]:  # with planner.done_subtasks ["all done"]
            break
        for action in reply["actions"]:
            obs, reward, terminated, truncated, info = env.step(action)
    print(info["success"])

An observation has the keys that the robot takes (:class:`demo.robot.Table`), an action is one row of a chunk. Needs the extra ``demo``.
"""

from __future__ import annotations

from typing import Any, Final

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from demo.expert import HORIZON
from demo.instructions import (
    FAMILIES,
    NO_GOAL,
    SUBTASKS,
    Family,
    Goal,
    Instruction,
    goal_table,
    goals_hold,
    next_subtask,
    parse,
    random_instruction,
    say,
)
from demo.render import SIZE, render
from demo.world import COLOURS, Bools, Scenes, lay_out, start

Observation = dict[str, Any]

ENV_ID: Final = "tandem/Table-v0"
MAX_CALLS: Final = 20
MAX_STEPS: Final = MAX_CALLS * HORIZON
"""Steps after which ``gymnasium.make``'s environment truncates an episode."""


class TableEnv(gymnasium.Env[Observation, NDArray[Any]]):
    """A gripper, coloured blocks and three rimmed bins, and a sentence that says what goes where.

    Observation: ``base_0_rgb``, the table from above, uint8 ``[224, 224, 3]``; ``state``, ``[3]``: the gripper's place, x and y from −1 to 1
    (y down), then −1 open or 1 closed. Action ``[3]``: the same three, where to be next; the gripper moves a bounded way per step, and values
    beyond [−1, 1] are cut.

    ``info``: ``instruction``, what was asked; ``goals``, the pairs of block and bin that it comes to; ``goals_done``, how many hold;
    ``subtask``, what the scripted rule would do now; ``success``, whether all goals hold, each block released in its bin.

    The reward is 1 while all goals hold, else 0. An episode does not terminate by itself: to notice that all is done is the planner's part,
    and a person may have more to ask (:meth:`set_instruction`).

    A seed fixes the table, the instruction and its words. Models are never trained on what a seed shows (:func:`demo.sampling.training_rng`).
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's own form

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode: got {render_mode!r}, expected 'rgb_array' or None")
        self.render_mode = render_mode
        self.observation_space = spaces.Dict(
            {
                "base_0_rgb": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "state": spaces.Box(-1.0, 1.0, (3,), np.float64),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (3,), np.float64)
        self._scenes: Scenes | None = None
        self._instruction = ""
        self._family: Family = FAMILIES[0]
        self._goals: tuple[Goal, ...] = ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """A new table.

        Args:
            options: ``{"instruction": text}`` asks for that, in any wording, on a table where it can be done and is not done yet.

        Raises:
            InstructionError: the text is no instruction; the message shows examples.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        text = options.pop("instruction", None)
        if options:
            raise ValueError(f"options: got {', '.join(map(repr, options))}, expected at most 'instruction'")
        asked = None if text is None else parse(text)
        while True:
            scenes, instruction = self._draw(asked)
            goals = instruction.goals(scenes.rims[0], scenes.present[0])
            if not goals_hold(scenes.place, goal_table([goals])).all():
                break
        self._scenes, self._goals, self._family = scenes, goals, instruction.family
        self._instruction = say(instruction, self.np_random) if text is None else text
        return self._observation(), self._info()

    def step(self, action: NDArray[Any]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One command.

        Raises:
            ValueError: ``action`` is not three finite numbers.
        """
        command = np.asarray(action, np.float64)
        if command.shape != (3,) or not np.isfinite(command).all():
            raise ValueError(f"action: got {np.array2string(command, threshold=6)}, expected 3 finite numbers (x, y, grip)")
        self.scenes.advance(command[None])
        info = self._info()
        return self._observation(), float(info["success"]), False, False, info

    def set_instruction(self, text: str) -> None:
        """Ask for something else from now on, in any wording; the table stays as it is.

        Raises:
            InstructionError: the text is no instruction (the message shows examples), or not one for this table.
        """
        asked = parse(text)
        self._goals = asked.goals(self.scenes.rims[0], self.scenes.present[0])
        self._instruction, self._family = text, asked.family

    def render(self) -> Any:
        """The picture that the camera has, ``[224, 224, 3]``; None without a ``render_mode``."""
        return None if self.render_mode is None else render(self.scenes)[0]

    @property
    def family(self) -> Family:
        """Which kind of instruction is asked."""
        return self._family

    @property
    def info(self) -> dict[str, Any]:
        """The ``info`` of this moment."""
        return self._info()

    @property
    def scenes(self) -> Scenes:
        """The table itself, a batch of one, for the scripted expert and for tests; a model has the observation.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        if self._scenes is None:
            raise gymnasium.error.ResetNeeded("there is no table yet; call reset() first")
        return self._scenes

    def _draw(self, asked: Instruction | None) -> tuple[Scenes, Instruction]:
        family = FAMILIES[self.np_random.integers(len(FAMILIES))] if asked is None else asked.family
        named: Bools = np.zeros((1, len(COLOURS)), np.bool_)
        if asked is not None:
            named[0, [goal.colour for goal in asked.named]] = True
        rims, present = lay_out(self.np_random, 1, sortable=np.array([family == "sort"]), needed=named)
        instruction = asked or random_instruction(self.np_random, family, rims[0], present[0])
        return start(self.np_random, rims, present), instruction

    def _observation(self) -> Observation:
        return {"base_0_rgb": render(self.scenes)[0], "state": self.scenes.state[0]}

    def _info(self) -> dict[str, Any]:
        place, goals = self.scenes.place, goal_table([self._goals])
        hold = goals_hold(place, goals)
        return {
            "instruction": self._instruction,
            "goals": tuple(goal.names for goal in self._goals),
            "goals_done": int((hold & (goals[..., 0] != NO_GOAL)).sum()),
            "subtask": SUBTASKS[int(next_subtask(place, goals)[0])],
            "success": bool(hold.all()),
        }


gymnasium.register(id=ENV_ID, entry_point="demo.table:TableEnv", max_episode_steps=MAX_STEPS)
