"""fairseq2 model families: MoxE and its baselines."""
