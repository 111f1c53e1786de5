"""Docker's graph driver plugin protocol: HTTP and JSON on a unix socket, for Docker 1.13 to 26.

http    requests and responses on a unix socket (h11 knows HTTP)
plugin  the protocol's endpoints and JSON
layers  what Docker calls a layer, kept in a forest of snapshots
"""
