"""Measurements that anyone can repeat; each writes its lines to `benchmarks/results/`."""

import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of loading would cut through the tables
