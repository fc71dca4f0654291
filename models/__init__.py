"""Reference models: programs for one device, annotated; tables say how a mesh splits them."""
