"""Kubernetes: the manifests in base, components and overlays, and what renders them."""
