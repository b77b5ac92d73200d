"""An environment for tests that takes its process with it, once."""

import os
from pathlib import Path

from odd_envs import Walk


class Fragile(Walk):
    """Crashes in the second step of the first episode from seed 8; the file ``once`` says that this has happened."""

    def __init__(self, once: str):
        super().__init__()
        self.once = Path(once)

    def step(self, action):
        if self.state[0] == 8 and self.state[1] == 1 and not self.once.exists():
            self.once.touch()
            os._exit(3)
        return super().step(action)
