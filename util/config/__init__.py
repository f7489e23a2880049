"""Flags, groups of flags, recipes."""
