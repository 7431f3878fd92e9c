"""Token shards, instructions, tokenizers, and the corpus every installation has."""

from moxe_plugin.data.registration import register_data as register_data
