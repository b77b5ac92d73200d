"""``python -m mmrl`` is ``mmrl``, for launchers that start modules."""

from mmrl.cli import main

if __name__ == "__main__":
    main()
