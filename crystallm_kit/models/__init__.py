"""From token ids to a trained causal language model, and the folder that carries it."""
