"""Token ids: tokenizers, corpora of packed ids, masks over the vocabulary."""
