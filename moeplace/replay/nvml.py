"""Clocks, power and throttle reasons of a GPU by nvidia-ml-py, where that is installed.

Everything here is beside the measurement: whatever cannot be read is left out.
"""

import contextlib
from typing import Any

import numpy as np

_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class Gauge:
    """Readings of one GPU, found by its UUID; silent if there is no NVML or no such GPU."""

    def __init__(self, uuid: str):
        self._handle: Any = None
        self._clocks: list[float] = []
        self._watts: list[float] = []
        self._celsius: list[float] = []
        self._reasons = 0
        with contextlib.suppress(Exception):  # no package, no driver, no such GPU
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._joules = self._energy()

    def read(self) -> float | None:
        """Take a reading; the SM clock in MHz, if it can be read."""
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        clock = None
        with contextlib.suppress(Exception):
            clock = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            self._clocks.append(clock)
        with contextlib.suppress(Exception):
            field = nvml.NVML_FI_DEV_POWER_INSTANT
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [field])
            if value.nvmlReturn == 0:
                self._watts.append(value.value.uiVal / 1000)
        with contextlib.suppress(Exception):
            degrees = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            self._celsius.append(float(degrees))
        with contextlib.suppress(Exception):
            self._reasons |= nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        return clock

    def summary(self) -> dict[str, Any]:
        """Medians of what was read, and all reasons for lower clocks that were seen."""
        found: dict[str, Any] = {}
        for name, values in (
            ("sm_clock_mhz", self._clocks),
            ("power_watts", self._watts),
            ("temperature_celsius", self._celsius),
        ):
            if values:
                found[name] = float(np.median(values))
        joules = self._energy()
        if joules is not None and self._joules is not None:
            found["energy_joules"] = joules - self._joules
        if self._handle is not None:
            found["throttle_reasons"] = [
                name for bit, name in _REASONS.items() if self._reasons & bit and bit != 0x1
            ]
        return found

    def _energy(self) -> float | None:
        with contextlib.suppress(Exception):
            joules: float = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
            return joules
        return None
