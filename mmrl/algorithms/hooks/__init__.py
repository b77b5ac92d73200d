"""Small named changes to the policy gradient, from the literature: one file each, switched on by an option.

A hook is a dataclass of its options. Those that need no state are used as they are; those that do hand out an object
with ``state()`` and ``load_state()``, which checkpoints keep.
"""
