"""What every run stands on: configuration, files, devices, processes, checkpoints, metrics."""
