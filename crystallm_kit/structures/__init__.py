"""Structures in and out, their symmetry, and equivalent views of them."""
