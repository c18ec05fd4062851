"""One folder an operation: reference.py is its meaning, the other files are backends of it."""
