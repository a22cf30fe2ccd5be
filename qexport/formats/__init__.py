"""What stored bytes mean: one file a format. A format never sees a model, a method or a kernel."""
