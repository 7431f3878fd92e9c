"""How fast systems train, read a text and continue it, for `moxe speed`."""
