"""Kubernetes: the manifests in base, components and overlays, what renders them, and rollouts."""
