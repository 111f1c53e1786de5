"""The wall around the kernel: the only place with ctypes, ioctls and system call numbers.

Each module wraps one kernel interface, thinly: typed arguments in, typed values out, and OSError with errno and path
when the kernel refuses. What an errno means for a driver is decided above.
"""
