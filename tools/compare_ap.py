"""psbn compare-ap, from a checkout: psbn_mmdet/ap/command.py."""

from psbn_mmdet.ap.command import main

if __name__ == "__main__":
    main()
