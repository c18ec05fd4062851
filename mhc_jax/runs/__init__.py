"""The parts of one training run: its folder, checkpoints, metrics, progress, stop signals and environment."""
