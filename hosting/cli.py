"""The ``tandem`` command (``python main.py`` in a source tree). Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hosting import __version__
from hosting.policy import ConfigError, TandemError

app = typer.Typer(
    help="A planner and an action policy for a robot from one process, on openpi's wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
test_app = typer.Typer(help="Measure a running server.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(test_app, name="test")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="JSON file. Default: $INFERENCE_CONFIG_PATH, else config.json.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override one field, e.g. --set action.dtype=float32. Repeatable.", show_default=False),
]


# What the base install lacks; its absence is a matter of installation, not a bug.
_SERVING_PACKAGES = {
    "cryptography",
    "fastapi",
    "filelock",
    "fsspec",
    "huggingface_hub",
    "ml_dtypes",
    "sentencepiece",
    "starlette",
    "tensorstore",
    "uvicorn",
}
_SLOT_PACKAGES = {"flax", "gymnasium", "jax", "optax", "safetensors", "torch"}


def main() -> None:
    """Run the command line; a Tandem error is printed without a traceback. Exit code 2: the configuration is wrong; 1: anything else."""
    try:
        app()
    except (TandemError, ModuleNotFoundError) as error:
        sys.exit(_report(error))


def _report(error: TandemError | ModuleNotFoundError) -> int:
    """Print what went wrong and return the exit code; a missing package that is none of ours to name is raised again."""
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] not in _SERVING_PACKAGES | _SLOT_PACKAGES:
            raise error
        error = ConfigError(f"this command needs packages that are not installed ({error.name}); pip install 'tandem-vla[all]'")
    for line in str(error).splitlines():
        typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
    return 2 if isinstance(error, ConfigError) else 1


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"tandem {__version__}")
        raise typer.Exit


@app.command()
def serve(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Load the configured slots and serve them until Ctrl-C (again to force)."""
    from hosting import logs
    from hosting.config import load_config

    loaded = load_config(config, _overrides(set_))
    logs.configure(loaded.config.log_format, requests=loaded.config.log_requests)
    _import_from_working_directory()
    service_module = _require_serving()
    try:
        sys.exit(asyncio.run(_serve(service_module, loaded.config)))
    except (TandemError, ModuleNotFoundError) as error:
        # The other slot may still be loading; its thread cannot be interrupted, and the interpreter would wait for it.
        code = _report(error)
        logging.shutdown()
        os._exit(code)


CheckpointsOption = Annotated[
    Path | None, typer.Option(help="Directory with planner/ and action/, as train-demo writes it. Default: the shipped pair.", show_default=False)
]


FIRST_TABLE = 2
"""The first that the shipped pair masters whose instruction has two parts; ``eval-demo`` says how often it fails."""


@app.command()
def demo(
    checkpoints: CheckpointsOption = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Stop after so many. Default: go on until Ctrl-C.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first table; the next ones follow.")] = FIRST_TABLE,
    headless: Annotated[bool, typer.Option("--headless", help="Print plain lines, as when the output is no terminal.")] = False,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Use any free ports instead of the usual ones.")] = False,
    refresh: Annotated[Literal["every_request", "async"], typer.Option(help="As planner.refresh.")] = "every_request",
) -> None:
    """Watch a robot at a simulated table follow long instructions: planner, policy, page. No robot, GPU or download needed."""
    _require_serving()
    from demo.run import run_demo
    from demo.serving import CHECKPOINTS, demo_config

    config = demo_config(checkpoints or CHECKPOINTS, free_ports=free_ports, page=True, refresh=refresh)
    sys.exit(run_demo(config, episodes=episodes, headless=headless, first_seed=seed))


@app.command()
def eval_demo(
    episodes: Annotated[int, typer.Option(min=1, help="How many each mode plays, all the same ones.")] = 200,
    modes: Annotated[str, typer.Option(help="Comma-separated; see docs/demo.md. Default: all.", show_default=False)] = "",
    checkpoints: CheckpointsOption = None,
    flat: Annotated[Path | None, typer.Option(help="The flat baseline's checkpoint; train-demo writes it.", show_default=False)] = None,
    robots: Annotated[int, typer.Option(min=1, max=64, help="How many play side by side.")] = 4,
    planner_states: Annotated[int, typer.Option(min=0, help="Random states that the planner is asked about besides.")] = 2000,
    json_: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there, too.", show_default=False)] = None,
) -> None:
    """Measure the demo through the server's sockets: success with 95 % intervals by instruction family, for each way to drive the robot."""
    from hosting import logs

    logs.configure("plain", requests=False)
    _require_serving()
    from demo.evaluation import MODES, as_table, evaluate, show_progress
    from demo.serving import CHECKPOINTS

    chosen = [mode.strip() for mode in modes.split(",") if mode.strip()] or list(MODES)
    if unknown := [mode for mode in chosen if mode not in MODES]:
        raise ConfigError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    if "flat" in chosen and flat is None and modes:
        raise ConfigError("--modes: flat needs --flat, the checkpoint that train-demo writes; it is not shipped")
    if json_ is not None and not json_.parent.is_dir():
        raise ConfigError(f"--json: there is no directory {json_.parent}")
    with show_progress() as progress:
        report = evaluate(
            episodes,
            chosen,
            checkpoints=checkpoints or CHECKPOINTS,
            flat=flat,
            robots=robots,
            planner_states=planner_states,
            progress=progress,
        )
    if json_ is not None:
        json_.write_text(json.dumps(report, indent=2) + "\n")
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no width that a table would have to be cut to
    console.print(as_table(report))


@app.command()
def train_demo(
    output: Annotated[Path, typer.Option(help="Where planner/, action/ and flat/ are written; must not exist.")] = Path("demo-checkpoints"),
    seed: Annotated[int, typer.Option(min=0, help="Of first values and draws.")] = 7,
    effort: Annotated[float, typer.Option(min=1e-4, help="Share of the full number of steps.")] = 1.0,
) -> None:
    """Train the demo's planner, its policy and the flat baseline from nothing (about 75 minutes on two CPU cores)."""
    from hosting import logs

    logs.configure("plain")
    _require_serving()
    from rich.console import Console

    from demo.training.run import train_demo as train

    record = train(output, seed=seed, effort=effort, console=Console(stderr=True))
    typer.echo(json.dumps(record, indent=2))


@config_app.command("show")
def config_show(config: ConfigOption = None, set_: SetOption = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print the effective values and where each came from."""
    from hosting.config import describe, load_config

    loaded = load_config(config, _overrides(set_))
    if as_json:
        rows = {field: {"value": value, "origin": origin} for field, value, origin in describe(loaded)}
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table

    # Values are never cut: people copy them.
    table = Table(
        Column("field", no_wrap=True),
        Column("value", overflow="fold"),
        Column("from", overflow="fold"),
        title=f"mode: {loaded.config.mode}",
        title_justify="left",
    )
    for field, value, origin in describe(loaded):
        table.add_row(field, json.dumps(value, ensure_ascii=False), origin, style="dim" if origin == "default" else None)
    Console().print(table)


@app.command()
def prepare_planner_checkpoint(
    hf_repo: Annotated[str, typer.Option(help="Hugging Face repository.")] = "Hebbian-Robotics/pi05_subtask",
    tar_path_in_repo: Annotated[str, typer.Option(help="The tar file in it.")] = "jax/pi05_subtask.tar",
    output_dir: Annotated[Path | None, typer.Option(help="Target. Default: $OPENPI_DATA_HOME/pi05_subtask.", show_default=False)] = None,
    force_download: Annotated[bool, typer.Option("--force-download", help="Fetch again although it is complete.")] = False,
) -> None:
    """Download, unpack and verify a planner checkpoint. Safe to interrupt and to repeat."""
    from hosting import logs
    from pi0.locations import default_data_home

    logs.configure("plain")
    _require_serving()
    from pi0.prepare import prepare_planner_checkpoint as prepare
    from pi0.progress import show_progress

    with show_progress() as progress:
        result = prepare(
            hf_repo=hf_repo,
            tar_path_in_repo=tar_path_in_repo,
            output_dir=output_dir or default_data_home() / "pi05_subtask",
            force_download=force_download,
            progress=progress,
        )
    typer.echo(f"planner checkpoint ready: {result.directory}")


@app.command()
def prepare_checkpoint(
    model_id: Annotated[str, typer.Option(help="Hugging Face model with LeRobot weights.")] = "lerobot/pi05_base",
    openpi_assets_uri: Annotated[str, typer.Option(help="Directory of norm stats.")] = "gs://openpi-assets/checkpoints/pi05_base/assets",
    output_dir: Annotated[Path | None, typer.Option(help="Target. Default: $OPENPI_DATA_HOME/pi05_base_openpi.", show_default=False)] = None,
    required_asset_id: Annotated[str, typer.Option(help="Asset that must be among them.")] = "trossen",
    force_download: Annotated[bool, typer.Option("--force-download", help="Fetch again although it is complete.")] = False,
) -> None:
    """Put LeRobot weights and openpi norm stats into one checkpoint directory. Safe to interrupt and to repeat."""
    from hosting import logs
    from pi0.locations import default_data_home

    logs.configure("plain")
    _require_serving()
    from pi0.prepare import prepare_checkpoint as prepare
    from pi0.progress import show_progress

    with show_progress() as progress:
        result = prepare(
            model_id=model_id,
            openpi_assets_uri=openpi_assets_uri,
            output_dir=output_dir or default_data_home() / "pi05_base_openpi",
            required_asset_id=required_asset_id,
            force_download=force_download,
            progress=progress,
        )
    typer.echo(f"checkpoint ready: {result.directory}")


ModeOption = Annotated[Literal["default", "subtask_only", "action_only"] | None, typer.Option(help="Request mode to send.", show_default=False)]
EmbodimentOption = Annotated[
    Literal["aloha", "droid", "libero", "table"] | None,
    typer.Option(help="Observation to send. Default: as the server's metadata ask.", show_default=False),
]
PromptOption = Annotated[str, typer.Option(help="Task to send.")]
IterationsOption = Annotated[int, typer.Option(min=1, help="Timed calls, after one that is not timed.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyOption = Annotated[str | None, typer.Option(envvar="OPENPI_API_KEY", help="The server's API key.", show_default=False)]
PinOption = Annotated[str | None, typer.Option(help="SHA-256 that the server's certificate must have, as its log shows it.", show_default=False)]
CAOption = Annotated[str | None, typer.Option("--cafile", help="PEM of the authorities to trust instead of the system's.", show_default=False)]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")]
JPEGOption = Annotated[bool, typer.Option("--jpeg", help="Send the cameras as JPEG (lossy).")]
ConnectionsOption = Annotated[int, typer.Option(min=1, max=64, help="Spread a large request over so many connections (QUIC).")]


@test_app.command("ws")
def measure_websocket(
    target: Annotated[str, typer.Argument(help="ws://host:port or wss://… of a slot.")],
    mode: ModeOption = None,
    embodiment: EmbodimentOption = None,
    prompt: PromptOption = "pick up the red cup",
    iterations: IterationsOption = 5,
    api_key: KeyOption = None,
    pin: PinOption = None,
    cafile: CAOption = None,
    insecure: InsecureOption = False,
    jpeg: JPEGOption = False,
    as_json: JSONOption = False,
) -> None:
    """Time requests over WebSocket: mean, min and max of the whole call and of each of its parts."""
    options = _client_options(api_key, pin, cafile, insecure, jpeg)
    _measure(target if "://" in target else f"ws://{target}", mode, embodiment, prompt, iterations, as_json, options)


@test_app.command("quic")
def measure_quic(
    target: Annotated[str, typer.Argument(help="quic://host:port of a slot; host alone is the action slot's 5555.")],
    mode: ModeOption = None,
    embodiment: EmbodimentOption = None,
    prompt: PromptOption = "pick up the red cup",
    iterations: IterationsOption = 5,
    api_key: KeyOption = None,
    pin: PinOption = None,
    cafile: CAOption = None,
    insecure: InsecureOption = False,
    jpeg: JPEGOption = False,
    connections: ConnectionsOption = 1,
    as_json: JSONOption = False,
) -> None:
    """Time requests over QUIC: mean, min and max of the whole call and of each of its parts."""
    options = _client_options(api_key, pin, cafile, insecure, jpeg, connections)
    _measure(target if "://" in target else f"quic://{target}", mode, embodiment, prompt, iterations, as_json, options)


@test_app.command("unix")
def measure_unix(
    target: Annotated[str, typer.Argument(help="Path of a slot's socket, or unix:///path.")] = "/tmp/openpi-action.sock",
    mode: ModeOption = None,
    embodiment: EmbodimentOption = None,
    prompt: PromptOption = "pick up the red cup",
    iterations: IterationsOption = 5,
    jpeg: JPEGOption = False,
    as_json: JSONOption = False,
) -> None:
    """Time requests over a Unix socket: mean, min and max of the whole call and of each of its parts."""
    url = target if "://" in target else f"unix://{Path(target).absolute()}"
    _measure(url, mode, embodiment, prompt, iterations, as_json, _client_options(jpeg=jpeg))


@app.command()
def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="ws://, wss://, quic:// or unix:// addresses; the first is the yardstick.")
    ],
    clients: Annotated[int, typer.Option(min=1, max=64, help="How many ask at once.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each target is asked.")] = 5.0,
    mode: ModeOption = None,
    embodiment: EmbodimentOption = None,
    prompt: PromptOption = "pick up the red cup",
    api_key: KeyOption = None,
    pin: PinOption = None,
    cafile: CAOption = None,
    insecure: InsecureOption = False,
    jpeg: JPEGOption = False,
    connections: ConnectionsOption = 1,
    as_json: JSONOption = False,
) -> None:
    """Compare servers or transports under load in one interleaved run: p50, p95, p99, requests per second, client CPU per request."""
    from hosting.clients.bench import Load, render
    from hosting.clients.bench import bench as run

    load = Load(clients, seconds, mode=mode, embodiment=embodiment, prompt=prompt)
    results = run(targets, load, _client_options(api_key, pin, cafile, insecure, jpeg, connections))
    typer.echo(json.dumps(results, indent=2) if as_json else render(results, load))


def _measure(url: str, mode: Any, embodiment: Any, prompt: str, iterations: int, as_json: bool, options: Any) -> None:
    from hosting.clients.measure import measure, render

    report = measure(url, mode=mode, embodiment=embodiment, prompt=prompt, iterations=iterations, **options)
    # Other servers' metadata may hold arrays.
    typer.echo(json.dumps(report, indent=2, default=str) if as_json else render(report))


def _client_options(
    api_key: str | None = None, pin: str | None = None, cafile: str | None = None, insecure: bool = False, jpeg: bool = False, connections: int = 1
) -> Any:
    """The options of a client, those that the command line left alone left out."""
    options = {"api_key": api_key, "pin": pin, "cafile": cafile, "verify": False if insecure else None, "encode": "jpeg" if jpeg else None}
    return {"connections": connections, **{name: value for name, value in options.items() if value is not None}}


def _overrides(assignments: list[str] | None) -> dict[str, Any]:
    """``["a.b=1"]`` → ``{"a": {"b": 1}}``; values are read as environment variables are, so a string field keeps ``1`` as text.

    Raises:
        ConfigError: an assignment without a field or ``=``, a value that cannot be read, or fields that contradict each other.
    """
    from hosting.config import ServiceConfig
    from hosting.config_problems import field_at
    from hosting.config_sources import parse_value

    overrides: dict[str, Any] = {}
    for assignment in assignments or []:
        field, equals, text = assignment.partition("=")
        if not equals or not all(field.split(".")):
            raise ConfigError(f"--set {assignment}: expected FIELD=VALUE, e.g. action.dtype=float32")
        target = field_at(ServiceConfig, tuple(field.split(".")))
        try:
            # An unknown field is reported with all other problems of the configuration.
            value = text if target is None else parse_value(text, target)
        except ValueError as error:
            raise ConfigError(f"--set {field}: {error}") from None
        *sections, name = field.split(".")
        at = overrides
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise ConfigError(f"--set {assignment}: {section} was already set to {json.dumps(at)}; leave one of the two out")
        if isinstance(value, dict) and isinstance(at.get(name), dict):
            at[name] |= value
        else:
            at[name] = value
    return overrides


async def _serve(service_module: Any, config: Any) -> int:
    code: int = await service_module.Service(config).serve()
    return code


def _import_from_working_directory() -> None:
    """Let ``action.model_config_name`` name a module in the working directory, however the command was started: ``tandem`` has its own directory
    at the front of the path instead, and ``python …/main.py`` that of ``main.py``. At the end, so that no file there hides an installed package."""
    with contextlib.suppress(OSError):  # the directory may be gone
        if (directory := os.getcwd()) not in sys.path:
            sys.path.append(directory)


def _require_serving() -> Any:
    """:mod:`hosting.service`, before a command that cannot do without the packages it needs has done anything."""
    import hosting.service

    return hosting.service
