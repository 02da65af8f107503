"""Everything between a socket and a policy. Imports neither jax nor torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tandem-vla")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
