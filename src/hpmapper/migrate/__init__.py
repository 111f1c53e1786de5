"""Moving what a storage directory holds into a root with another driver, verified, resumable, the source untouched.

source.py      what a source offers: committed snapshots, images, containers
ours.py        a root of hpmapper as a source
mirror.py      one root file system made like another, and compared with it
move.py        the way itself
"""
