"""``python -m moeplace``: the command line."""

from moeplace.cli import main

if __name__ == "__main__":
    main()
