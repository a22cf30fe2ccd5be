"""Methods that calibrate cache formats."""
