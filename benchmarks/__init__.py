"""Measurements run by hand: `python -m benchmarks.NAME`. Results go into docs/notes.md."""
