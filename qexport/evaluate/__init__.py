"""Measuring a model: perplexity, fidelity to the original, tasks. `docs/measuring.md` states the protocol."""
