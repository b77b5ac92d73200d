"""Algorithms: how scores become gradients. One file a family; see ``base`` for what they share."""
