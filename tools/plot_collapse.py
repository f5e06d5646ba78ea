"""psbn plot, from a checkout: psbn_mmdet/commands/plot.py."""

from psbn_mmdet.commands.plot import main

if __name__ == "__main__":
    main()
