"""Embed, index, search."""
