"""Tile shapes of the GPU kernels, and which form runs at which shape.

Chosen without a GPU, from what the compiler makes of the candidates for Hopper (no spills, registers) and from
estimates of latency; `python -m benchmarks.recurrence` measures where the forms cross.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MULTIPROCESSORS = 132  # of an H100 or H200
REGISTERS = 65536  # of one of them


@dataclass(frozen=True)
class Tile:
    """One program of a form that is parallel in time: `window` positions by `channels`.

    max_registers: per thread; a limit where the compiler takes more than it needs, so that a multiprocessor
        holds more programs. None: the compiler's own choice, and one program is reckoned with.
    """

    window: int
    channels: int
    warps: int
    max_registers: int | None = None

    @property
    def resident(self) -> int:
        """Programs that one multiprocessor is sure to hold at once."""
        return 1 if self.max_registers is None else REGISTERS // (self.max_registers * 32 * self.warps)

    def options(self) -> dict[str, int]:
        """The keywords that launch a kernel with this tile."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"W": self.window, "C": self.channels, "num_warps": self.warps, **limit}


@dataclass(frozen=True)
class Lanes:
    """One program of a form that walks in time: one channel per lane, inputs loaded `steps` steps ahead."""

    channels: int
    steps: int
    warps: int = 1


@dataclass(frozen=True)
class Pair:
    """`few`, with longer windows, where its programs are so few that all of them run at once; else `many`."""

    many: Tile
    few: Tile


# Keyed by whether the cell is an LSTM, whose scan carries six numbers per element where the GRU's carries two.
NEWTON = {
    False: Pair(many=Tile(128, 8, 4), few=Tile(256, 8, 8, max_registers=128)),
    True: Pair(many=Tile(64, 16, 8), few=Tile(128, 8, 8, max_registers=128)),
}
ADJOINT = {
    False: Pair(many=Tile(64, 16, 8), few=Tile(128, 8, 8)),
    True: Pair(many=Tile(64, 8, 4), few=Tile(128, 8, 8)),
}
SEQUENTIAL = Lanes(channels=32, steps=8)
SEQUENTIAL_ADJOINT = Lanes(channels=32, steps=4)

# Rows times channels above which walking in time wins. A step forward waits for three or four activations in a
# row, some 200 cycles; a step of the adjoint waits for one product, because the states are known.
SEQUENTIAL_LANES = 8192
SEQUENTIAL_ADJOINT_LANES = 4096
# Below this many positions one window's iterations cost more than the steps.
SHORTEST_FOR_NEWTON = 128


def newton_is_faster(rows: int, width: int, time: int) -> bool:
    """Whether to solve forward by Newton's method on a GPU. Estimated, not yet measured."""
    return time >= SHORTEST_FOR_NEWTON and rows * width < SEQUENTIAL_LANES


def parallel_adjoint_is_faster(rows: int, width: int, time: int) -> bool:
    """Whether to run the adjoint parallel in time on a GPU. Estimated, not yet measured."""
    return time >= SHORTEST_FOR_NEWTON and rows * width < SEQUENTIAL_ADJOINT_LANES


def tile_of(pair: Pair, rows: int, width: int, window: int | None = None) -> Tile:
    """The tile for a shape, its window at most `window`, its channels no more than the width asks for."""
    programs = rows * -(-width // pair.few.channels)
    tile = pair.few if programs <= MULTIPROCESSORS * pair.few.resident else pair.many
    channels = min(tile.channels, _power_of_two_from(width))
    if window is None or window >= tile.window:
        return replace(tile, channels=channels)
    shorter = _power_of_two_from(window)
    return replace(tile, window=shorter if shorter <= window else shorter // 2, channels=channels)


def _power_of_two_from(size: int) -> int:
    return 1 << (size - 1).bit_length()
