"""How good each exit is, as numbers and pictures."""
