"""What a run writes besides checkpoints: its log, sample grids and overlays, and generators on their own."""
