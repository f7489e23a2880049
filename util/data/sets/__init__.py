"""Data sets with a name, one file each."""
