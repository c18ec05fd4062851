"""The campaign that kills, starves, damages and fuzzes the commands of this project (`run.py`)."""
