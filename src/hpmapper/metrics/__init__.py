"""Metrics for Prometheus: what is counted (`collect`), and the endpoint that tells it (`serve`)."""
