"""Stand-ins for the programs of other projects that talk to policy servers: what each sends, expects and trips over (reference/peers.md §1.11).

Written from those facts, with a codec of their own, so that they agree with the server only where the real programs do. Each does what its
original does on the wire and keeps its checks; how it gets its images is left out. ``close`` is ours: the originals leave that to the
interpreter's end.
"""
