"""Bringing data in and looking at it: pack, open, show."""
