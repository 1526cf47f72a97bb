"""Stateless functions on tokens ``(B, N, C)``, a folder each, imported from their folders."""
