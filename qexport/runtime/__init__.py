"""Packed modules at work: the generic linear, stacks of experts, and the choice between kernel and reference."""
