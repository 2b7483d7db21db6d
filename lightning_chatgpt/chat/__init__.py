"""What a conversation is, and how it becomes tokens. Imports no Lightning."""
