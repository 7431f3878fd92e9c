"""Loops over time in C++, for CPUs; compiled on the machine that first needs them."""
