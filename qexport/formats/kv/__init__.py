"""Formats of the key-value cache: a file's name is its id."""
