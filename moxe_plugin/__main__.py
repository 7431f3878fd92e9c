"""Runs the `fairseq2` command: ``torchrun -m moxe_plugin lm pretrain ...``."""

from __future__ import annotations

import sys

from moxe_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
