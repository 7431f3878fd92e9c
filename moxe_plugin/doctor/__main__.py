"""Runs the doctor: ``python -m moxe_plugin.doctor``."""

from __future__ import annotations

import sys

from moxe_plugin.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
