"""The service's configuration: one typed model, and where its values come from.

Precedence: command-line flag, then ``OPENPI_…__…`` environment variable, then JSON file, then default. Every mistake is a
:class:`~pi0.errors.ConfigError` whose message has one line per problem, each naming the field and the fix.
docs/configuration.md describes every field.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from hosting.config_problems import shown, unknown_field, validation_problems
from hosting.config_sources import Layer, merge, read_environment, read_file, read_mapping
from hosting.done_subtasks import DoneSubtasks
from hosting.protocol.profiles import ProfileName, ReplyShape
from hosting.templates import (
    DEFAULT_ACTION_PROMPT_TEMPLATE,
    LONE_SURROGATE,
    Template,
    parse_action_prompt_template,
    parse_generation_prompt_format,
)
from pi0.errors import ConfigError
from pi0.prompt import (
    DEFAULT_DRAFTS,
    DEFAULT_GENERATION_PROMPT_FORMAT,
    DEFAULT_MAX_GENERATION_TOKENS,
    MAX_DRAFTS,
    MAX_GENERATION_TOKENS,
)

Mode = Literal["combined", "action_only", "planner_only"]
Slot = Literal["action", "planner"]
DType = Literal["float32", "bfloat16"]
OnLongPrompt = Literal["error", "truncate"]
ActionSpace = Literal["joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_SECRETS: Final = frozenset({"api_key", "admin.api_key"})
DEFAULT_CONFIG_FILE: Final = Path("config.json")
MIB: Final = 1 << 20

# sun_path of the platform's sockaddr_un, less the final NUL
_LONGEST_SOCKET_PATH: Final = 103 if sys.platform == "darwin" else 107
_COMPILE_MODES: Final[tuple[CompileMode, ...]] = get_args(CompileMode)


def _usable(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; give a value or leave the field out")
    if "\0" in text:  # JSON can spell it; neither a path nor a name can have it
        raise ValueError(f"{shown(text)} has a NUL character; remove it")
    if LONE_SURROGATE.search(text):
        raise ValueError(f"{shown(text)} is not valid Unicode; remove the bytes or escapes that do not belong there")
    return text


def _key(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank; give a value or leave the field out")
    if not re.fullmatch("[!-~]([ -~]*[!-~])?", text):
        # It is not repeated here: the message goes to the log.
        raise ValueError("has something that an HTTP header cannot carry; take printable ASCII characters, no space or line break at either end")
    return text


def _socket_path(text: str) -> str:
    if len(os.fsencode(text)) > _LONGEST_SOCKET_PATH:
        raise ValueError(f"is longer than the {_LONGEST_SOCKET_PATH} bytes that a Unix socket's path may have; choose a shorter one")
    return text


def _file_mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError(f'expected a file mode of three octal digits such as "0600" or "660", got {shown(text)}')
    return text


def _resolution(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise ValueError(f'expected height and width such as "180x320", got {shown(text)}')
    return text


def _done_subtasks(texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        DoneSubtasks(texts)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    for text in texts:
        _usable(text)
    return texts


def _template(parse: Callable[[str], Template]) -> AfterValidator:
    def check(text: str) -> str:
        try:
            parse(text)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return text

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_usable)]
SocketPath = Annotated[Text, AfterValidator(_socket_path)]
# Strict, so that true is not 1 and "8000" is not 8000
Port = Annotated[int, Field(strict=True, ge=0, le=65_535)]
# The admin port takes these three with the same rules
GenerationPromptFormat = Annotated[str, _template(parse_generation_prompt_format)]
ActionPromptTemplate = Annotated[str, _template(parse_action_prompt_template)]
MaxGenerationTokens = Annotated[int, Field(strict=True, ge=1, le=MAX_GENERATION_TOKENS)]
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SchedulerConfig(_Section):
    """Which of the waiting requests a slot serves next, and how many of them together."""

    max_batch: Annotated[int, Field(strict=True, ge=1, le=256)] = 8
    """Most observations in one model call. Every size that a compiled model needs for it is compiled at the start."""
    max_wait_ms: Annotated[float, Field(strict=True, ge=0, le=1000)] = 2.0
    """How long a batch with room is held for clients that were answered just now and that came back at once when they were answered before, in ms.
    A client that is alone never waits; 0: nobody does."""
    max_queue: Annotated[int, Field(strict=True, ge=1, le=4096)] = 64
    """How many requests may wait; more are refused as overloaded."""
    deadline_ms: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    """Deadline of requests that bring none, from their arrival, in ms; None: they have none."""


class PlannerSchedulerConfig(SchedulerConfig):
    """As for the action slot; the planner has compiled programs for at most 8 rows, and each doubling costs as many again at the start."""

    max_batch: Annotated[int, Field(strict=True, ge=1, le=8)] = 2


class ActionConfig(_Section):
    """The action slot: a PyTorch pi0 or pi0.5 policy."""

    model_config_name: Text
    """An openpi training config, such as ``pi05_droid``, or ``module:NAME`` for one of your own; it fixes embodiment, horizon and normalisation."""
    checkpoint_dir: Text
    """Local directory, or ``gs://``, ``s3://``, ``hf://`` address."""
    default_prompt: Text | None = None
    """Prompt of an observation that has none; None leaves it to the named config."""
    tokenizer: Text | None = None
    """SentencePiece model; None: ``paligemma_tokenizer.model`` beside the checkpoint, else the cached download."""
    dtype: DType | None = None
    """None: bfloat16 on a GPU, float32 on the CPU."""
    device: Text | None = None
    """Torch device such as ``cuda:0``; None: the first GPU, else the CPU."""
    num_steps: Annotated[int, Field(strict=True, ge=1, le=1000)] = 10
    """Denoising (Euler) steps per action chunk."""
    on_long_prompt: OnLongPrompt = "error"
    """Whether a prompt with too many tokens is refused, or cut on the right and flagged in the reply."""
    scheduler: SchedulerConfig = SchedulerConfig()


class PlannerConfig(_Section):
    """The planner slot: a JAX pi0.5 subtask generator."""

    checkpoint_dir: Text
    """Orbax checkpoint (its root or its ``params/``): local directory, or ``gs://``, ``s3://``, ``hf://`` address."""
    max_generation_tokens: MaxGenerationTokens = DEFAULT_MAX_GENERATION_TOKENS
    """Longest subtask, in tokens. Editable live."""
    generation_prompt_format: GenerationPromptFormat = DEFAULT_GENERATION_PROMPT_FORMAT
    """The planner's prompt; must have ``{task}``. Editable live."""
    action_prompt_template: ActionPromptTemplate = DEFAULT_ACTION_PROMPT_TEMPLATE
    """The action policy's prompt in combined mode; must have ``{subtask}``, may have ``{task}``. Editable live."""
    tokenizer: Text | None = None
    """As ``action.tokenizer``."""
    dtype: DType | None = None
    """None: bfloat16 on an accelerator, float32 on the CPU."""
    allowed_tokens: Literal["text", "printable_ascii"] = "text"
    """Tokens that a subtask may have: plain text, or the reference's wider rule (reference/model.md §13.4)."""
    missing_cameras: Literal["mask", "grey"] = "mask"
    """A camera that an observation lacks is masked out as in training, or a grey image as in openpi-flash."""
    on_failure: Literal["use_task", "fail"] = "use_task"
    """Combined mode: when planning fails, act on the task itself and say so in the reply, or fail the request."""
    on_long_prompt: OnLongPrompt = "error"
    """As ``action.on_long_prompt``."""
    refresh: Literal["every_request", "async"] = "every_request"
    """Combined mode: plan before every action, or only before a task's first one, and beside the others from then on."""
    interval_s: Seconds = 1.0
    """With ``async``: seconds between two refreshes of a session's subtask."""
    max_age_s: Seconds | None = 10.0
    """With ``async``: a request waits for a new subtask when the current one was planned from an observation older than this; None: never."""
    on_task_change: Literal["wait", "keep"] = "wait"
    """With ``async``: a request with a new task waits for its subtask, or goes on with the old task and its subtask until there is one."""
    timeout_s: Seconds | None = None
    """Combined mode: seconds that an action request waits for the planner until planning counts as failed (``on_failure``); None: for ever."""
    min_confidence: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    """Combined mode: a subtask that the planner is less sure of than this does not take the place of the session's current one; None: it does."""
    decode: Literal["free", "trie", "score"] = "free"
    """Whether a subtask is what the model says, or one of a closed list: greedily within it (``trie``) or its likeliest entry (``score``)."""
    subtasks: tuple[Text, ...] | Text | None = None
    """That list, or a text file with one entry per line; None: each request brings its own in ``subtasks``."""
    cameras: Annotated[int, Field(strict=True, ge=1, le=3)] | None = None
    """The most cameras that an observation has; None: 3. Programs are compiled for each number up to it. Not with ``missing_cameras`` ``grey``."""
    compilation_cache: Text | None = None
    """Directory that keeps compiled programs for the next start; None: ``tandem/compiled`` in the cache of checkpoints."""
    drafts: Annotated[int, Field(strict=True, ge=0, le=MAX_DRAFTS)] = DEFAULT_DRAFTS
    """Guesses of a subtask that are checked while the prompt is read; one that is right saves the steps of its tokens. 0: none."""
    done_subtasks: Annotated[tuple[str, ...], AfterValidator(_done_subtasks)] = ()
    """Subtasks that say that nothing is left to do: they are flagged in the reply, and the action policy is not asked. Case, outer whitespace and one
    final full stop do not count."""
    scheduler: PlannerSchedulerConfig = PlannerSchedulerConfig()


class ActionTransportConfig(_Section):
    """Where the action slot listens. Port 0: any free port; None: not at all."""

    websocket_port: Port = 8000
    quic_port: Port | None = 5555
    """UDP."""
    unix_socket_path: SocketPath | None = "/tmp/openpi-action.sock"


class PlannerTransportConfig(_Section):
    """Where the planner slot listens. Port 0: any free port; None: not at all."""

    websocket_port: Port = 8002
    quic_port: Port | None = 5556
    """UDP."""
    unix_socket_path: SocketPath | None = "/tmp/openpi-planner.sock"


class WebSocketConfig(_Section):
    """How WebSocket connections are kept."""

    ping_interval_s: Seconds | None = 20.0
    """Seconds between the server's pings; None: it sends none."""
    ping_timeout_s: Seconds | None = 20.0
    """Seconds until a connection whose client answers no ping is closed; None: it never is."""
    idle_timeout_s: Seconds | None = None
    """Seconds without a request until a connection is closed; None: it never is."""
    congestion_control: Text | None = "bbr"
    """TCP congestion control of the server's side, where the kernel allows it; None: the kernel's own choice."""
    profile: ProfileName = "openpi"
    """Dialect of addresses that do not choose one with ``?profile=``."""
    reply: ReplyShape | None = None
    """Shape of their replies: a ``map``, the bare ``array`` of actions, or only the ``arrays``; None: the profile's."""


class TLSConfig(_Section):
    """PEM files; with them WebSockets are ``wss://``, and QUIC uses them instead of a certificate of its own."""

    certificate: Text
    """The certificate, any intermediate ones after it."""
    private_key: Text


class RoboArenaConfig(_Section):
    """What RoboArena's clients are told of the robot (``?profile=roboarena``); None: as the policy's cameras say."""

    image_resolution: Annotated[str, AfterValidator(_resolution)] | None = None
    """Height and width, as ``180x320``."""
    needs_wrist_camera: Flag | None = None
    n_external_cameras: Annotated[int, Field(strict=True, ge=0, le=2)] | None = None
    needs_stereo_camera: Flag | None = None
    needs_session_id: Flag | None = None
    action_space: ActionSpace | None = None
    """What the actions are. No checkpoint says it, so there is no default: without it the profile is refused."""

    def handshake(self) -> dict[str, Any]:
        """What is set, in the words of the handshake (reference/peers.md §1.10)."""
        known = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        if self.image_resolution is not None:
            known["image_resolution"] = [int(size) for size in self.image_resolution.split("x")]
        return known


class SessionsConfig(_Section):
    """What is remembered of robots between their requests."""

    ttl_s: Seconds = 600.0
    """Seconds without a request until a session with an id is forgotten."""
    max_sessions: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 1024
    """How many there may be; beyond it the one that was not used for the longest time is forgotten."""


class WatchdogConfig(_Section):
    """What happens when a model call does not return."""

    stuck_after_s: Seconds | None = 120.0
    """Seconds until the service is no longer ready; None: it stays so."""
    fatal_after_s: Seconds | None = 600.0
    """Seconds until the process ends with 1, so that its supervisor starts it anew; None: it waits for ever."""


class AdminConfig(_Section):
    """Where the admin API listens."""

    host: Text = "127.0.0.1"
    """Beyond the loopback only with ``api_key``."""
    port: Port | None = 8001
    """None: nowhere."""
    api_key: Annotated[str, AfterValidator(_key)] | None = Field(default=None, repr=False)
    """What its clients must send, but for health and readiness; None: they need not."""
    settings_file: Text | None = None
    """JSON file that keeps live changes of the prompt settings over a restart; None: they are forgotten."""
    page: Flag = False
    """Whether ``/`` is a page that shows what robots see and do, which is then kept in memory, and takes instructions for them."""


class ServiceConfig(BaseSettings):
    """Everything the service is told. Built in Python it holds what its arguments say; :func:`load_config` reads file and environment.

    Raises:
        pydantic.ValidationError: a value is wrong. :func:`load_config` turns it into a readable ConfigError.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    action: ActionConfig | None = None
    planner: PlannerConfig | None = None
    action_transport: ActionTransportConfig = ActionTransportConfig()
    planner_transport: PlannerTransportConfig = PlannerTransportConfig()
    host: Text = "127.0.0.1"
    """Address that both slots' WebSocket and QUIC endpoints bind."""
    api_key: Annotated[str, AfterValidator(_key)] | None = Field(default=None, repr=False)
    """What clients over WebSocket and QUIC must send; None: they need not. The Unix sockets are guarded by their file mode."""
    tls: TLSConfig | None = None
    quic_certificate_dir: Text | None = None
    """Where the certificate that QUIC makes for itself is kept; None: ``tls`` in ``$OPENPI_DATA_HOME``."""
    unix_socket_mode: Annotated[str, AfterValidator(_file_mode)] = "0600"
    """Octal file mode of the Unix sockets: who may connect."""
    websocket: WebSocketConfig = WebSocketConfig()
    roboarena: RoboArenaConfig = RoboArenaConfig()
    admin: AdminConfig = AdminConfig()
    sessions: SessionsConfig = SessionsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    max_message_bytes: Annotated[int, Field(strict=True, ge=MIB, le=(1 << 32) - 1)] = 128 * MIB
    """Longest message that a client may send, in bytes; at most what the transports' 32-bit length can say."""
    drain_s: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 30.0
    """Seconds that requests in flight get at shutdown."""
    log_format: Literal["plain", "json"] = "plain"
    log_requests: Flag = True
    """Whether each request leaves a line in the log."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_config() merges the sources itself: pydantic's own keep no origins and pass over misspelt variables in silence.
        return (init_settings,)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that are set."""
        return (*(("action",) if self.action else ()), *(("planner",) if self.planner else ()))

    @property
    def mode(self) -> Mode:
        """What the slots that are set make of the service."""
        if self.action and self.planner:
            return "combined"
        return "action_only" if self.action else "planner_only"

    @model_validator(mode="after")
    def _check_slots(self) -> ServiceConfig:
        if not self.slots:
            raise ValueError('no slot is configured; set "action", "planner" or both (see config.example.json)')
        problems = self._clashes()
        if self.websocket.profile == "roboarena" and self.roboarena.action_space is None:
            problems.append(
                'roboarena.action_space: missing, and with websocket.profile "roboarena" no client could be served; '
                f"set it to one of {', '.join(get_args(ActionSpace))}"
            )
        if self.admin.port is not None and self.admin.api_key is None and not is_loopback(self.admin.host):
            problems.append(
                f"admin.api_key: missing, and admin.host {self.admin.host} can be reached from other machines, where anybody could edit prompts; "
                "set a key, or leave admin.host at 127.0.0.1"
            )
        if self.admin.page and self.admin.port is None:
            problems.append("admin.page: true, but admin.port is null, so there is no port for it; set one, or leave the page out")
        stuck_s, fatal_s = self.watchdog.stuck_after_s, self.watchdog.fatal_after_s
        if fatal_s is not None and (stuck_s is None or fatal_s < stuck_s):
            least = "null" if stuck_s is None else f"{stuck_s:g}"
            problems.append(f"watchdog.fatal_after_s: got {fatal_s:g}, expected null or at least watchdog.stuck_after_s, which is {least}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _clashes(self) -> list[str]:
        transports = [(slot, self.action_transport if slot == "action" else self.planner_transport) for slot in self.slots]
        tcp: list[tuple[str, object]] = [(f"{slot}_transport.websocket_port", transport.websocket_port) for slot, transport in transports]
        tcp.append(("admin.port", self.admin.port))
        udp: list[tuple[str, object]] = [(f"{slot}_transport.quic_port", transport.quic_port) for slot, transport in transports]
        paths: list[tuple[str, object]] = [
            (f"{slot}_transport.unix_socket_path", transport.unix_socket_path and os.path.normpath(transport.unix_socket_path))
            for slot, transport in transports
        ]
        problems: list[str] = []
        for endpoints, kind in ((tcp, "port"), (udp, "port"), (paths, "path")):
            owners: dict[object, str] = {}
            for field, value in endpoints:
                if value not in (0, None) and value in owners:
                    problems.append(f"{field}: {value} is also {owners[value]}; give one of them another {kind}")
                owners.setdefault(value, field)
        return problems


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where it came from.

    Attributes:
        config: the effective values.
        origins: for every field, dotted (``planner.dtype``; a slot that is not set counts as one field): ``flag``,
            ``environment OPENPI_…``, ``file …`` or ``default``.
        path: the file that was read, if any.
    """

    config: ServiceConfig
    origins: Mapping[str, str]
    path: Path | None


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """The configuration from all its sources.

    Args:
        path: the JSON file; None: ``INFERENCE_CONFIG_PATH``, else ``config.json`` in the working directory if there is one.
        overrides: nested values from the command line (``{"action": {"dtype": "float32"}}``); they win over everything.
        environ: the environment.

    Raises:
        ConfigError: anything is wrong; one line per problem.
    """
    layers: list[Layer] = []
    file = _config_file(path, environ)
    if file is not None:
        layers.append(read_file(*file))
    layers.append(read_environment(ServiceConfig, environ))
    layers.append(read_mapping(overrides or {}, "flag"))
    merged = merge(layers)
    values = merged.nested()
    if file is None and not merged.problems and not (values.get("action") or values.get("planner")):
        raise ConfigError(
            f"no configuration: there is no {DEFAULT_CONFIG_FILE} in the working directory, INFERENCE_CONFIG_PATH is not set and no OPENPI_ variable "
            "sets a slot; copy config.example.json to config.json, or give a file with --config"
        )
    problems = list(merged.problems)
    for name in [name for name in values if name.startswith("_")]:
        # BaseSettings would take it for an option of its own instead of refusing it.
        problems.append(unknown_field((name,), ServiceConfig, merged.origin((name,))))
        del values[name]
    try:
        config = ServiceConfig.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(error.errors(include_url=False), ServiceConfig, merged.origin)
    try:
        pytorch_compile_mode(environ)  # read when the action slot loads; a mistake in it should not cost the time until then
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        # A variable's name may hold any bytes, and the message must print all the same.
        raise ConfigError("\n".join(problems).encode("utf-8", "backslashreplace").decode())
    origins = {field: merged.origin(tuple(field.split("."))) or "default" for field, _ in _leaves(config)}
    return LoadedConfig(config, origins, file[0] if file else None)


def describe(loaded: LoadedConfig) -> list[tuple[str, object, str]]:
    """(dotted field, effective value, origin) of every field, in the order of the model; secrets are not shown."""
    return [(field, "***" if field in _SECRETS and value else value, loaded.origins[field]) for field, value in _leaves(loaded.config)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def pytorch_compile_mode(environ: Mapping[str, str] = os.environ) -> CompileMode | Literal["unset"] | None:
    """``OPENPI_PYTORCH_COMPILE_MODE``: a mode of ``torch.compile``; None for ``eager`` or ``none``; ``"unset"`` (also when it is empty)
    leaves it to the caller.

    Raises:
        ConfigError: it is anything else.
    """
    text = environ.get("OPENPI_PYTORCH_COMPILE_MODE")
    if not text:
        return "unset"
    if text in ("eager", "none"):
        return None
    for mode in _COMPILE_MODES:
        if text == mode:
            return mode
    raise ConfigError(f"OPENPI_PYTORCH_COMPILE_MODE: expected one of {', '.join(_COMPILE_MODES)}, eager, none; got {text!r}")


def _config_file(path: Path | None, environ: Mapping[str, str]) -> tuple[Path, str] | None:
    if path is not None:
        return path, "given by --config"
    if named := environ.get("INFERENCE_CONFIG_PATH"):
        return Path(named), "given by INFERENCE_CONFIG_PATH"
    return (DEFAULT_CONFIG_FILE, "in the working directory") if DEFAULT_CONFIG_FILE.exists() else None


def _leaves(model: BaseModel, section: str = "") -> list[tuple[str, object]]:
    leaves: list[tuple[str, object]] = []
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            leaves += _leaves(value, f"{section}{name}.")
        else:
            leaves.append((section + name, value))
    return leaves
