#!/bin/sh
# Make the Python modules of containerd's services from their .proto files (needs the dependency group dev).
set -eu
cd "$(dirname "$0")/../src"
api=hpmapper/containerd/api
python -m grpc_tools.protoc -I . --python_out=. --mypy_out=. \
    $api/types.proto $api/snapshots.proto $api/diff.proto $api/content.proto \
    $api/introspection.proto $api/leases.proto
