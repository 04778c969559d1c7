"""`python -m moeplace` is `moeplace`."""

from moeplace.cli import main

if __name__ == "__main__":
    main()
