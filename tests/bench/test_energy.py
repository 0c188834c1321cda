"""Energy counters as the kernel shows them, made up in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.bench import energy
from rsvlm_infer.bench.energy import EnergyReading, read_energy


def _zone(folder: Path, zone: str, name: str, microjoules: int) -> Path:
    place = folder / zone
    place.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 1000)):
        (place / file).write_text(f"{value}\n")
    return place


def test_packages_are_summed_and_their_parts_are_not_counted_again(tmp_path: Path) -> None:
    first = _zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = _zone(tmp_path, "intel-rapl:1", "package-1", 900)
    _zone(tmp_path, "intel-rapl:0:0", "core", 50)
    _zone(tmp_path, "intel-rapl:2", "psys", 5000)
    before = read_energy(tmp_path)
    (first / "energy_uj").write_text("600")
    (second / "energy_uj").write_text("200")  # began anew behind 1000
    after = read_energy(tmp_path)
    assert isinstance(before, EnergyReading)
    assert isinstance(after, EnergyReading)
    assert after.joules_since(before) == pytest.approx((500 + 300) / 1e6)


def test_it_says_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_energy(tmp_path / "absent") == f"not readable: the system has no counter in {tmp_path / 'absent'}"
    _zone(tmp_path, "intel-rapl:0", "package-0", 100)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("many")
    assert "not readable" in str(read_energy(tmp_path))

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        raise PermissionError(self)

    monkeypatch.setattr(energy.Path, "read_text", refuse)
    assert str(read_energy(tmp_path)).endswith("energy_uj is for root alone")
