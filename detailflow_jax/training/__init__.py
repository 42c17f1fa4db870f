"""What the training loop stands on: the start of a run, what it uses, its command line."""
