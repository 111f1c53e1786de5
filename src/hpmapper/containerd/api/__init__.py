"""The wire form of containerd's services. The modules here are made from the .proto files by tools/protoc.sh."""
