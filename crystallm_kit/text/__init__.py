"""Text formats of crystals, prompts, and the reading of completions."""
