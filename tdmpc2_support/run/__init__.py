"""What keeps a run: its folder, checkpoints, curves and films."""
