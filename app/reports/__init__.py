"""One page about one or several runs, from what they left on the disk."""
