"""Thin shells between sockets and the protocol core."""
