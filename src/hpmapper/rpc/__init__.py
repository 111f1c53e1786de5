"""gRPC for servers, on nghttp2: one thread that reads, answers and commits in batches.

Why not grpcio: it hands every call from its own threads to Python's and back, which costs more than the call's work.
Measured beside each other: docs/measurements.md, "What containerd's calls cost".
"""
