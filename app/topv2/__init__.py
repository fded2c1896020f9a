"""TOPv2's semantic parses: read, compared, scored at every exit."""
