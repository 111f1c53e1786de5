"""The front end for containerd: its snapshotter and differ services, over gRPC on a unix socket."""
