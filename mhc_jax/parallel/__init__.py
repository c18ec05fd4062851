"""Meshes of devices and shardings of arrays (`sharding`), and runs of several processes (`distributed`)."""
