"""Models that ship with this package as ``builtin:NAME``, and the commands that made them."""
