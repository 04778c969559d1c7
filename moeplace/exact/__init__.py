"""Exact methods: one formulation as data, several solvers. Imported only when asked for."""
