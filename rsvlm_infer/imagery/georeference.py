"""Owns what an open raster says about its place: one affine transform and a crs, or a sentence about what is missing. Knows no pixels.

Imported only when a raster is opened; rasterio is the extra `[geo]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from rasterio.transform import Affine, from_gcps
from rasterio.warp import transform as warp_transform

Transform = tuple[float, float, float, float, float, float]

_EXACT_PX = 0.5  # control points that an affine transform meets this well lose nothing


@dataclass(frozen=True)
class Georeference:
    """crs: rasterio's, or None. transform: affine, or None. lost: sentences about what cannot be said."""

    crs: Any
    transform: Transform | None
    lost: tuple[str, ...] = ()

    @property
    def wkt(self) -> str | None:
        """The crs as WKT2, or as it can be written when GDAL has no WKT2 for it."""
        if self.crs is None:
            return None
        try:
            return str(self.crs.to_wkt(version="WKT2_2019"))
        except RasterioError:
            return str(self.crs.to_wkt())

    def bounds(self, height: int, width: int) -> tuple[float, float, float, float] | None:
        """(left, bottom, right, top) of all pixels in crs units."""
        if self.transform is None:
            return None
        corners = [self.place(row, col) for row in (0, height) for col in (0, width)]
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def place(self, row: float, col: float) -> tuple[float, float]:
        """Pixel corner -> crs coordinates."""
        assert self.transform is not None
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def gsd(self, row: float, col: float) -> float | None:
        """Side in metres of the square with one pixel's ground area at a place; None without a usable crs.

        Projected systems: crs units times their metre factor, on Mercator also times cos(latitude), because there a crs metre
        is longer than a metre on the ground. Geographic systems: degrees times the length of a degree at that latitude.
        """
        if self.crs is None or self.transform is None:
            return None
        metres = self._metres_per_unit(*self.place(row, col))
        if metres is None:
            return None
        a, b, _, d, e, _ = self.transform
        column = math.hypot(a * metres[0], d * metres[1])
        down = math.hypot(b * metres[0], e * metres[1])
        distance = math.sqrt(column * down)
        return distance if math.isfinite(distance) and distance > 0 else None

    def _metres_per_unit(self, x: float, y: float) -> tuple[float, float] | None:
        """Ground metres of one crs unit along x and y at a place."""
        crs = self.crs
        try:
            if crs.is_geographic:
                latitude = math.radians(max(-90.0, min(90.0, y)))
                metres_x = 111412.84 * math.cos(latitude) - 93.5 * math.cos(3 * latitude)
                metres_y = 111132.954 - 559.822 * math.cos(2 * latitude) + 1.175 * math.cos(4 * latitude)
                return metres_x, metres_y
            if crs.is_projected:
                metre = float(crs.linear_units_factor[1])
                if crs.to_dict().get("proj") in ("merc", "webmerc"):
                    metre *= math.cos(math.radians(warp_transform(crs, "EPSG:4326", [x], [y])[1][0]))
                return metre, metre
        except RasterioError:  # a local or damaged crs without units
            return None
        return None


def georeference(dataset: Any) -> Georeference:
    """What an open rasterio dataset says. Ground control points become the affine transform that fits them best."""
    transform: Affine = dataset.transform
    crs = dataset.crs
    if not transform.is_identity and transform.determinant != 0 and all(map(math.isfinite, tuple(transform)[:6])):
        if crs is None:
            return Georeference(
                None, tuple(transform)[:6], ("there is no coordinate system: places are in the file's own units",)
            )
        return Georeference(crs, tuple(transform)[:6])
    points, points_crs = dataset.gcps
    if len(points) >= 3:
        fitted = _fit(points)
        if fitted is not None:
            return _by_points(fitted, points, points_crs)
    if dataset.rpcs is not None:
        return Georeference(
            None,
            None,
            (
                "only rational polynomial coefficients (RPC) place the scene, which need a terrain model: places are in pixels; "
                "warp it first, for example with gdalwarp -rpc",
            ),
        )
    if crs is not None:
        if transform.is_identity:
            return Georeference(crs, tuple(transform)[:6])
        return Georeference(None, None, ("its transform has no area, so that pixels have no place: places are in pixels only",))
    return Georeference(None, None, ("there is no georeference: places are in pixels only",))


def _fit(points: Any) -> Affine | None:
    """The least-squares affine transform of control points; None where they lie on a line."""
    spread = np.array([(point.row, point.col) for point in points], dtype=np.float64)
    if np.linalg.matrix_rank(spread - spread.mean(axis=0), tol=1e-6) < 2:
        return None
    fitted = from_gcps(points)
    return fitted if fitted.determinant != 0 else None


def _by_points(fitted: Affine, points: Any, crs: Any) -> Georeference:
    """A transform fitted to control points, and how far they lie from it."""
    transform: Transform = tuple(fitted)[:6]
    inverse = ~fitted
    off = 0.0
    for point in points:
        col = inverse.a * point.x + inverse.b * point.y + inverse.c
        row = inverse.d * point.x + inverse.e * point.y + inverse.f
        off = max(off, math.hypot(col - point.col, row - point.row))
    lost: tuple[str, ...] = ()
    if off > _EXACT_PX:
        lost = (
            f"{len(points)} ground control points place the scene; one affine transform fits them within {off:.3g} pixels, so places "
            "are that uncertain; warp it first, for example with gdalwarp, to keep more",
        )
    if crs is None:
        return Georeference(None, transform, (*lost, "there is no coordinate system: places are in the file's own units"))
    return Georeference(crs, transform, lost)
