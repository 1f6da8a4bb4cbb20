"""Faults made on purpose, one module a kind.

Each has `WHAT`, one line on it, and `run(cases, seed, folder)`, which yields None for a case that passed and a sentence
for one that failed. The same seed gives the same cases; everything is written under `folder`.
"""
