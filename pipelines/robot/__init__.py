"""RL on robot policies: action heads over gymnasium environments."""
