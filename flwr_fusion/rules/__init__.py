"""Rules: how mapped clients are put together."""
