"""The exception tree of Tandem. ``hosting.policy`` re-exports it for servers and clients.

It lives here because ``pi0`` is the one package every other may import.

::

    TandemError
    ├── ConfigError             the service configuration is wrong; the CLI prints it and exits with 2
    ├── CheckpointError         weights, tokenizer or norm stats are missing, incomplete or of the wrong shape
    │   └── DownloadError       a remote file could not be fetched or does not verify
    ├── RequestError            the client's fault; the message is one line and safe to send back verbatim
    │   ├── MessageError        the bytes are not a request: not msgpack, not a map, too large, forbidden dtype
    │   ├── ObservationError    a key is missing or unknown, or its shape, dtype or value is wrong
    │   │   └── PromptTooLongError   the prompt has more tokens than the model takes
    │   ├── ModeError           ``mode`` is not one of the request modes
    │   └── UnauthorizedError   the API key is missing or wrong
    ├── PolicyError             a loaded model failed on a request that looked fine
    │   └── PlannerError        the planner did
    └── UnavailableError        nothing is wrong with the request, but it cannot be served now
        ├── OverloadedError     the slot's queue is full
        ├── DeadlineError       its deadline passed before its turn came
        ├── SupersededError     a newer observation of the same session took its place
        ├── DrainingError       the server is shutting down
        └── DoneError           the planner says that nothing is left to do, and the client takes nothing but actions

``hosting`` adds three that only its admin API meets: StaleSettingsError, UnknownRevisionError and SettingsFileError, all TandemErrors.

Messages name the key, what came and what was expected, and, where it is not obvious, what to do.
"""


class TandemError(Exception):
    """Root of every error that Tandem raises on purpose."""


class ConfigError(TandemError):
    """The service configuration is wrong. The message names the field and the fix."""


class CheckpointError(TandemError):
    """A checkpoint, tokenizer or norm-stats file cannot be used."""


class DownloadError(CheckpointError):
    """A remote file could not be fetched, or what came does not verify."""


class RequestError(TandemError):
    """The request cannot be served as sent. The message goes to the client as it is."""


class MessageError(RequestError):
    """The bytes on the wire are not a request."""


class ObservationError(RequestError):
    """An observation key is missing, unknown, or has the wrong shape, dtype or value."""


class PromptTooLongError(ObservationError):
    """The prompt needs more tokens than the model takes (``on_long_prompt="error"``)."""


class ModeError(RequestError):
    """The request's ``mode`` is not one of ``default``, ``subtask_only``, ``action_only``."""


class UnauthorizedError(RequestError):
    """The request's API key is missing or wrong."""


class PolicyError(TandemError):
    """A loaded model failed on a request that passed validation."""


class PlannerError(PolicyError):
    """The planner failed on a request that passed validation."""


class UnavailableError(TandemError):
    """The request is fine but cannot be served now; the message says why."""


class OverloadedError(UnavailableError):
    """The slot's queue is full."""


class DeadlineError(UnavailableError):
    """The request's deadline passed before its turn came; nothing was computed."""


class SupersededError(UnavailableError):
    """A newer observation of the same session came before the request's turn; nothing was computed."""


class DrainingError(UnavailableError):
    """The server is shutting down and takes no new work."""


class DoneError(UnavailableError):
    """Nothing is left to do, so there are no actions, and the reply that says so has no place in what the client takes: a bare array, say."""
