"""The endless stream of training rows out of any number of sources."""
