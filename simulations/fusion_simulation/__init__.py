"""Flower App that compares fusion strategies on the same clients."""
