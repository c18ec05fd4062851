"""One run on disk: folder, checkpoints, metrics, progress, stop and environment."""
