"""A replay as a module, for torchrun: ``torchrun ... -m moeplace.replay INSTANCE PLAN...``.

The options are those of ``moeplace replay``; calibration is
``torchrun ... -m moeplace.replay.calibrate --out PROFILE``.
"""

import sys

from moeplace.cli import main

main(["replay", *sys.argv[1:]])
