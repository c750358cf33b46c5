"""Benchmarks as recipes: what is asked, the samples, their scores, and the published rows beside them."""
