"""From the command line to typed settings, and to one clear message where that fails."""
