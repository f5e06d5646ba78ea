"""``python -m psbn_mmdet`` is the command ``psbn``."""

from .commands import main

if __name__ == "__main__":
    main()
