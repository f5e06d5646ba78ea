"""psbn strip, from a checkout: psbn_mmdet/commands/strip.py."""

from psbn_mmdet.commands.strip import main

if __name__ == "__main__":
    main()
