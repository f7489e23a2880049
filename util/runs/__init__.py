"""Finished runs: plans of tables, their cells, tables, curves."""
