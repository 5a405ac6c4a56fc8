"""The thread program of `few_queries`, as PTX for compute capability 9.0. Knows no JAX.

A cluster of thread blocks, or several of them, attend from the queries of one row and key head, at
most eight, to the keys of that head. Sixteen slots are a tile. Tiles are dealt out in turn to the
blocks, and to the warps of each; a warp reads the positions of all of its tiles, lists those in
which a query sees anything, and reads keys and values of these alone, straight to registers:
queries are the left matrix of `mma.sync` for the scores (half of its rows are empty) and weights
the right one for the values, in which form the lane that has a score has the weight. The order in
which a matrix instruction counts the head's elements, and the keys, is free: it is the one in which
a lane's loads are of 16 bytes. Sums of a warp go to shared memory, those of a block to the block of
the cluster that finishes a part of the outputs, and those of a cluster, through global memory, to
the last of the head's.

The last cluster of a head alone waits, for lower ones. All blocks of a launch fit the device, and
where something runs beside it, devices start them in the order of their numbers.
"""

from __future__ import annotations

import dataclasses
import math

from gpt_oss_jax.kernels.attention.softmax_ptx import (
    HEAD,
    SCALE,
    across,
    combine,
    scores,
    values,
    weights,
)
from gpt_oss_jax.kernels.ptx import EMPTY, NEXT, WAIT, literal

TILE = 16  # Slots.
MAX_QUERIES = 8
_OUTPUT_THREADS = MAX_QUERIES * HEAD // 2
_SUMS_BYTES = 16 * _OUTPUT_THREADS  # Of a cluster, in the room.
_ROW = 4 * (HEAD + 4)  # Bytes of a query's sums; the rest spreads them over the banks.
_SCANNED = 8  # Tiles whose positions a warp reads at once: four lanes each, four positions a lane.
_NOWHERE = 1 << 31  # As an unsigned number, the least that is no position.
# Below every score, and finite. A power of two, so that its product with `SCALE` is exact, as what
# `weights` takes from it is rounded: in a tile of which only other queries see something.
_LOWEST = -(2.0**100)
_LOAD = "ld.global.L1::no_allocate.v4.u32"


@dataclasses.dataclass(frozen=True)
class Program:
    """One launch, and the program of its threads.

    Attributes:
      rows: Of the batch.
      queries: Of a row.
      heads: Of the keys.
      group: Heads of the queries to one of the keys.
      slots: Of the cache.
      window: Keys visible to a query, None for all.
      blocks: Of a cluster, up to 16.
      warps: Of a block, at least eight.
      sink_bytes: 2 for bfloat16, 4 for float32.
      stores: Whether the keys and values of the queries' positions, one a row, come beside the
        cache, and go into it.
      splits: Clusters of a row and key head, up to 16; of one block each, but in benchmarks.
    """

    rows: int
    queries: int
    heads: int
    group: int
    slots: int
    window: int | None
    blocks: int
    warps: int = 8
    sink_bytes: int = 2
    stores: bool = False
    splits: int = 1

    @property
    def tiles(self) -> int:
        """Of a row. Where slots do not fill the last, it begins earlier."""
        return -(-self.slots // TILE)

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return self.rows * self.heads * self._parts

    @property
    def room(self) -> int:
        """Words that are `EMPTY` before the launch: sums of all clusters but each head's last."""
        return self.rows * self.heads * (self.splits - 1) * _SUMS_BYTES // 4

    @property
    def _parts(self) -> int:
        """Blocks of a row and key head."""
        return self.splits * self.blocks

    @property
    def shared_bytes(self) -> int:
        """Lists of tiles, sums of the warps, their largest and total, sums from other blocks.

        And for each warp what goes into the cache.
        """
        return self._new + self.stores * self.warps * 4 * HEAD

    @property
    def _new(self) -> int:
        return self._inbox + 16 * self._each * self.blocks

    @property
    def _finishers(self) -> int:
        """Blocks of a cluster among which the outputs are shared out."""
        return 1 << (self.blocks.bit_length() - 1)

    @property
    def _each(self) -> int:
        """Threads of such a block, which have two outputs each."""
        return _OUTPUT_THREADS // self._finishers

    @property
    def _scans(self) -> int:
        """How often a warp reads positions."""
        return -(-self.tiles // (self._parts * self.warps * _SCANNED))

    @property
    def _at_once(self) -> int:
        return min(4, self._scans)

    @property
    def _list(self) -> int:
        """Bytes of a warp's list."""
        return 4 * _SCANNED * self._scans

    @property
    def _sums(self) -> int:
        return self.warps * self._list

    @property
    def _totals(self) -> int:
        return self._sums + self.warps * MAX_QUERIES * _ROW

    @property
    def _inbox(self) -> int:
        return self._totals + self.warps * MAX_QUERIES * 8

    @property
    def _visible(self) -> int:
        """An unsigned distance below this is that of a visible key."""
        return _NOWHERE if self.window is None else self.window

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block, pointers to queries, keys, values, sinks, positions of
        queries, positions of keys (a whole number of tiles), if it stores new keys, new values and
        their slots (any past the last: nowhere), if heads are split the room, the result and shared
        memory.
        """
        text = f"""{_REGISTERS}
{WAIT}
mov.u32 tid, %tid.x; and.b32 lane, tid, 31; shr.u32 warp, tid, 5;
shr.u32 g, lane, 2; and.b32 q, lane, 3;
{"barrier.cluster.arrive;" if self.blocks > 1 else ""}
rem.u32 t0, <block>, {self.grid}; rem.u32 part, t0, {self._parts}; div.u32 t0, t0, {self._parts};
rem.u32 rank, part, {self.blocks};
rem.u32 head, t0, {self.heads}; div.u32 row, t0, {self.heads};
{self._query()}
{self._sink()}
{self._read_new() if self.stores else ""}
{self._find()}
{self._keep_new() if self.stores else ""}
{self._addresses()}
mov.f32 largest, {literal(_LOWEST)}; mov.f32 total, 0f00000000; mov.u32 zero, 0;
{"".join(f"mov.f32 o{i}, 0f00000000;" for i in range(16))}
setp.eq.u32 p, count, 0; @p bra ALONE;
mov.u32 i, 0; ld.shared.u32 tile, [list];
{self._fetch_keys("")}
{self._fetch_values("")}
STEP:
{self._replace() if self.stores else ""}
{scores()}
{self._mask()}
add.u32 i, i, 1; setp.lt.u32 more, i, count; add.u32 list, list, 4;
@more ld.shared.u32 tile, [list];
{self._fetch_keys("@more")}
{weights()}
{values()}
{self._fetch_values("@more")}
@more bra STEP;
ALONE:
{NEXT}
{self._store() if self.stores else ""}
{self._hand_over()}
{self._block_sum()}
{self._cluster_sum() if self.blocks > 1 else ""}
{self._sum_of_splits() if self.splits > 1 else ""}
{self._finish()}
DONE:"""
        operands = ["block", "q", "k", "v", "sinks", "q_pos", "k_pos"]
        operands += ["k_new", "v_new", "slots"] * self.stores + ["room"] * (self.splits > 1)
        operands += ["out", "shared"]
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    def _query(self) -> str:
        """Lane (g, q) has elements 8 q and 32 + 8 q of query g, and its position."""
        text = "".join(f"mov.u32 q{i}, 0;" for i in range(8)) + "mov.u32 q_pos, -1;\n"
        text += self._place("g")
        text += "add.u64 at, at, <q>; mul.wide.u32 more_at, q, 16; add.u64 at, at, more_at;"
        text += f"@p {_LOAD} {{q0, q1, q2, q3}}, [at];@p {_LOAD} {{q4, q5, q6, q7}}, [at + 64];\n"
        return text + (
            f"mad.lo.u32 t0, row, {self.queries}, t1; mul.wide.u32 at, t0, 4;"
            "add.u64 at, at, <q_pos>; @p ld.global.u32 q_pos, [at];"
        )

    def _place(self, query: str) -> str:
        """`at`, bytes before a query, g or t0; t1, which position; p, if it is one."""
        return f"""setp.lt.u32 p, {query}, {self.queries * self.group};
div.u32 t1, {query}, {self.group}; mul.lo.u32 t2, t1, {self.group}; sub.u32 t2, {query}, t2;
mad.lo.u32 t0, row, {self.queries}, t1; mad.lo.u32 t0, t0, {self.heads}, head;
mad.lo.u32 t0, t0, {self.group}, t2; mul.wide.u32 at, t0, {2 * HEAD};
"""

    def _sink(self) -> str:
        """Of the query whose outputs this thread finishes. `out` is which."""
        each = self._each
        text = f"and.b32 out, tid, {each - 1}; mad.lo.u32 out, rank, {each}, out;"
        text += "shr.u32 t0, out, 5;" + self._place("t0")
        text += f"mad.lo.u32 t0, head, {self.group}, t2; mul.wide.u32 at, t0, {self.sink_bytes};"
        text += "add.u64 at, at, <sinks>; mov.u32 t0, 0;"
        if self.sink_bytes == 2:
            text += "@p ld.global.u16 t0, [at]; shl.b32 t0, t0, 16;"
        else:
            text += "@p ld.global.u32 t0, [at];"
        return text + f"mov.b32 sink, t0; mul.f32 sink, sink, {literal(math.log2(math.e))};"

    def _find(self) -> str:
        """Lists the warp's tiles in which a query sees a key; `count` of them."""
        apart = self._parts * self.warps
        text = f"mad.lo.u32 list, warp, {self._list}, <shared>; mov.u32 count, 0;"
        text += f"mad.lo.u32 tile, warp, {self._parts}, part; mad.lo.u32 tile, g, {apart}, tile;"
        for n in range(self.queries):
            text += f"mul.lo.u32 t0, row, {self.queries}; add.u32 t0, t0, {n};"
            text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <q_pos>;"
            text += f"ld.global.u32 from{n}, [at];"
        text += f"""
mul.lo.u32 t0, row, {4 * TILE * self.tiles}; mad.lo.u32 t0, q, 16, t0;
cvt.u64.u32 at_pos, t0; add.u64 at_pos, at_pos, <k_pos>;
mov.u32 i, 0;
SCAN:
"""
        for n in range(self._at_once):
            text += f"add.u32 t0, tile, {n * _SCANNED * apart}; setp.lt.u32 p, t0, {self.tiles};"
            text += f"mul.wide.u32 at, t0, {4 * TILE}; add.u64 at, at, at_pos;"
            text += "".join(f"mov.u32 found{n}_{j}, -1;" for j in range(4))
            names = ", ".join(f"found{n}_{j}" for j in range(4))
            text += f"@p ld.global.v4.u32 {{{names}}}, [at];\n"
        for n in range(self._at_once):
            text += "setp.ne.u32 seen, 0, 0;"
            for j in range(4):
                for query in range(self.queries):
                    text += self._sees(f"from{query}", f"found{n}_{j}", "p")
                    text += "or.pred seen, seen, p;\n"
            text += f"""vote.sync.ballot.b32 t0, seen, -1;
shr.u32 t1, t0, 1; or.b32 t0, t0, t1; shr.u32 t1, t0, 2; or.b32 t0, t0, t1;
and.b32 t0, t0, {0x11111111}; mov.u32 t1, 1; shl.b32 t1, t1, lane; and.b32 t2, t0, t1;
setp.ne.u32 p, t2, 0; sub.u32 t1, t1, 1; and.b32 t1, t1, t0; popc.b32 t1, t1;
add.u32 t1, t1, count; mad.lo.u32 t1, t1, 4, list; add.u32 t2, tile, {n * _SCANNED * apart};
@p st.shared.u32 [t1], t2; popc.b32 t0, t0; add.u32 count, count, t0;
"""
        text += f"add.u32 tile, tile, {self._at_once * _SCANNED * apart};"
        text += f"add.u32 i, i, {self._at_once}; setp.lt.u32 p, i, {self._scans}; @p bra SCAN;"
        return text + "bar.warp.sync -1;"

    def _sees(self, query: str, key: str, out: str) -> str:
        """Distances that are no numbers from 0 on are large without a sign."""
        return (
            f"sub.u32 t0, {query}, {key}; setp.lt.u32 {out}, {key}, {_NOWHERE};"
            f"setp.lt.and.u32 {out}, t0, {self._visible}, {out};"
        )

    @property
    def _stride(self) -> int:
        """Bytes from slot to slot."""
        return 2 * HEAD * self.heads

    def _addresses(self) -> str:
        """Of a lane's keys and values in a tile that begins at slot 0.

        A lane has of key 4 (g / 2) + g % 2, and the next but one, what it has of the query, and of
        values 4 q to 4 q + 3 elements 8 g to 8 g + 7.
        """
        return f"""mul.lo.u32 t2, row, {self.slots};
shr.u32 t0, g, 1; shl.b32 t0, t0, 2; and.b32 t1, g, 1; add.u32 t0, t0, t1; add.u32 t0, t0, t2;
mul.wide.u32 at_k, t0, {self._stride}; add.u64 at_k, at_k, <k>;
mul.lo.u32 t0, head, {2 * HEAD}; mad.lo.u32 t1, q, 16, t0; cvt.u64.u32 at, t1;
add.u64 at_k, at_k, at;
mad.lo.u32 t2, q, 4, t2; mul.wide.u32 at_v, t2, {self._stride}; add.u64 at_v, at_v, <v>;
mad.lo.u32 t1, g, 16, t0; cvt.u64.u32 at, t1; add.u64 at_v, at_v, at;"""

    def _fetch_keys(self, guard: str) -> str:
        text = f"mul.wide.u32 at, tile, {4 * TILE}; add.u64 at, at, at_pos;"
        text += f"{guard} ld.global.v4.u32 {{k_pos0, k_pos1, k_pos2, k_pos3}}, [at];"
        text += f"mul.lo.u32 slot, tile, {TILE};"
        if self.slots % TILE:
            text += f"min.u32 slot, slot, {self.slots - TILE};"
        text += f"\nmul.wide.u32 at, slot, {self._stride}; add.u64 at, at, at_k;"
        for n in range(2):
            for half in range(2):
                names = ", ".join(f"k{n}_{4 * half + j}" for j in range(4))
                place = 2 * n * self._stride + HEAD * half
                text += f"{guard} {_LOAD} {{{names}}}, [at + {place}];\n"
        return text

    def _fetch_values(self, guard: str) -> str:
        text = f"mul.wide.u32 at, slot, {self._stride}; add.u64 at, at, at_v;\n"
        for n in range(4):
            names = ", ".join(f"v{n}_{j}" for j in range(4))
            text += f"{guard} {_LOAD} {{{names}}}, [at + {n * self._stride}];\n"
        return text

    def _read_new(self) -> str:
        """Starts to read the row's new key (lanes to 7) and value (to 15), and their slot."""
        return f"""mul.wide.u32 at, row, 4; add.u64 at, at, <slots>;
ld.global.u32 new_slot, [at];
and.b32 t0, lane, 7; mul.wide.u32 at, t0, 16; mad.lo.u32 t0, row, {self.heads}, head;
mul.wide.u32 more_at, t0, {2 * HEAD}; add.u64 at, at, more_at;
add.u64 more_at, at, <v_new>; add.u64 at, at, <k_new>;
setp.lt.u32 p, lane, 8; @p ld.global.v4.u32 {{a0, a1, a2, a3}}, [at];
setp.ge.u32 p, lane, 8; setp.lt.and.u32 p, lane, 16, p;
@p ld.global.v4.u32 {{a0, a1, a2, a3}}, [more_at];"""

    def _keep_new(self) -> str:
        """Puts them where the lanes of a warp find them; `new_tile` and the place in it."""
        text = f"mad.lo.u32 new, warp, {4 * HEAD}, <shared>; add.u32 new, new, {self._new};"
        text += "mad.lo.u32 t0, lane, 16, new; setp.lt.u32 p, lane, 16;"
        text += "@p st.shared.v4.u32 [t0], {a0, a1, a2, a3}; bar.warp.sync -1;\n"
        text += f"div.u32 new_tile, new_slot, {TILE}; mul.lo.u32 t0, new_tile, {TILE};"
        if self.slots % TILE:
            text += f"min.u32 t0, t0, {self.slots - TILE};"
        # No tile of the cache has a slot past the last.
        text += f"sub.u32 new_place, new_slot, t0; setp.ge.u32 p, new_slot, {self.slots};"
        return text + "@p mov.u32 new_tile, -1;"

    def _replace(self) -> str:
        """What was read of the slot, before it was written or after, gives way to what is new."""
        text = """setp.ne.u32 p, tile, new_tile; @p bra AS_READ;
shr.u32 t0, g, 1; shl.b32 t0, t0, 2; and.b32 t1, g, 1; add.u32 t0, t0, t1;
mad.lo.u32 t1, q, 16, new;
"""
        for half in range(2):
            text += f"ld.shared.v4.u32 {{a0, a1, a2, a3}}, [t1 + {HEAD * half}];"
            for n in range(2):
                text += f"add.u32 t2, t0, {2 * n}; setp.eq.u32 p, t2, new_place;"
                text += "".join(f"@p mov.u32 k{n}_{4 * half + j}, a{j};" for j in range(4)) + "\n"
        text += (
            f"mad.lo.u32 t1, g, 16, new; ld.shared.v4.u32 {{a0, a1, a2, a3}}, [t1 + {2 * HEAD}];"
        )
        text += "shl.b32 t0, q, 2;\n"
        for n in range(4):
            text += f"add.u32 t2, t0, {n}; setp.eq.u32 p, t2, new_place;"
            text += "".join(f"@p mov.u32 v{n}_{j}, a{j};" for j in range(4)) + "\n"
        return text + "AS_READ:"

    def _store(self) -> str:
        """By eight lanes of the head's blocks."""
        return f"""or.b32 t0, part, warp; setp.eq.u32 p, t0, 0; setp.lt.and.u32 p, lane, 8, p;
setp.lt.and.u32 p, new_slot, {self.slots}, p;
mul.lo.u32 t0, row, {self.slots}; add.u32 t0, t0, new_slot; mul.wide.u32 at, t0, {self._stride};
mul.lo.u32 t0, head, {2 * HEAD}; mad.lo.u32 t0, lane, 16, t0; cvt.u64.u32 more_at, t0;
add.u64 at, at, more_at; add.u64 more_at, at, <v>; add.u64 at, at, <k>;
mad.lo.u32 t0, lane, 16, new;
@p ld.shared.v4.u32 {{a0, a1, a2, a3}}, [t0]; @p st.global.v4.u32 [at], {{a0, a1, a2, a3}};
@p ld.shared.v4.u32 {{a0, a1, a2, a3}}, [t0 + {2 * HEAD}];
@p st.global.v4.u32 [more_at], {{a0, a1, a2, a3}};"""

    def _mask(self) -> str:
        text = ""
        for j in range(4):
            score = f"s{j // 2}_{j % 2}"
            text += self._sees("q_pos", f"k_pos{j}", "p")
            text += f"selp.f32 {score}, {score}, 0fff800000, p;\n"
        return text

    def _hand_over(self) -> str:
        """A warp's sums, and of each query the largest score and the total, to shared memory."""
        text = across("add", "total")
        text += f"mad.lo.u32 t0, warp, {MAX_QUERIES * _ROW}, <shared>;"
        text += f"mad.lo.u32 t0, q, {2 * _ROW}, t0; mad.lo.u32 t0, g, 32, t0;\n"
        for column in range(2):
            for half in range(2):
                first = 8 * half + column
                names = ", ".join(f"o{first + i}" for i in (0, 2, 4, 6))
                place = self._sums + column * _ROW + 16 * half
                text += f"st.shared.v4.f32 [t0 + {place}], {{{names}}};\n"
        text += f"mul.f32 largest, largest, {SCALE};"
        text += f"mad.lo.u32 t0, warp, {8 * MAX_QUERIES}, <shared>; mad.lo.u32 t0, g, 8, t0;"
        text += "setp.eq.u32 p, q, 0;"
        text += f"@p st.shared.v2.f32 [t0 + {self._totals}], {{largest, total}};\n"
        return text + f"bar.sync 1, {32 * self.warps};"

    def _block_sum(self) -> str:
        """Warp w adds up two elements a lane of query w; warps past the queries have none."""
        text = "min.u32 t2, warp, 7;"
        text += f"mad.lo.u32 t0, t2, {_ROW}, <shared>; mad.lo.u32 t0, lane, 8, t0;"
        text += "mad.lo.u32 t1, t2, 8, <shared>;\n"
        for w in range(self.warps):
            place = self._totals + 8 * MAX_QUERIES * w
            text += f"ld.shared.v2.f32 {{m{w}, l{w}}}, [t1 + {place}];"
            place = self._sums + MAX_QUERIES * _ROW * w
            text += f"ld.shared.v2.f32 {{x{w}, y{w}}}, [t0 + {place}];\n"
        return text + combine(self.warps)

    def _cluster_sum(self) -> str:
        """Each block sends what it has of a part of the outputs to the block that finishes it.

        First it waits until all have begun.
        """
        each = self._each
        text = f"""setp.lt.u32 p, warp, {MAX_QUERIES};
div.u32 t1, tid, {each}; and.b32 t2, tid, {each - 1};
mad.lo.u32 t0, rank, {each}, t2; mad.lo.u32 t0, t0, 16, <shared>; add.u32 t0, t0, {self._inbox};
@p mapa.shared::cluster.u32 t0, t0, t1; barrier.cluster.wait;
@p st.shared::cluster.v4.f32 [t0], {{largest, total, o0, o1}};
barrier.cluster.arrive; barrier.cluster.wait;
setp.ge.u32 p, warp, {max(1, each // 32)}; @p bra DONE;
{f"setp.ge.u32 p, rank, {self._finishers}; @p bra DONE;" if self._finishers < self.blocks else ""}
mad.lo.u32 t0, t2, 16, <shared>;
"""
        for n in range(self.blocks):
            place = self._inbox + 16 * each * n
            text += f"ld.shared.v4.f32 {{m{n}, l{n}, x{n}, y{n}}}, [t0 + {place}];\n"
        return text + combine(self.blocks)

    def _sum_of_splits(self) -> str:
        """Each cluster puts what it has into the room, but the last, which adds it to its own."""
        last = self.splits - 1
        return f"""{f"setp.ge.u32 p, warp, {MAX_QUERIES}; @p bra DONE;" if self.blocks == 1 else ""}
mad.lo.u32 t0, row, {self.heads}, head; mul.wide.u32 at, t0, {last * _SUMS_BYTES};
mul.wide.u32 more_at, out, 16; add.u64 at, at, more_at; add.u64 at, at, <room>;
div.u32 t0, part, {self.blocks}; setp.eq.u32 p, t0, {last}; @p bra LAST;
mul.wide.u32 more_at, t0, {_SUMS_BYTES}; add.u64 at, at, more_at;
st.relaxed.gpu.global.v4.f32 [at], {{largest, total, o0, o1}}; bra DONE;
LAST:
{self._load_until_there()}
mov.f32 m{last}, largest; mov.f32 l{last}, total; mov.f32 x{last}, o0; mov.f32 y{last}, o1;
{combine(self.splits)}"""

    def _load_until_there(self) -> str:
        """From `at`, what the other clusters have, as long as some of it is `EMPTY`."""
        others = [[f"{name}{n}" for name in "mlxy"] for n in range(self.splits - 1)]
        loads = [
            f"ld.relaxed.gpu.global.v4.f32 {{{', '.join(four)}}}, [at + {n * _SUMS_BYTES}];\n"
            for n, four in enumerate(others)
        ]
        again = "".join(
            f"{_are_there(four)} @!p {load}" for four, load in zip(others, loads, strict=True)
        )
        return f"""{"".join(loads)}
AGAIN:
{_are_there(sum(others, []))} vote.sync.all.pred p, p, -1; @p bra ALL_THERE;
nanosleep.u32 20; {again}bra AGAIN;
ALL_THERE:"""

    def _finish(self) -> str:
        """The sink joins, and the outputs are written."""
        each = self._each
        return f"""shr.u32 t0, out, 5; {self._place("t0")}
setp.lt.and.u32 p, tid, {each}, p;
max.f32 m0, largest, sink; sub.f32 l0, largest, m0; ex2.approx.f32 l0, l0;
sub.f32 l1, sink, m0; ex2.approx.f32 l1, l1; fma.rn.f32 total, total, l0, l1;
rcp.approx.f32 total, total; mul.f32 total, total, l0; mul.f32 o0, o0, total;
mul.f32 o1, o1, total; cvt.rn.bf16x2.f32 t0, o1, o0;
and.b32 t1, out, 31; mul.wide.u32 more_at, t1, 4; add.u64 at, at, more_at; add.u64 at, at, <out>;
@p st.global.u32 [at], t0;"""


def _are_there(words: list[str]) -> str:
    """Says in p whether none is `EMPTY`."""
    text = f"setp.ne.b32 p, {words[0]}, {EMPTY};"
    return text + "".join(f"setp.ne.and.b32 p, {word}, {EMPTY}, p;" for word in words[1:])


_REGISTERS = """
.reg .pred p, seen, more;
.reg .b32 t<3>, tid, lane, warp, g, q, part, rank, head, row, out, q_pos, list, count, tile, slot;
.reg .b32 i, q<8>, from<8>, found0_<4>, found1_<4>, found2_<4>, found3_<4>, zero;
.reg .b32 k0_<8>, k1_<8>, k_pos<4>, v0_<4>, v1_<4>, v2_<4>, v3_<4>, a<4>, w<2>;
.reg .b32 new, new_slot, new_tile, new_place;
.reg .f32 s0_<4>, s1_<4>, o<16>, m<16>, l<16>, x<16>, y<16>, largest, total, before, f, sink;
.reg .b64 at, more_at, at_pos, at_k, at_v;"""
