"""Run records and the tables made of them; imports neither torch nor fairseq2."""
