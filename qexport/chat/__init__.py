"""Conversations with a model: settings and sampling, prompts from templates, text from tokens, and the turns."""
