"""Asset cards, registered by :mod:`moxe_plugin.composition`."""
