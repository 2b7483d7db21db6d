"""Metrics that sum first and divide once. Imports no Lightning."""
