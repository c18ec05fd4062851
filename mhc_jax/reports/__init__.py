"""Pages and records that are written from an analysis."""
