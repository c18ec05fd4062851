"""Reports of runs: the HTML page of a comparison or sweep, and the record of a sweep for the repository."""
