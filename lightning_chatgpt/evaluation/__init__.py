"""From models and data to a report."""
