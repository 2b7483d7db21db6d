"""Token ids to a reply."""
