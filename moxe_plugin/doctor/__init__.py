"""``moxe doctor``: is this installation complete, and if not, what to do."""

from moxe_plugin.doctor.command import main as main
