"""``python -m shohin``."""

from shohin.cli import main

if __name__ == "__main__":
    main()
