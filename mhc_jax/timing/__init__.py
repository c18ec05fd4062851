"""Measurements on the device of this process: times of train steps at sizes of real models, and a report of the measurements."""
