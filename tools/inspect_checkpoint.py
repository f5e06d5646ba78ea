"""psbn inspect, from a checkout: psbn_mmdet/commands/inspect.py."""

from psbn_mmdet.commands.inspect import main

if __name__ == "__main__":
    main()
