"""``moxe claims``: measures trained runs, and judges every claim of the paper."""
