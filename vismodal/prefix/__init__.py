"""The frozen part of a model, computed once for each picture: `FrozenPrefix`.

`frozen` runs a model with what it kept, `cut` finds where a forward ceases to be constant, `points` takes and gives
values there, `calls` watches and stands in for modules, `keys` tells pictures apart, `store` keeps rows in memory and
on disk.
"""
