"""What the package's HTML pages have in common."""
