"""``tandem demo``: the ordinary service on the demo's checkpoints, and a robot at the simulated table that talks to it over WebSocket."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.episodes import Call, Episode, real_time
from demo.serving import serving
from hosting import logs
from hosting.clients.client import Client
from hosting.clients.errors import ClientError
from hosting.config import ServiceConfig
from hosting.service import Service

RATE_HZ = 10.0
_SHOWN = 8
_LINGER = 20
"""Ticks for which a robot that is done waits to be told something else, where somebody watches."""


@dataclass
class Display:
    """Shows the robot's episodes: live on a terminal, else a line for every change.

    Attributes:
        recent: the last episodes that are over, without what came back in them.
    """

    console: Console
    live: Live | None
    addresses: Mapping[str, str]
    recent: deque[Episode] = field(default_factory=lambda: deque(maxlen=_SHOWN))
    _played: int = 0
    _succeeded: int = 0
    _shown: tuple[int, str, str] | None = None

    def tick(self, episode: Episode, info: Mapping[str, Any]) -> None:
        """One tick of the episode that is being played."""
        if self.live is not None:
            self.live.update(self._screen(episode, info))
        else:
            self._tell(episode)

    def begins(self, instruction: str) -> None:
        """An episode begins."""
        if self.live is None:
            self._print(f"{instruction!r}")

    def ends(self, episode: Episode) -> None:
        """An episode is over."""
        self._played += 1
        self._succeeded += episode.success
        if self.live is None:
            self._tell(episode)
            self._print(f"  {outcome(episode)}; {self.score}")
        self.recent.append(dataclasses.replace(episode, calls=[]))

    @property
    def score(self) -> str:
        """Successes so far."""
        return f"{self._succeeded} of {self._played} episodes succeeded"

    def _tell(self, episode: Episode) -> None:
        """A line where the subtask is another one than before."""
        if not episode.calls:
            return
        subtask = episode.calls[-1].reply["subtask"]
        now = (episode.seed, episode.instruction, said(subtask))
        if now != self._shown:
            self._shown = now
            self._print(f"  step {episode.steps:3}  {said(subtask)!r}  ({timings(episode.calls[-1])})")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _screen(self, episode: Episode, info: Mapping[str, Any]) -> RenderableType:
        now = Table.grid(padding=(0, 2))
        now.add_row("[dim]asked", Text(episode.instruction, style="bold"))
        if episode.calls:
            call = episode.calls[-1]
            subtask = call.reply["subtask"]
            now.add_row("[dim]subtask", Text(said(subtask), style="bold green" if subtask.get("done") else "bold cyan"))
            now.add_row("[dim]", f"{subtask['age_ms'] / 1e3:.2f} s old when it was used, revision {subtask['revision']}")
            now.add_row("[dim]chunk", _chunk(call.reply))
            now.add_row("[dim]took", timings(call))
        now.add_row("[dim]goals", f"{info['goals_done']} of {len(info['goals'])} hold after {episode.steps} steps")
        recent = Table("seed", "instruction", "outcome", "steps", expand=True, box=None, header_style="dim")
        for past in self.recent:
            recent.add_row(str(past.seed), Text(past.instruction), outcome(past, markup=True), str(past.steps))
        footer = f"[dim]{self.score}.  Page: [/dim]{self.addresses.get('admin', '')}[dim]   Ctrl-C ends.[/dim]"
        return Group(Panel(now, title=f"seed {episode.seed}", title_align="left"), recent, footer)


def said(subtask: Mapping[str, Any]) -> str:
    """What the planner said, or why it said nothing."""
    return str(subtask["text"] or f"none: {subtask.get('error', 'the planner said nothing')}")


def timings(call: Call) -> str:
    """The parts of one request."""
    reply = call.reply
    policy = f"policy {reply['policy_timing']['infer_ms']:.0f} ms, " if "policy_timing" in reply else ""
    return f"planner {reply['subtask']['ms']:.0f} ms, {policy}server {reply['server_timing']['infer_ms']:.0f} ms, round trip {call.ms:.0f} ms"


def outcome(episode: Episode, *, markup: bool = False) -> str:
    """How an episode ended, in a word or two."""
    text, style = {
        (True, True): ("done", "green"),
        (True, False): ("done, but nobody said so", "yellow"),
        (False, True): ("said to be done, but is not", "red"),
        (False, False): ("not done", "red"),
    }[episode.success, episode.done]
    return f"[{style}]{text}[/]" if markup else text


def _chunk(reply: Mapping[str, Any]) -> str:
    if "actions" not in reply:
        return "none: nothing is left to do"
    actions = reply["actions"]
    x, y, grip = actions[-1]
    return f"{' × '.join(map(str, actions.shape))}, ends at x {(x + 1) / 2:.2f}, y {(y + 1) / 2:.2f}, gripper {'closed' if grip > 0 else 'open'}"


def run_demo(config: ServiceConfig, *, episodes: int | None, headless: bool, first_seed: int = 0) -> int:
    """Serve, and let the robot play ``episodes`` episodes, or until Ctrl-C. Returns the exit code.

    Args:
        config: of the server.
        headless: plain lines even on a terminal.
        first_seed: of the first table; the next ones follow.
    """
    console = Console()
    logs.configure("plain", requests=False)  # the display says as much of each request
    return asyncio.run(_run(config, console, episodes=episodes, headless=headless or not console.is_terminal, first_seed=first_seed))


async def _run(config: ServiceConfig, console: Console, *, episodes: int | None, headless: bool, first_seed: int) -> int:
    service = Service(config)
    async with serving(service) as running:
        if running.done():
            return running.result()
        with _display(console, headless, service.addresses) as display:
            linger = 0 if headless else _LINGER
            playing = asyncio.create_task(asyncio.to_thread(_play, service, display, episodes, first_seed, linger))
            await asyncio.wait([running, playing], return_when=asyncio.FIRST_COMPLETED)
            # After Ctrl-C, the robot notices at its next tick.
            await playing
    return running.result()


def _play(service: Service, display: Display, episodes: int | None, first_seed: int, linger: int) -> None:
    """The robot, on its own thread."""
    seeds = itertools.count(first_seed) if episodes is None else range(first_seed, first_seed + episodes)
    try:
        with closing(Client(service.addresses["action"], session_id="table", retry_lost=False)) as client:
            for seed in seeds:
                client.reset()
                episode = real_time(
                    client, seed, rate_hz=RATE_HZ, linger=linger, begins=display.begins, watch=display.tick, stop=lambda: service.stopping
                )
                if service.stopping:
                    return
                display.ends(episode)
    except ClientError:
        if not service.stopping:
            raise


@contextmanager
def _display(console: Console, headless: bool, addresses: Mapping[str, str]) -> Iterator[Display]:
    if headless:
        yield Display(console, None, addresses)
        return
    with Live(console=console, refresh_per_second=10) as live:
        console.show_cursor(True)  # a second Ctrl-C ends the process before anybody could show it again
        yield Display(console, live, addresses)
