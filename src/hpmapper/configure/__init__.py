"""What containerd and Docker must be told so that they use hpmapper: found out, explained, and merged into their files.

version     which program is installed
containerd  what its file should say, by version
docker      what daemon.json should say, by version
draft       the comparison: changes, conflicts, notes
document    the changes written into a file's text, the rest of which stays
file        the text put in place: checked, backed up, atomic
"""
