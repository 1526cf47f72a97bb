"""Attention in which convolutions make, reduce or accompany queries, keys and values."""
