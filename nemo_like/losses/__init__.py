"""Losses over the flat tokens of a batch."""
