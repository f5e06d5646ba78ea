"""psbn convert, from a checkout: psbn_mmdet/commands/convert.py."""

from psbn_mmdet.commands.convert import main

if __name__ == "__main__":
    main()
