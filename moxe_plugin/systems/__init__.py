"""What each system of the paper costs: parameters and FLOPs, for `moxe systems`."""
