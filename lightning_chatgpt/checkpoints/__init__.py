"""Checkpoint files that outlive what may happen to a machine, and the folders they lie in."""
