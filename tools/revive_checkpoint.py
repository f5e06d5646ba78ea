"""psbn revive, from a checkout: psbn_mmdet/commands/revive.py."""

from psbn_mmdet.commands.revive import main

if __name__ == "__main__":
    main()
