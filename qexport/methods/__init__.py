"""How codes and parameters are chosen: one file a method. A method never sees bits, files or a model."""
