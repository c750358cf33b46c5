"""Verdicts on single structures, and numbers over many of them, each under the name of its protocol."""
