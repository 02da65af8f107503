"""What the pi0 family fixes for both slots: prompts, images, checkpoints, statistics. Imports neither jax nor torch."""
