"""What keeps a run safe: checkpoints and the lock of its folder, signals, several processes, memory."""
