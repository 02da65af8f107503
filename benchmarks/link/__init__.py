"""A slow, long and lossy network between two processes of one machine: ``emulator.emulated_link``."""
