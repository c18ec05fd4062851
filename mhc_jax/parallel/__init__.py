"""Meshes of devices, shardings of arrays, and several processes."""
