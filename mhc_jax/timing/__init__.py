"""Measurements on the present device: train-step times at real sizes, and the report of them."""
