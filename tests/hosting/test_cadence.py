"""When a request waits for the planner, when a refresh starts, which plan a session keeps; and that no reply ever mixes two."""

from __future__ import annotations

from typing import Any

import pytest

from hosting.cadence import Basis, Cadence, Plan, Refresh, SessionPlan
from hosting.templates import PromptSettings
from tests.hosting import cadence_interleavings

ASYNC = Cadence("async", interval_s=1.0, max_age_s=10.0)
KEEP = Cadence("async", interval_s=1.0, max_age_s=10.0, on_task_change="keep")
SETTINGS = PromptSettings()


def basis(order: int, task: str = "tidy", *, at_s: float = 0.0, settings: PromptSettings | None = SETTINGS) -> Basis:
    return Basis(task, settings, source_index=order, order=order, observed_s=at_s)


def seen(memory: SessionPlan, *args: Any, **kwargs: Any) -> Basis:
    """An observation that came."""
    new = basis(*args, **kwargs)
    memory.observe(new)
    return new


def planned(memory: SessionPlan, *args: Any, **kwargs: Any) -> Plan:
    """A plan from an observation that came; the planner was asked when it did."""
    new = seen(memory, *args, **kwargs)
    memory.refreshed_s = new.observed_s
    return memory.planned(new, {"text": f"{new.task} {new.order}"})


def test_a_plan_is_revised_and_numbered() -> None:
    memory = SessionPlan()
    first, second = planned(memory, 0), planned(memory, 1)
    assert (first.revision, second.revision) == (1, 2) and memory.current is second


def test_what_would_have_been_planned_the_same() -> None:
    one = basis(0, settings=PromptSettings(generation_prompt_format="Do {task}", max_generation_tokens=5))
    assert one.plans_alike(
        PromptSettings(generation_prompt_format="Do {task}", max_generation_tokens=5, action_prompt_template="{subtask}", revision=9)
    )
    assert not one.plans_alike(PromptSettings(generation_prompt_format="Do {task}", max_generation_tokens=6))
    assert not one.plans_alike(PromptSettings(max_generation_tokens=5))
    assert not one.plans_alike(None) and basis(0, settings=None).plans_alike(None)


def test_a_plan_of_an_older_task_is_not_taken() -> None:
    memory = SessionPlan()
    old = seen(memory, 0)
    seen(memory, 1, "fold")
    assert not memory.takes(old)
    late = memory.planned(old, {"text": "too late"})
    assert memory.current is None and late.subtask["text"] == "too late"
    assert planned(memory, 2, "fold").revision == 2


def test_a_plan_from_an_older_observation_is_not_taken() -> None:
    memory = SessionPlan()
    old, new = seen(memory, 0), seen(memory, 1)
    current = memory.planned(new, {"text": "new"})
    assert not memory.takes(old)
    memory.planned(old, {"text": "old"})
    assert memory.current is current


def test_an_observation_that_was_overtaken_does_not_bring_its_task_back() -> None:
    memory = SessionPlan()
    new = seen(memory, 1, "fold")
    old = seen(memory, 0, "tidy")
    assert memory.takes(new) and not memory.takes(old) and memory.newest(new) and not memory.newest(old)


def test_a_reset_forgets_all_but_the_number_of_plans() -> None:
    memory = SessionPlan()
    under_way = seen(memory, 0)
    planned(memory, 1)
    memory.failed(seen(memory, 2), "broken")
    renewed = memory.renewed()
    assert renewed.current is None and renewed.error is None and renewed.refresh is None
    assert not memory.takes(under_way) and not memory.takes(basis(9))
    assert planned(renewed, 3).revision == 2


def test_an_error_stays_until_a_newer_plan_comes() -> None:
    memory = SessionPlan()
    old, current = seen(memory, 0), planned(memory, 1)
    memory.failed(old, "of one that was overtaken")
    assert memory.error is None
    memory.failed(seen(memory, 2), "broken")
    assert memory.error == "broken" and memory.current is current
    planned(memory, 3)
    assert memory.error is None


def test_a_fallback_is_no_plan() -> None:
    memory = SessionPlan()
    assert memory.fallback(seen(memory, 0), {"text": ""}).revision == 0
    current = planned(memory, 1)
    assert memory.fallback(seen(memory, 2), {"text": ""}).revision == 1 and memory.current is current


def test_every_request_plans_for_itself() -> None:
    memory = SessionPlan()
    planned(memory, 0)
    assert Cadence().usable(memory, seen(memory, 1), 0.0) is None


def test_the_first_request_waits_and_the_next_does_not() -> None:
    memory = SessionPlan()
    assert ASYNC.usable(memory, seen(memory, 0), 0.0) is None
    plan = planned(memory, 1)
    assert ASYNC.usable(memory, seen(memory, 2), 0.5) is plan


@pytest.mark.parametrize(("cadence", "age_s", "waits"), [(ASYNC, 10.0, False), (ASYNC, 10.1, True), (Cadence("async", max_age_s=None), 1e9, False)])
def test_a_request_waits_when_the_plan_is_too_old(cadence: Cadence, age_s: float, waits: bool) -> None:
    memory = SessionPlan()
    planned(memory, 0, at_s=100.0)
    assert (cadence.usable(memory, seen(memory, 1), 100.0 + age_s) is None) is waits


def test_a_new_task_waits_or_keeps_the_old_one() -> None:
    memory = SessionPlan()
    plan = planned(memory, 0)
    new = seen(memory, 1, "fold")
    assert ASYNC.usable(memory, new, 0.1) is None and KEEP.usable(memory, new, 0.1) is plan
    assert KEEP.due(memory, new, 0.1)


@pytest.mark.parametrize("cadence", [ASYNC, KEEP])
def test_a_refresh_is_due_an_interval_after_the_last(cadence: Cadence) -> None:
    memory = SessionPlan()
    planned(memory, 0, at_s=5.0)
    now = seen(memory, 1)
    assert not cadence.due(memory, now, 5.9) and cadence.due(memory, now, 6.0)


def test_new_generation_settings_are_planned_with_at_once() -> None:
    memory = SessionPlan()
    plan = planned(memory, 0)
    template = seen(memory, 1, settings=PromptSettings(action_prompt_template="{subtask}", revision=2))
    assert not ASYNC.due(memory, template, 0.1)
    generation = seen(memory, 2, settings=PromptSettings(max_generation_tokens=3, revision=3))
    assert ASYNC.usable(memory, generation, 0.1) is plan and ASYNC.due(memory, generation, 0.1)


def test_one_refresh_at_a_time_unless_it_still_waits() -> None:
    memory = SessionPlan()
    planned(memory, 0)
    memory.refresh = first = Refresh()
    assert ASYNC.due(memory, seen(memory, 1), 0.1)
    first.begin()
    assert not ASYNC.due(memory, seen(memory, 2), 100.0)
    memory.refresh = second = Refresh()
    memory.ended(first)
    assert memory.refresh is second
    memory.ended(second)
    assert memory.refresh is None and ASYNC.due(memory, seen(memory, 3), 100.0)


def test_an_overtaken_observation_refreshes_nothing() -> None:
    memory = SessionPlan()
    planned(memory, 0)
    seen(memory, 2)
    assert not ASYNC.due(memory, seen(memory, 1), 100.0)


def test_after_a_failure_the_planner_is_left_alone_for_an_interval() -> None:
    memory = SessionPlan()
    planned(memory, 0)
    memory.refreshed_s = 3.0
    memory.failed(seen(memory, 1, "fold"), "broken")
    again = seen(memory, 2, "fold")
    assert not KEEP.due(memory, again, 3.9) and KEEP.due(memory, again, 4.0)


def test_no_reply_mixes_anything() -> None:
    """What each reply is checked for is in the module; a longer run is ``python -m tests.hosting.cadence_interleavings``."""
    outcome = cadence_interleavings.run(30_000, seed=1)
    assert outcome.violations == [] and outcome.steps == 30_000
    # Else nothing was put to the test.
    for what in ("did not wait", "waited", "kept the old task", "kept the old settings", "with an error", "without a plan", "given up"):
        assert outcome.counts[what] > 20, what
    for end in ("ok", "stale", "superseded", "failed"):
        assert outcome.counts[f"refresh {end}"] > 20, end
