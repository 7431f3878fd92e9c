"""Recipes: how models are trained, finetuned, and made to generate."""
