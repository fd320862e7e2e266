"""The same numbers sooner: the loss without padding and in parts, the last layer where it is read, other kernels.

Each path has a function `…_obstacle(base)` that says what keeps a base from using it, None where nothing does;
`FastPaths` asks them once per base.
"""
