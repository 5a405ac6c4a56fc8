"""Runs the PTX of our kernels on a CPU, lane by lane, so that their logic is tested without a GPU.

Covers what they use and nothing else. Branches must be taken by all lanes of a warp or by none.
Memory that nobody wrote is poison. Knows nothing of timing, caches or the order between blocks.
"""

import functools
import re

import ml_dtypes
import numpy as np

from gpt_oss_jax.kernels.ptx import NEXT

_ALL = np.uint64(0xFFFFFFFF)
_LANES = np.ones(32, bool)
_LANES.flags.writeable = False
_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4
_NO_STEP = ("bar.warp.sync", "barrier.cluster.arrive")  # Warps go in step; waiting is for both.
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def _poison(size):
    """So many bytes: NaN as bf16 and as float32, and no -1, which means something."""
    return np.resize(np.frombuffer(b"\xc0\x7f", np.uint8), size)


class Memory:
    """Bytes with arrays in them, and room between these; addresses start at 4096."""

    def __init__(self):
        self.bytes = np.full(4096, 255, np.uint8)
        self.starts, self.ends = [], []

    def put(self, array):
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        at = (self.bytes.size // 256 + 1) * 256
        self.starts.append(at)
        self.ends.append(at + raw.size)
        fresh = np.full(at + raw.size, 255, np.uint8)
        fresh[: self.bytes.size] = self.bytes
        fresh[at:] = raw
        self.bytes = fresh
        return at

    def get(self, at, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.bytes[at : at + size].tobytes(), dtype).reshape(shape)


def launch(
    text,
    operands,
    memory,
    *,
    grid,
    shared_bytes,
    warps=4,
    cluster=1,
    at_once=False,
    at_rest=(),
    by_chance=None,
    second=False,
):
    """Runs a thread program whose first operand is the block and whose last is shared memory.

    Clusters run one after the other, or all of them at once. What is at rest (addresses and sizes)
    may be read before a warp has waited for earlier kernels, everything else only then. With
    random numbers `by_chance`, warps go on in any order, and copies land when they begin, not when
    they are waited for. As the `second` of the grids that vmap makes of one, the last block comes
    first.

    Returns:
      Address and size of what was copied to shared memory, and of what was only brought nearer.
    """
    # With it the assembler may read before the wait for earlier kernels.
    assert "ld.global.nc" not in text, "a promise that nobody writes what is read"
    assert text.count(NEXT) == 1, "the next kernel may start once"
    program, labels = _parse(text)
    bulks, all_warps = ([], []), []
    starts = range(0, grid, grid if at_once else cluster)
    for first in reversed(starts) if second else starts:
        group = range(grid if at_once else cluster)
        shared = np.tile(_poison(shared_bytes), (len(group), 1))
        threads = []
        for n in group:
            values, barriers = [first + n + grid * second, *operands, 0], {}
            for w in range(warps):
                warp = _Warp(program, labels, values, memory, shared[n], barriers, w, bulks)
                own = n // cluster * cluster
                warp.spaces["shared::cluster"] = shared[own : own + cluster].reshape(-1)
                warp.at_rest, warp.hasty = at_rest, by_chance is not None
                all_warps.append(warp)
                threads.append((n, warp.run()))
        waiting, arrived, fruitless = {}, {}, 0
        while threads:
            n, thread = threads.pop(0 if by_chance is None else by_chance.integers(len(threads)))
            barrier = next(thread, None)
            if barrier is None:
                continue
            if barrier in ("again", "looks again"):
                threads.append((n, thread))
                fruitless += 1
                assert fruitless < 1000 * warps * len(group), "all warps wait for ever"
                continue
            fruitless = 0
            number, needed, *only_arrives = barrier
            if number == "cluster":
                place, needed = (number, n // cluster), 32 * warps * cluster
            else:
                place = n, number
            assert thread not in arrived.setdefault(place, []), "a warp arrives twice"
            arrived[place].append(thread)
            waiting.setdefault(place, []).append((n, iter(()) if only_arrives else thread))
            if only_arrives:
                threads.append((n, thread))
            if len(waiting[place]) == needed // 32:
                threads += waiting.pop(place)
                del arrived[place]
        assert not waiting, "a warp waits for ever"
        copies = [barrier.copies for warp in all_warps for barrier in warp.barriers.values()]
        assert not any(copies), "a block ends before its copies"
    assert all(warp.at_rest is None for warp in all_warps), "a warp ends before earlier kernels"
    return bulks


def piece(text, gives, operands, memory, shared):
    """Runs a piece of a program in the four warps of a warpgroup.

    Args:
      text: What runs.
      gives: How many operands it gives; they come first.
      operands: The others, one for all threads or one for each.
      memory: Global memory.
      shared: Shared memory.

    Returns:
      What it gives, uint64 [gives, 128].
    """
    program, labels = _parse(re.sub(r"\$(\d+)", r"operand\1", text))
    given = np.zeros((gives, 128), np.uint64)
    for w in range(4):
        own = slice(32 * w, 32 * w + 32)
        warp = _Warp(program, labels, [], memory, shared, {}, w)
        for i, value in enumerate(operands):
            value = np.broadcast_to(np.asarray(value, np.uint64), 128)[own]
            warp.registers[f"operand{gives + i}"] = value
        assert not list(warp.run()), "a piece waits"
        for i in range(gives):
            given[i, own] = warp.value(f"operand{i}")
    return given


@functools.cache
def _parse(text):
    """Statements, taken apart once: most of them run very often."""
    program, labels = [], {}
    body = text.strip().removeprefix("{").removesuffix("}")
    for statement in re.sub(r"^(\w+):", r"\1:;", body, flags=re.MULTILINE).split(";"):
        statement = statement.strip()
        if statement.endswith(":"):
            labels[statement[:-1]] = len(program)
        elif statement and not statement.startswith(".reg"):
            guard = re.match(r"@(!?)(\w+)\s+", statement)
            rest = statement[guard.end() :] if guard else statement
            name, _, arguments = rest.partition(" ")
            args = [x.strip() for x in _OPERAND.findall(arguments)]
            kind = [word for word in name.split(".") if word not in ("relaxed", "gpu")]
            program.append((guard and guard.groups(), ".".join(kind), kind, args))
    return program, labels


@functools.cache
def _same(value):
    """All lanes have it; nobody may change it."""
    lanes = np.full(32, value, np.uint64)
    lanes.flags.writeable = False
    return lanes


@functools.cache
def _literal(name):
    if name.startswith("0f"):
        return _same(int(name[2:], 16))
    if re.match(r"-?\d", name):
        return _same(int(name, 0) % 2**64)
    return _same(0x7FC07FC0)  # Nobody wrote it.


@functools.cache
def _place(text):
    """Base and offset of an address."""
    base, _, offset = text.strip("[] ").partition("+")
    return base.strip(), int(offset or 0)


@functools.cache
def _names(text):
    return [name.strip() for name in text.strip("{} ").split(",")]


_BITS = {32: _ALL, 64: np.uint64(2**64 - 1)}
_OF_A_WORD = {size: np.arange(size) for size in (1, 2, 4)}
_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_FLOATS = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "div": np.divide,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "mul": np.multiply,
    # Rounded once.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "min": np.minimum,
    "max": np.maximum,
    "ex2": np.exp2,
    "rcp": lambda a: 1 / a,
}
_WIDE = {"mov": lambda a: a, "cvt": lambda a: a, "add": np.add, "sub": np.subtract}
_INTEGERS = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "shf": lambda a, b, by: (b << np.uint64(32) | a) >> (by & np.uint64(31)),
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "div": np.floor_divide,
    "rem": np.remainder,
    "min": np.minimum,
    "max": np.maximum,
    "selp": lambda a, b, p: np.where(p.astype(bool), a, b),
    "popc": lambda a: [int(x).bit_count() for x in a],
    "match": lambda a, _: [sum(1 << i for i in range(32) if a[i] == x) for x in a],
    "prmt": lambda a, b, selected: _permuted(a, b, selected),
}


def _voted(how, lanes):
    if how == "ballot":
        return sum(1 << i for i in range(32) if lanes[i])
    return {"any": lanes.any, "all": lanes.all}[how]()


def _float(x):
    return np.asarray(x, np.uint32).view(np.float32)


def _bf16(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


class _Barrier:
    """A phase ends when all have arrived and, which is when somebody waits, all copies landed."""

    def __init__(self, count):
        self.count, self.phase, self.arrived, self.expected, self.copies = count, 0, 0, 0, []

    def arrive(self, size):
        assert self.arrived < self.count, "more arrive than are awaited"
        self.arrived += 1
        self.expected += size
        if self.arrived == self.count and not self.expected:
            self.end()

    def end(self):
        self.copies, self.arrived, self.phase = [], 0, self.phase ^ 1

    def passed(self, parity):
        if self.arrived == self.count and self.phase == parity:
            for size, land in self.copies:
                land()
                self.expected -= size
            assert not self.expected, "more or fewer bytes than expected"
            self.end()
        return self.phase != parity


class _Warp:
    """32 lanes; a register holds 32 unsigned integers of 64 bits, whatever its type."""

    def __init__(self, program, labels, operands, memory, shared, barriers, warp, bulks=None):
        self.barriers, self.bulks = barriers, bulks
        self.program, self.labels, self.operands = program, labels, operands
        self.spaces = {"global": memory.bytes, "shared": shared}
        self.arrays = np.array(memory.starts), np.array(memory.ends)
        self.registers = {"%tid.x": np.arange(32, dtype=np.uint64) + 32 * warp}
        self.at_rest = None  # Nothing to wait for.
        self.hasty = False

    def value(self, name):
        if name in self.registers:
            return self.registers[name]
        if name.startswith("$"):
            return _same(self.operands[int(name[1:])])
        return _literal(name)

    def run(self):
        at = 0
        while at < len(self.program):
            guard, name, kind, args = self.program[at]
            at += 1
            active = _LANES
            if guard:
                active = self.value(guard[1]).astype(bool) ^ bool(guard[0])
                active = _LANES if active.all() else active
            if kind[0] == "bra":
                assert active.all() or not active.any(), f"divergent branch to {args}"
                if active.all():
                    at = self.labels[args[0]]
            elif kind[0] == "nanosleep":
                yield "looks again"
            elif name == "bar.sync":
                yield int(self.value(args[0])[0]), int(args[1])
            elif name == "bar.arrive":
                yield int(self.value(args[0])[0]), int(args[1]), "and goes on"
            elif name == "barrier.cluster.wait":
                yield "cluster", None
            elif kind[:2] == ["mbarrier", "try_wait"]:
                done = self.barriers[self.address(args[1])[0]].passed(int(self.value(args[2])[0]))
                self.write(args[0], np.full(32, done), active)
                if not done:
                    yield "again"
            elif active is _LANES or active.any():
                self.step(name, kind, args, active)

    def write(self, name, value, active, bits=32):
        value = np.asarray(value).astype(np.uint64) & _BITS[bits]
        if active is not _LANES:
            value = np.where(active, value, self.value(name))
        self.registers[name] = value

    def step(self, name, kind, args, active):
        if kind[0] in ("ld", "st"):
            return self.move(kind, args, active)
        if kind[0] == "mma":
            return self.multiply(args)
        if name == "griddepcontrol.wait":
            self.at_rest = None
        if kind[0] in ("griddepcontrol", "fence", "createpolicy") or name in _NO_STEP:
            return None
        if kind[0] in ("mbarrier", "cp"):
            return self.bulk(kind, args, active)
        destination, *sources = args
        v = [self.value(source) for source in sources]
        if kind[-1] == "f32" and kind[0] not in ("cvt", "mov", "selp"):
            f = [x.astype(np.uint32).view(np.float32) for x in v]
            with np.errstate(all="ignore"):
                result = _FLOATS[kind[0]](*f)
            return self.write(destination, result.view(np.uint32), active)
        if name in ("cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"):
            parts = [_to_bf16(_float(x.astype(np.uint32))).astype(np.uint32) for x in v]
            result = parts[0] if len(parts) == 1 else parts[0] << 16 | parts[1]
        elif kind[0] in _WIDE:
            result = _WIDE[kind[0]](*v)
        elif kind[0] == "vote":
            result = [_voted(kind[2], v[0])] * 32
        elif kind[0] == "mapa":
            result = v[0] + v[1] * np.uint64(self.spaces["shared"].size)
        else:
            u = [x & _ALL for x in v]
            if kind[0] == "setp":
                result = _COMPARE[kind[1]](u[0], u[1])
                if kind[2] == "and":
                    result &= v[2].astype(bool)
            elif name == "mul.bf16x2":
                low, high = (
                    _to_bf16(_bf16(u[0] >> shift & 65535) * _bf16(u[1] >> shift & 65535))
                    for shift in (np.uint64(0), np.uint64(16))
                )
                result = low | high.astype(np.uint64) << np.uint64(16)
            elif kind[0] == "redux":
                result = [getattr(u[0], kind[2])()] * 32
            elif kind[0] == "shfl":
                lanes, by = np.arange(32), u[1].astype(int)
                of = {"idx": by, "bfly": lanes ^ by, "up": np.where(lanes < by, lanes, lanes - by)}
                result = u[0][of[kind[2]]]
            else:
                result = _INTEGERS[kind[0]](*u)
        wide = kind[-1] == "u64" or (kind[0] == "mul" and kind[1] == "wide")
        return self.write(destination, result, active, 64 if wide else 32)

    def address(self, text):
        base, offset = _place(text)
        return self.value(base).astype(np.int64) + offset

    def move(self, kind, args, active):
        space = self.spaces[kind[1]]
        size = {"u8": 1, "u16": 2, "b16": 2}.get(kind[-1], 4)
        target, address = args if kind[0] == "ld" else args[::-1]
        names = _names(target)
        at = self.address(address)
        if active is not _LANES:
            at = at[active]
        assert not (at % (size * len(names))).any(), f"misaligned {kind} {args}"
        if kind[1] == "global":
            self.check(kind[0], at, size * len(names))
        for i, register in enumerate(names):
            where = at[:, None] + size * i + _OF_A_WORD[size]
            if kind[0] == "ld":
                values = space[where].view(f"u{size}")[:, 0]
                if active is not _LANES:
                    own, values = values, np.zeros(32, np.uint64)
                    values[active] = own
                self.write(register, values, active)
            else:
                raw = self.value(register)[:, None].view(np.uint8)
                space[where] = raw[active, :size]

    def check(self, kind, at, size):
        """It is inside an array; earlier kernels may still write what is not at rest."""
        array = np.searchsorted(self.arrays[0], at, "right") - 1
        assert (array >= 0).all() and (at + size <= self.arrays[1][array]).all(), f"{kind} nowhere"
        if self.at_rest is not None:
            rests = [(first <= at) & (at + size <= first + all_) for first, all_ in self.at_rest]
            assert kind == "ld" and np.any(rests, axis=0).all(), f"{kind} before it has waited"

    def bulk(self, kind, args, active):
        """Copies of whole pieces, started by some lanes, that a barrier waits for."""
        for lane in np.flatnonzero(active):
            self.bulk_of(kind, args, lane)

    def bulk_of(self, kind, args, lane):
        if kind[1] == "init":
            self.barriers[self.address(args[0])[lane]] = _Barrier(int(args[1]))
        elif kind[1] == "arrive":
            size = int(args[2]) if "expect_tx" in kind else 0
            self.barriers[self.address(args[1])[lane]].arrive(size)
        elif "prefetch" in kind:
            source, size = self.address(args[0])[lane], int(self.value(args[1])[lane])
            assert source % 16 == 0 and size % 16 == 0, f"misaligned {args}"
            self.bulks[1].append((source, size))
        else:
            to, source = self.address(args[0])[lane], self.address(args[1])[lane]
            size = int(args[2])
            self.bulks[0].append((source, size))
            self.check("ld", source, size)
            assert to % 16 == 0 and source % 16 == 0 and size % 16 == 0, f"misaligned {args}"
            memory, shared = self.spaces["global"], self.spaces["shared"]
            shared[to : to + size] = _poison(size)

            def land():
                shared[to : to + size] = memory[source : source + size]

            if self.hasty:
                land()
                land = lambda: None
            self.barriers[self.address(args[3])[lane]].copies.append((size, land))

    def multiply(self, args):
        """m16n8k16: what each lane holds of the matrices is in the PTX manual."""
        d, a, b, c = map(_names, args)
        g, q = _ROW, _COLUMN
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for half in range(2):
            shift = np.uint64(16 * half)
            for i, name in enumerate(a):
                left[g + 8 * (i % 2), 2 * q + half + 8 * (i // 2)] = _bf16(
                    self.value(name) >> shift & 65535
                )
            for i, name in enumerate(b):
                right[2 * q + half + 8 * i, g] = _bf16(self.value(name) >> shift & 65535)
        with np.errstate(all="ignore"):
            product = left @ right
            for i, (out, start) in enumerate(zip(d, c, strict=True)):
                value = product[g + 8 * (i // 2), 2 * q + i % 2]
                value = value + _float(self.value(start).astype(np.uint32))
                self.write(out, value.astype(np.float32).view(np.uint32), _LANES)


def _permuted(a, b, selected):
    both, out = a | b << np.uint64(32), np.zeros(32, np.uint64)
    for i in range(4):
        byte = selected >> np.uint64(4 * i) & np.uint64(7)
        out |= (both >> byte * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out
