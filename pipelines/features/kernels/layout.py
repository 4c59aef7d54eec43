"""Where the words of entity state and of a program are.

Entity state is one flat int64 vector, its floats kept as their bits: a header; for every series, that is every
(field, hop, family of folds), the settled part of its last settled tile and a ring of tiles indexed ``tile % ring``;
then the raw events not yet settled, in canonical order, each as time, order and one float64 per field. Raw events are
kept for ``reach`` behind the newest one, because within it a late event may still arrive, but never more than the
program's ``most``: of more, the oldest are settled before their time, and no event may come before the last of these,
whose time and order are the ``floor``. A tile is its tag (its time
divided by the hop) and the accumulator of its family.

A program is what a view compiles to: a header, then one row per series, per window (one for each family of its folds)
and per lag.
"""

from __future__ import annotations

FORMAT = 4
EMPTY = -(1 << 62)  # a tile tag or a time that no event has
NEVER = 1 << 62  # a time to live that no age exceeds

# Words of the state's header.
VERSION, NEWEST, START, COUNT, UNPLACED, SEEN, FLOOR, FLOOR_ORDER, HEADER = 0, 1, 2, 3, 4, 5, 6, 7, 8

# Words of the program's header, then rows of series, windows and lags.
P_SERIES, P_WINDOWS, P_LAGS, P_FIELDS, P_REACH, P_FIXED, P_TTL, P_MOST, P_HEADER = 0, 1, 2, 3, 4, 5, 6, 7, 8
S_FIELD, S_HOP, S_RING, S_WIDTH, S_SETTLED, S_TILES, S_FAMILY, S_HALF_LIFE, S_ROW = 0, 1, 2, 3, 4, 5, 6, 7, 8
MOST_FOLDS = 11  # of one family
W_SERIES, W_TILES, W_OUTS = 0, 1, 2  # by the fold's code: where in the stored vector it is, -1 for nowhere
W_ROW = W_OUTS + MOST_FOLDS
L_SERIES, L_TILES, L_OUT, L_ROW = 0, 1, 2, 3

# served.Status, as numba sees it.
FRESH, STALE, MISSING = 0, 1, 3
