"""The embedded default: what ``make demo`` shows to someone without a robot, a GPU or a checkpoint."""
