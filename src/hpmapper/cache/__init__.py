"""The page cache of a root: seen, freed of duplicates, and filled before a start.

    places      where a driver keeps what can be cached
    inventory   whose it is: images, containers, and which objects each of them shows
    count       pages of single files
    stat        all of it together: what is cached, for whom, and what plain copies would have cost
    duplicates  the same blocks of the disk cached through two inodes; the same bytes in two files
    activity    which containers are at work
    trim        dropping duplicates, in the order in which they are missed least
    dedupe      identical contents in what containers wrote, made to share extents
    manager     the thread that trims under memory pressure and dedupes when the disk is idle
    profile     which parts of an image a start reads, as it is stored and as it travels
    record      finding out
    replay      reading them ahead
    start       both, beside a container that starts (beside: in a process of its own)

The kernel decides what is cached. All that is done here is to count, to hint (posix_fadvise) and to share extents:
nothing can lose data, and nothing has to be undone after a crash.
"""
