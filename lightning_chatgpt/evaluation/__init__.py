"""A model and data to a report."""
