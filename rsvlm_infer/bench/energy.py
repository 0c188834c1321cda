"""The machine's energy counters (RAPL) between two moments. Knows Linux' powercap files; knows no model.

A counter belongs to the whole processor package: what other programs use meanwhile is in it, so a busy machine looks thirsty.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyReading:
    """Microjoules of each processor package, and where its counter begins anew."""

    microjoules: dict[str, int]
    ranges: dict[str, int]

    def joules_since(self, earlier: EnergyReading) -> float:
        """Energy between two readings; a counter that began anew did so once."""
        total = 0
        for name, after in self.microjoules.items():
            before = earlier.microjoules[name]
            total += after - before + (self.ranges[name] if after < before else 0)
        return total / 1e6


def read_energy(folder: Path = POWERCAP) -> EnergyReading | str:
    """The counters now, or a few words that say why there are none."""
    zones = [path for path in sorted(folder.glob("*:*")) if path.name.count(":") == 1] if folder.is_dir() else []
    microjoules, ranges = {}, {}
    for zone in zones:
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue  # psys counts the packages again
            microjoules[zone.name] = int((zone / "energy_uj").read_text())
            ranges[zone.name] = int((zone / "max_energy_range_uj").read_text())
        except PermissionError:
            return f"not readable: {zone / 'energy_uj'} is for root alone"
        except (OSError, ValueError) as error:
            return f"not readable: {zone} ({error})"
    return EnergyReading(microjoules, ranges) if microjoules else f"not readable: the system has no counter in {folder}"
