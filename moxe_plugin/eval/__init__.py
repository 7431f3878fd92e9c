"""Scores models with lm-evaluation-harness."""
