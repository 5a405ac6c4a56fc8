"""Thread blocks sort pairs by expert, as PTX for compute capability 9.0. Knows no JAX."""

from __future__ import annotations

import dataclasses

MAX_TILES = 1 << 16  # Two numbers of tiles share a word.


@dataclasses.dataclass(frozen=True)
class BlockSort:
    """Gives pairs their places in tiles, of one expert each; those of an expert keep their order.

    Thread i has the pairs i, i + `threads` and so on, and of the experts a few neighbours. Where
    there are several blocks, a thread has one pair, and each block is told what all of them
    `count`.

    Attributes:
      pairs: How many there are.
      experts: Experts there are; pairs of others get no place.
      tile: Places of a tile.
      warps: Of a block.
      blocks: How many share the pairs: `threads` each, the last one what is left.
      halves_last: Whether tiles that are at most half full come after all others. There are fewer
        than `MAX_TILES` then, of an even number of places.
    """

    pairs: int
    experts: int
    tile: int
    warps: int
    blocks: int = 1
    halves_last: bool = False

    def __post_init__(self):
        if self.blocks > 1 and self.pairs_each > 1:
            raise ValueError("of several blocks, a thread has one pair at most.")
        if (self.blocks > 1 or self.halves_last) and self._experts_each > 1:
            raise ValueError("of several blocks, or with halves last, a thread has one expert.")

    @property
    def threads(self) -> int:
        """Of the block."""
        return 32 * self.warps

    @property
    def pairs_each(self) -> int:
        """Pairs of a thread."""
        return -(-self.pairs // (self.threads * self.blocks))

    @property
    def _experts_each(self) -> int:
        return -(-self.experts // self.threads)

    @property
    def _row_bytes(self) -> int:
        """Of what 32 pairs count: 16 bits an expert, and as many for all others."""
        return 2 * (self.experts + 1)

    @property
    def _firsts(self) -> int:
        return -(-self.pairs_each * self.warps * self._row_bytes // 4) * 4

    @property
    def _limits_and_jumps(self) -> tuple[int, int]:
        """Of each expert, where places go on elsewhere; how far from there."""
        return self._firsts + 4 * self.experts, self._firsts + 8 * self.experts

    @property
    def _sums(self) -> int:
        return self._firsts + 4 * self.experts * (3 if self.halves_last else 1)

    @property
    def shared_bytes(self) -> int:
        """Counts, the places of each expert, the tiles of each warp's experts."""
        return self._sums + 4 * self.warps

    def registers(self) -> str:
        """What it gives and uses, beside the predicates p and in and the word t0 of its user."""
        pairs = ", ".join(f"{name}<{self.pairs_each}>" for name in ("e", "rank", "place", "cell"))
        own = ", ".join(f"{name}<{self._experts_each}>" for name in ("own_count", "tiles_of"))
        return f""".reg .b64 pairs_at; .reg .b32 {pairs}, {own};
.reg .b32 i, first_pair, in_warp, of_warp, own, own_expert, own_tiles, same, count, before;
.reg .b32 first, tiles, whole;"""

    def ptx(self, experts: str, shared: str, counts: str = "") -> str:
        """The program, in which all threads of a block meet four times.

        It gives the thread `i`, the number of its `first_pair`, of its pairs the experts `e0` and
        so on (`experts` for one that is not there) and the places `place0` (-1 for none), and how
        many `tiles` are in use.

        Args:
          experts: Register of a pointer to the experts of all pairs.
          shared: Register of a pointer to `shared_bytes` of shared memory.
          counts: Of several blocks: register of a pointer to what they `count`, row by row. The
            register `block` says which one this is.
        """
        everyone = f"bar.sync 1, {self.threads};\n"
        return f"""{self.count(experts, shared)}
{self._count_tiles(counts)}
{self._add_tiles(shared, everyone)}{everyone}
{self._place(shared)}"""

    def count(self, experts: str, shared: str) -> str:
        """The first part of it, in which threads meet twice.

        It gives the number of the first of a thread's experts, `own_expert`, and how many pairs of
        it the block has, `own_count0`; of the next one `own_count1`.
        """
        everyone = f"bar.sync 1, {self.threads};\n"
        start = "mov.u32 i, %tid.x; shr.u32 of_warp, i, 5; and.b32 in_warp, i, 31;"
        pair = "mov.u32 first_pair, i;"
        if self.blocks > 1:
            pair = f"mad.lo.u32 first_pair, block, {self.threads}, i;"
        return f"""{start} {pair}
{self._load(experts)}{self._clear(shared)}{everyone}
{self._count(shared)}{everyone}
{self._add_counts(shared)}"""

    def _load(self, experts: str) -> str:
        text = f"mul.wide.u32 pairs_at, first_pair, 4; add.u64 pairs_at, pairs_at, {experts};\n"
        for k in range(self.pairs_each):
            text += f"setp.lt.u32 p, first_pair, {self.pairs - self.threads * k};"
            text += f"mov.u32 e{k}, {self.experts};"
            text += f"@p ld.global.u32 e{k}, [pairs_at + {4 * self.threads * k}];\n"
        return text

    def _clear(self, shared: str) -> str:
        text = f"mad.lo.u32 own, i, 4, {shared}; mov.u32 t0, 0;\n"
        for at in range(0, self._firsts, 4 * self.threads):
            text += f"setp.lt.u32 p, i, {(self._firsts - at) // 4};"
            text += f"@p st.shared.u32 [own + {at}], t0;\n"
        return text

    def _row(self, k: int) -> int:
        """Of the counts of a warp's pairs number k, from those of its first."""
        return self.warps * self._row_bytes * k

    def _count(self, shared: str) -> str:
        """Ranks among the 32 pairs of a warp, and how many of each expert these are."""
        text = ""
        for k in range(self.pairs_each):
            text += f"""min.u32 e{k}, e{k}, {self.experts}; match.any.sync.b32 same, e{k}, -1;
mov.u32 t0, 1; shl.b32 t0, t0, in_warp; sub.u32 t0, t0, 1; and.b32 t0, t0, same;
popc.b32 rank{k}, t0;
mul.lo.u32 cell{k}, of_warp, {self._row_bytes}; mad.lo.u32 cell{k}, e{k}, 2, cell{k};
add.u32 cell{k}, cell{k}, {shared};
popc.b32 count, same; setp.eq.u32 p, rank{k}, 0; @p st.shared.u16 [cell{k} + {self._row(k)}], count;
"""
        return text

    def _add_counts(self, shared: str) -> str:
        """Of a thread's experts: each count becomes the sum of those before it."""
        each = self._experts_each
        text = f"mul.lo.u32 own_expert, i, {each}; mad.lo.u32 own, own_expert, 2, {shared};\n"
        for j in range(each):
            text += f"setp.lt.u32 in, own_expert, {self.experts - j};"
            text += "mov.u32 count, 0; mov.u32 t0, 0;\n"
            for row in range(self.pairs_each * self.warps):
                at = f"[own + {self._row_bytes * row + 2 * j}]"
                text += f"@in ld.shared.u16 t0, {at}; @in st.shared.u16 {at}, count;"
                text += "add.u32 count, count, t0;\n"
            text += f"mov.u32 own_count{j}, count;\n"
        return text

    def _count_tiles(self, counts: str) -> str:
        """Of a thread's experts; of its only one, where there are several blocks, also `before`."""
        text = "mov.u32 before, 0; mov.u32 own_tiles, 0; mov.u32 count, own_count0;\n"
        if self.blocks > 1:
            text += f"mul.wide.u32 pairs_at, own_expert, 4; add.u64 pairs_at, pairs_at, {counts};"
            text += f"setp.lt.u32 in, own_expert, {self.experts}; mov.u32 count, 0;\n"
            # Not a loop, so that the loads overlap: 64 for 16,384 rows of four experts.
            for row in range(self.blocks):
                at = f"[pairs_at + {4 * self.experts * row}]"
                text += f"mov.u32 t0, 0; @in ld.global.u32 t0, {at}; add.u32 count, count, t0;"
                text += f"setp.gt.u32 p, block, {row}; @p add.u32 before, before, t0;\n"
        for j in range(self._experts_each):
            text += f"mov.u32 count, own_count{j};" if j else ""
            if self.halves_last:
                # Tiles more than half full, and in the upper half of the word the other one.
                text += f"add.u32 tiles_of{j}, count, {self.tile // 2 - 1};"
                text += f"div.u32 tiles_of{j}, tiles_of{j}, {self.tile};"
                text += f"mul.lo.u32 t0, tiles_of{j}, {self.tile}; setp.gt.u32 p, count, t0;"
                text += f"@p add.u32 tiles_of{j}, tiles_of{j}, {MAX_TILES};\n"
            else:
                text += f"add.u32 count, count, {self.tile - 1};"
                text += f"div.u32 tiles_of{j}, count, {self.tile};"
            text += f"add.u32 own_tiles, own_tiles, tiles_of{j};\n"
        return text

    def _add_tiles(self, shared: str, everyone: str) -> str:
        """The block's first place of each expert: all tiles of those before it, and `before`."""
        text = "mov.u32 first, own_tiles;\n"
        for distance in (1, 2, 4, 8, 16):
            text += f"shfl.sync.up.b32 t0, first, {distance}, 0, -1;"
            text += f"setp.ge.u32 p, in_warp, {distance}; @p add.u32 first, first, t0;\n"
        text += f"""mad.lo.u32 t0, of_warp, 4, {shared}; setp.eq.u32 p, in_warp, 31;
@p st.shared.u32 [t0 + {self._sums}], first; sub.u32 first, first, own_tiles; mov.u32 tiles, 0;
{everyone}"""
        for warp in range(self.warps):
            text += f"ld.shared.u32 t0, [{shared} + {self._sums + 4 * warp}];"
            text += f"setp.gt.u32 p, of_warp, {warp}; @p add.u32 first, first, t0;"
            text += "add.u32 tiles, tiles, t0;\n"
        if self.halves_last:
            text += "and.b32 whole, tiles, 0xFFFF; shr.u32 tiles, tiles, 16;"
            text += "add.u32 tiles, tiles, whole;"
        text += f"mad.lo.u32 t0, own_expert, 4, {shared};\n"
        for j in range(self._experts_each):
            text += f"setp.lt.u32 p, own_expert, {self.experts - j}; mov.u32 count, first;"
            text += "and.b32 count, count, 0xFFFF;" if self.halves_last else ""
            text += f"mad.lo.u32 own, count, {self.tile}, before;"
            text += f"@p st.shared.u32 [t0 + {self._firsts + 4 * j}], own;\n"
            if self.halves_last:
                limit, jump = self._limits_and_jumps
                text += f"and.b32 own, tiles_of{j}, 0xFFFF; add.u32 own, own, count;"
                text += f"mul.lo.u32 own, own, {self.tile}; @p st.shared.u32 [t0 + {limit}], own;"
                text += "shr.u32 count, first, 16; add.u32 count, count, whole;"
                text += f"mul.lo.u32 count, count, {self.tile}; sub.u32 count, count, own;"
                text += f"@p st.shared.u32 [t0 + {jump}], count;\n"
            text += f"add.u32 first, first, tiles_of{j};\n"
        return text

    def _go_on(self, place: str) -> str:
        """A `place` counted from its expert's first one, to where it is; if p says so.

        `own` is the address of what is known of the expert. Of one that has whole tiles alone, the
        place behind the last goes to another tile's first one, too: either ends a tile.
        """
        if not self.halves_last:
            return ""
        limit, jump = self._limits_and_jumps
        return f"""mov.u32 count, -1; @p ld.shared.u32 count, [own + {limit}];
setp.ge.u32 in, {place}, count; @in ld.shared.u32 count, [own + {jump}];
@in add.u32 {place}, {place}, count;
"""

    def _place(self, shared: str) -> str:
        text = ""
        for k in range(self.pairs_each):
            text += f"""setp.lt.u32 p, e{k}, {self.experts}; mad.lo.u32 own, e{k}, 4, {shared};
mov.u32 first, 0; @p ld.shared.u32 first, [own + {self._firsts}];
ld.shared.u16 t0, [cell{k} + {self._row(k)}]; add.u32 rank{k}, rank{k}, t0;
add.u32 place{k}, first, rank{k};
{self._go_on(f"place{k}")}selp.b32 place{k}, place{k}, -1, p;
"""
        return text

    def ends(self, shared: str, to: int) -> str:
        """After the program: for each expert the place behind its pairs of this block.

        Args:
          shared: As in `ptx`.
          to: Where in it they go, 4 bytes each.
        """
        text = f"mad.lo.u32 own, own_expert, 4, {shared};\n"
        for j in range(self._experts_each):
            text += f"setp.lt.u32 p, own_expert, {self.experts - j};"
            text += f"@p ld.shared.u32 t0, [own + {self._firsts + 4 * j}];"
            text += f"add.u32 t0, t0, own_count{j};\n{self._go_on('t0')}"
            text += f"@p st.shared.u32 [own + {to + 4 * j}], t0;\n"
        return text
