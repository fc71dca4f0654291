"""Chips, pods and topologies: numbers about hardware, each beside its source. None yet."""
