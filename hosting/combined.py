"""Planner → prompt → action: one request in combined mode, and what each request mode does (reference/model.md §13.5)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from hosting.failures import client_text
from hosting.policy import Observation, PlannerPolicy, Policy, Reply, RequestError, UnavailableError
from hosting.routing import ActionCalls, PlannerCalls, RequestMode, Steps, request_mode, run, without_mode
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE, LiveSettings, parse_action_prompt_template
from pi0.prompt import SEND_OR_SET_DEFAULT, prompt_text

OnFailure = Literal["use_task", "fail"]

_SERVED: frozenset[RequestMode] = frozenset({"default", "subtask_only", "action_only"})


class CombinedPolicy:
    """An action policy whose prompt is rewritten through a planner. Itself a policy, with request modes:

    ============== ==================================================== =======================================
    ``mode``       what runs                                            reply
    ============== ==================================================== =======================================
    ``default``    planner, then the action policy on the template      the action policy's, plus ``subtask``
    ``subtask_only`` the planner                                        ``{"subtask": …}``
    ``action_only``  the action policy on the task as it was sent       the action policy's
    ============== ==================================================== =======================================

    Args:
        planner: the planner slot's policy.
        action: the action slot's policy.
        action_prompt_template: the action policy's prompt; ``{subtask}`` is required, ``{task}`` is optional.
        live: settings that can be edited while the service runs; they then take the place of ``action_prompt_template`` and of the
            prompt settings that the planner was loaded with. Read once per request.
        on_failure: when the planner fails, ``use_task`` acts on the task alone and says so in ``subtask.error``; ``fail`` fails the
            request. A request that is wrong (no camera, prompt too long) fails either way.

    Raises:
        ConfigError: the template is wrong.
    """

    def __init__(
        self,
        planner: PlannerPolicy,
        action: Policy,
        *,
        action_prompt_template: str = DEFAULT_ACTION_PROMPT_TEMPLATE,
        live: LiveSettings | None = None,
        on_failure: OnFailure = "use_task",
    ) -> None:
        self.planner = planner
        self.action = action
        self._plan = PlannerCalls(planner)
        self._act = ActionCalls(action)
        self._template = parse_action_prompt_template(action_prompt_template)
        self._live = live
        self._on_failure = on_failure

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the action policy tells a client that connects."""
        return self.action.metadata

    def infer(self, obs: Observation, /, **sampling: Any) -> Reply:
        """One observation → one reply, on this thread; ``sampling`` (``noise``, ``seed``) goes to the action policy.

        Raises:
            RequestError: the observation, its mode or its prompt is wrong.
            Exception: whatever a slot raises; the planner's only under ``on_failure="fail"`` or ``mode="subtask_only"``.
        """
        return run(self.steps(obs, **sampling))

    def steps(self, obs: Observation, /, **sampling: Any) -> Steps:
        """The same as a route, for a driver that has a thread per slot."""
        mode = request_mode(obs, _SERVED)
        observation = without_mode(obs)
        if mode == "action_only":
            return (yield self._act(observation, **sampling))
        task = prompt_text(obs, getattr(self.action, "default_prompt", None), remedy=SEND_OR_SET_DEFAULT)
        settings = self._live.current if self._live is not None else None
        overrides: dict[str, Any] = {}
        if settings is not None:
            overrides = {
                "generation_prompt_format": settings.generation_prompt_format,
                "max_generation_tokens": settings.max_generation_tokens,
            }
        started_s = time.perf_counter()
        try:
            planned = yield self._plan({**observation, "prompt": task}, **overrides)
            subtask: dict[str, Any] = dict(planned["subtask"])
        except (RequestError, UnavailableError):
            raise
        except Exception as error:
            if mode == "subtask_only" or self._on_failure == "fail":
                raise
            subtask = {"text": "", "ms": (time.perf_counter() - started_s) * 1e3, "error": client_text(error, slot="planner")}
        if mode == "subtask_only":
            return {"subtask": subtask}
        prompt = task
        if subtask["text"]:
            values = {"task": task, "subtask": subtask["text"]}
            prompt = settings.action_prompt(**values) if settings is not None else self._template.render(**values)
        reply = yield self._act({**observation, "prompt": prompt}, **sampling)
        return {**reply, "subtask": subtask}
