"""Other libraries' doors: one file a library, imported by nobody but who needs it."""
