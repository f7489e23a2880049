"""Masks over a grid of patches, position codes, and the targets that are made of patches."""
