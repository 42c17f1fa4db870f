"""Linen modules, one file a published network; blocks they share live in `layers`."""
