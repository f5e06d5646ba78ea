"""What a checkpoint must not run."""

import os


class Malicious:
    """Unpickled the careless way, it writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)
