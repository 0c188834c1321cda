"""Owns where a window lies on the ground: its ring in the scene's own crs, its polygons in WGS 84. Knows no raster and no model.

Loads rasterio (extra `[geo]`) only when there is a crs to leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError

DECIMALS = 9  # of degrees: 0.1 mm on the ground, below any pixel
STRAY_PX = 0.1  # how far a drawn edge may leave the true one, in pixels along that edge
MAX_SEGMENTS = 1024  # of one edge; a straight UTM edge of 200 km at 10 m needs 32

NO_GEOREFERENCE = "the scene has no georeference, so its windows have no place on a map; coordinates are pixels (column, -row)"
NO_CRS = "the scene has no coordinate reference system, so its windows have no longitude and latitude"
OUT_OF_CRS = (
    "the window reaches beyond what its coordinate reference system can place on the Earth, so it has no longitude and latitude"
)

Point = tuple[float, float]
Ring = tuple[Point, ...]
Transform = tuple[float, float, float, float, float, float]
BBox = tuple[float, float, float, float]

_Floats = NDArray[np.float64]


class PixelRectangle(Protocol):
    """A rectangle of pixels; it may reach beyond its scene."""

    @property
    def row_off(self) -> int: ...
    @property
    def col_off(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """One window on the ground.

    native: closed ring of corners, counter-clockwise, in crs units. polygons: closed WGS 84 rings of (longitude, latitude),
    counter-clockwise, cut at the antimeridian, empty when unknown. bbox: (west, south, east, north) in degrees, None when unknown;
    west > east where it crosses the antimeridian. lost: a sentence about what is unknown, empty when nothing is.
    """

    native: Ring
    polygons: tuple[Ring, ...]
    bbox: BBox | None
    lost: str = ""

    @property
    def geometry(self) -> dict[str, Any] | None:
        """The WGS 84 polygons as a GeoJSON geometry (RFC 7946), None when unknown."""
        rings = [[list(point) for point in ring] for ring in self.polygons]
        if not rings:
            return None
        if len(rings) == 1:
            return {"type": "Polygon", "coordinates": rings}
        return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}


def footprint(window: PixelRectangle, transform: Transform | None, crs: str | None) -> Footprint:
    """Where one window lies; see `footprints`, which is faster for many."""
    return footprints([window], transform, crs)[0]


def footprints(windows: Sequence[PixelRectangle], transform: Transform | None, crs: str | None) -> list[Footprint]:
    """Where windows of one scene lie. Edges get as many points as keep them within STRAY_PX of the true edge.

    transform: affine (a, b, c, d, e, f) from (column, row) to crs coordinates; any rotation, mirroring or shear. None: coordinates
    are (column, -row), which is where maps show such a raster. crs: any text that rasterio reads, x first; None without one.

    Raises:
        InputError: a transform that maps pixels to a line, or a crs that cannot be read.
        MissingDependencyError: there is a crs and rasterio is not installed.
    """
    if not windows:
        return []
    a, b, c, d, e, f = transform or (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    turn = a * e - b * d
    if turn == 0 or not all(map(math.isfinite, (a, b, c, d, e, f))):
        raise InputError(
            f"transform must be six finite numbers that map pixels to an area, got {transform}; correct the file's georeference"
        )
    # this order is counter-clockwise where rows run down on the map; a south-up or mirrored scene runs the other way round
    order = [(0, 0), (0, 1), (1, 1), (1, 0)] if turn < 0 else [(0, 0), (1, 0), (1, 1), (0, 1)]
    cols = np.array([[window.col_off + window.width * x for x, _ in order] for window in windows], dtype=np.float64)  # [N, 4]
    rows = np.array([[window.row_off + window.height * y for _, y in order] for window in windows], dtype=np.float64)
    corners = np.stack([a * cols + b * rows + c, d * cols + e * rows + f], axis=2)  # [N, 4, 2]
    natives = [_closed([(float(x), float(y)) for x, y in ring]) for ring in corners]
    if transform is None or crs is None:
        lost = NO_GEOREFERENCE if transform is None else NO_CRS
        return [Footprint(native, (), None, lost) for native in natives]
    across = np.hypot(np.roll(cols, -1, axis=1) - cols, np.roll(rows, -1, axis=1) - rows)  # [N, 4] pixels of each edge
    edges = _true_edges(corners, across, _Place(crs))
    return [_on_earth(native, edges[4 * index : 4 * index + 4]) for index, native in enumerate(natives)]


def _on_earth(native: Ring, edges: Sequence[_Floats]) -> Footprint:
    """A footprint from the four edges of one ring, each [n + 1, 2] of continuous longitude and latitude."""
    if not all(np.isfinite(edge).all() for edge in edges):
        return Footprint(native, (), None, OUT_OF_CRS)
    points: list[Point] = []
    for edge in edges:
        shift = 360.0 * round((points[-1][0] - edge[0, 0]) / 360.0) if points else 0.0
        # a corner on a pole has two longitudes, one for each edge: both points stay
        points += [(float(lon) + shift, float(lat)) for lon, lat in edge]
    turns = round((points[-1][0] - points[0][0]) / 360.0)
    if turns:  # the window holds a pole: inside is on the left, which is north of a way eastward
        pole = math.copysign(90.0, turns)
        points += [(points[-1][0], pole), (points[0][0], pole)]
    points = _cut(_cut(points, 1, 90.0, -1.0), 1, -90.0, 1.0)
    west = min(lon for lon, _ in points)
    points = _cut(points, 0, west + 360.0, -1.0)  # some global rasters show a column twice
    east = max(lon for lon, _ in points)
    first, last = math.floor((west + 180.0) / 360.0), math.ceil((east + 180.0) / 360.0)
    rings = []
    for strip in range(first, max(last, first + 1)):
        part = _cut(_cut(points, 0, 360.0 * strip - 180.0, 1.0), 0, 360.0 * strip + 180.0, -1.0)
        ring = _rounded([(lon - 360.0 * strip, lat) for lon, lat in part])
        if ring:
            rings.append(ring)
    if not rings:
        return Footprint(native, (), None, OUT_OF_CRS)
    lons = [[lon for lon, _ in ring] for ring in rings]
    lats = [lat for ring in rings for _, lat in ring]
    world = east - west >= 360.0 - 10.0**-DECIMALS
    west, east = (-180.0, 180.0) if world else (min(lons[0]), max(lons[-1]))
    return Footprint(native, tuple(rings), (west, min(lats), east, max(lats)))


def _true_edges(corners: _Floats, across: _Floats, place: _Place) -> list[_Floats]:
    """Each edge of [N, 4, 2] native corners as [n + 1, 2] longitude and latitude, n the smallest power of two that stays true."""
    starts = corners.reshape(-1, 2)
    stops = np.roll(corners, -1, axis=1).reshape(-1, 2)
    pixels = across.reshape(-1)
    found: list[_Floats] = [np.empty((0, 2))] * len(starts)
    left = np.arange(len(starts))
    segments = 1
    while len(left):
        share = np.arange(4 * segments + 1) / (4 * segments)  # three points inside each segment see whether it is straight
        points = starts[left, None] + share[:, None] * (stops[left] - starts[left])[:, None]  # [E, 4 n + 1, 2]
        lonlat = place.lonlat(points)
        true = _is_straight(lonlat, pixels[left] / segments)
        if segments == MAX_SEGMENTS:
            true[:] = True
        for index, edge, done in zip(left, lonlat, true, strict=True):
            if done:
                found[index] = edge[::4]
        left = left[~true]
        segments *= 2
    return found


def _is_straight(lonlat: _Floats, pixels: _Floats) -> NDArray[np.bool_]:
    """bool [E]: the points [E, 4 n + 1, 2] between every fourth one lie on the chord; what is not finite needs no more points."""
    with np.errstate(invalid="ignore"):
        starts, stops = lonlat[:, :-1:4], lonlat[:, 4::4]  # [E, n, 2]
        scale = np.ones_like(starts)
        scale[..., 0] = np.cos(np.radians((starts[..., 1] + stops[..., 1]) / 2))
        chord = (stops - starts) * scale
        pixel = np.hypot(chord[..., 0], chord[..., 1]) / np.maximum(pixels, 1e-9)[:, None]  # [E, n] degrees on the ground
        length = np.hypot(chord[..., 0], chord[..., 1])
        stray = np.zeros_like(pixel)
        for quarter in (1, 2, 3):
            away = (lonlat[:, quarter::4] - starts) * scale
            beside = np.abs(chord[..., 0] * away[..., 1] - chord[..., 1] * away[..., 0]) / length
            stray = np.maximum(stray, np.where(length > 0, beside, np.inf))  # an edge that returns to its start is no chord
        straight = (stray <= STRAY_PX * pixel).all(axis=1)
        # near a pole longitude may leap: then the way round is not yet known
        leaps = (np.abs(np.diff(lonlat[..., 0], axis=1)) > 90.0 + 1e-6).any(axis=1)
    return np.asarray((straight & ~leaps) | ~np.isfinite(lonlat).all(axis=(1, 2)))


class _Place:
    """The way from one crs to longitude and latitude."""

    def __init__(self, crs: str) -> None:
        try:
            from rasterio.crs import CRS
            from rasterio.errors import CRSError
        except ImportError:
            raise MissingDependencyError(
                "footprints of a scene with a coordinate reference system need rasterio, which is not installed; "
                "pip install 'rsvlm-infer[geo]'"
            ) from None
        try:
            self._crs = CRS.from_user_input(crs)
        except CRSError as error:
            raise InputError(f"crs must be a coordinate reference system, got {crs[:80]!r} ({error}); correct it") from None
        self._degrees = math.degrees(self._crs.units_factor[1]) if self._crs.is_geographic else 0.0

    def lonlat(self, points: _Floats) -> _Floats:
        """[E, n, 2] native -> [E, n, 2] degrees, the longitude continuous along each row; not finite beyond the crs."""
        from rasterio._err import CPLE_BaseError
        from rasterio.errors import RasterioError
        from rasterio.warp import transform

        flat = points.reshape(-1, 2)
        try:
            lons, lats = transform(self._crs, "EPSG:4326", flat[:, 0].tolist(), flat[:, 1].tolist())
        except (RasterioError, CPLE_BaseError):  # one bad point spoils the call: the other edges are asked again, one by one
            if len(points) == 1:
                return np.full_like(points, np.nan)
            return np.concatenate([self.lonlat(edge[None]) for edge in points])
        lonlat = np.stack([lons, lats], axis=1).reshape(points.shape)
        lonlat[~np.isfinite(lonlat).all(axis=2)] = np.nan
        if self._degrees:  # its own longitudes are continuous already, also beyond 180; a datum moves them by little
            own = points[..., 0] * self._degrees
            lonlat[..., 0] = own + (lonlat[..., 0] - own + 180.0) % 360.0 - 180.0
            return lonlat
        pole = np.abs(lonlat[..., 1]) > 90.0 - 10.0**-DECIMALS
        if pole.any():  # a pole has every longitude: take the neighbour's, so that the edge ends along its meridian
            lons = lonlat[..., 0]
            for row, column in np.argwhere(pole):
                lons[row, column] = lons[row, column - 1 if column else 1]
        finite = np.isfinite(lonlat[..., 0]).all(axis=1)
        lonlat[finite, :, 0] = np.unwrap(lonlat[finite, :, 0], period=360.0, axis=1)
        return lonlat


def _cut(points: list[Point], axis: int, bound: float, sign: float) -> list[Point]:
    """The part of a polygon where sign x coordinate >= sign x bound."""
    kept: list[Point] = []
    for index, point in enumerate(points):
        before = points[index - 1]
        inside, was = (sign * (each[axis] - bound) >= 0 for each in (point, before))
        if inside != was:
            share = (bound - before[axis]) / (point[axis] - before[axis])
            other = before[1 - axis] + share * (point[1 - axis] - before[1 - axis])
            kept.append((bound, other) if axis == 0 else (other, bound))
        if inside:
            kept.append(point)
    return kept


def _rounded(points: list[Point]) -> Ring:
    """A closed ring without repeated points, counter-clockwise; empty when it has no area."""
    ring: list[Point] = []
    for lon, lat in points:
        point = (round(lon, DECIMALS) + 0.0, round(lat, DECIMALS) + 0.0)  # + 0.0 turns -0.0 into 0.0
        if not ring or point != ring[-1]:
            ring.append(point)
    while len(ring) > 1 and ring[0] == ring[-1]:
        ring.pop()
    if len(ring) < 3:
        return ()
    lon, lat = ring[0]
    area = sum(
        (x0 - lon) * (y1 - lat) - (x1 - lon) * (y0 - lat) for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True)
    )
    if area == 0:
        return ()
    return _closed(ring if area > 0 else ring[::-1])


def _closed(points: list[Point]) -> Ring:
    return (*points, points[0])
