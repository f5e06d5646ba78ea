"""psbn compare-ap, from a checkout: psbn_mmdet/commands/compare_ap.py."""

from psbn_mmdet.commands.compare_ap import main

if __name__ == "__main__":
    main()
