"""Objective, step, loop, and what a run writes."""
