"""The commands `fairseq2` and `moxe`; nothing heavy is imported to answer ``-h``."""

from moxe_plugin.cli.fairseq2_command import main as main
from moxe_plugin.cli.moxe_command import moxe_main as moxe_main
