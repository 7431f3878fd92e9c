"""Suites: several systems trained, finetuned, evaluated and put into one table."""
