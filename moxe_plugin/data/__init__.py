"""Token shards, instructions, tokenizers, and the corpus every installation has."""
