"""TOPv2 as rows of tokens."""
