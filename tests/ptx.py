"""Runs the PTX of our kernels on a CPU, lane by lane, so that their logic is tested without a GPU.

Covers what they use and nothing else. Branches must be taken by all lanes of a warp or by none.
Memory that nobody wrote is poison. Knows nothing of timing, caches or the order between blocks.
"""

import functools
import re

import ml_dtypes
import numpy as np

from gpt_oss_jax.kernels.ptx import NEXT

_ALL = 0xFFFFFFFF
_NO_STEP = ("bar.warp.sync", "barrier.cluster.arrive")  # Warps go in step; waiting is for both.
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


class Memory:
    """Bytes with arrays in them; addresses start at 4096."""

    def __init__(self):
        self.bytes = np.full(4096, 255, np.uint8)

    def put(self, array):
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        at = -(-self.bytes.size // 256) * 256
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
):
    """Runs a thread program whose first operand is the block and whose last is shared memory.

    Clusters run one after the other, or all of them at once. What is at rest (addresses and sizes)
    may be read before a warp has waited for earlier kernels, everything else only then. With
    random numbers `by_chance`, warps go on in any order, and copies land when they begin, not when
    they are waited for.

    Returns:
      Address and size of what was copied to shared memory, and of what was only brought nearer.
    """
    # With it the assembler may read before the wait for earlier kernels.
    assert "ld.global.nc" not in text, "a promise that nobody writes what is read"
    assert text.count(NEXT) == 1, "the next kernel may start once"
    program, labels = _parse(text)
    bulks, all_warps = ([], []), []
    for first in range(0, grid, grid if at_once else cluster):
        group = range(grid if at_once else cluster)
        shared = np.full((len(group), shared_bytes), 255, np.uint8)
        threads = []
        for n in group:
            values, barriers = [first + n, *operands, 0], {}
            for w in range(warps):
                warp = _Warp(program, labels, values, memory.bytes, shared[n], barriers, w, bulks)
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
        warp = _Warp(program, labels, [], memory.bytes, shared, {}, w)
        for i, value in enumerate(operands):
            value = np.broadcast_to(np.asarray(value, np.uint64), 128)[own]
            warp.registers[f"operand{gives + i}"] = value
        assert not list(warp.run()), "a piece waits"
        for i in range(gives):
            given[i, own] = warp.value(f"operand{i}")
    return given


@functools.cache
def _parse(text):
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
            program.append((guard and guard.groups(), name, _OPERAND.findall(arguments)))
    return program, labels


def _float(x):
    return np.asarray(x, np.uint32).view(np.float32)


def _bf16(bits):
    return np.asarray(bits, np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


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
        self.spaces = {"global": memory, "shared": shared}
        self.registers = {"%tid.x": np.arange(32, dtype=np.uint64) + 32 * warp}
        self.at_rest = None  # Nothing to wait for.
        self.hasty = False

    def value(self, name):
        name = name.strip()
        if name in self.registers:
            return self.registers[name]
        if name.startswith("$"):
            return np.full(32, self.operands[int(name[1:])], np.uint64)
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint64)
        if re.match(r"-?\d", name):
            return np.full(32, int(name, 0) % 2**64, np.uint64)
        return np.full(32, 0x7FC07FC0, np.uint64)  # Nobody wrote it.

    def run(self):
        at = 0
        while at < len(self.program):
            guard, name, args = self.program[at]
            at += 1
            active = np.ones(32, bool)
            if guard:
                active = self.value(guard[1]).astype(bool) ^ bool(guard[0])
            kind = name.split(".")
            if kind[0] == "bra":
                assert active.all() or not active.any(), f"divergent branch to {args}"
                if active.all():
                    at = self.labels[args[0].strip()]
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
            elif active.any():
                self.step(kind, args, active)

    def write(self, name, value, active, bits=32):
        old = self.value(name)
        value = np.asarray(value).astype(np.uint64) & np.uint64(2**bits - 1)
        self.registers[name.strip()] = np.where(active, value, old)

    def step(self, kind, args, active):
        kind = [word for word in kind if word not in ("relaxed", "gpu")]
        name = ".".join(kind)
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
        if kind[-1] == "f32" and kind[0] != "cvt":
            f = [_float(x.astype(np.uint32)) for x in v]
            with np.errstate(all="ignore"):
                result = {
                    "mov": lambda: f[0],
                    "add": lambda: f[0] + f[1],
                    "sub": lambda: f[0] - f[1],
                    "neg": lambda: -f[0],
                    "div": lambda: f[0] / f[1],
                    "rsqrt": lambda: 1 / np.sqrt(f[0]),
                    "selp": lambda: np.where(v[2].astype(bool), f[0], f[1]),
                    "mul": lambda: f[0] * f[1],
                    "fma": lambda: f[0] * f[1] + f[2],
                    "min": lambda: np.minimum(f[0], f[1]),
                    "max": lambda: np.maximum(f[0], f[1]),
                    "ex2": lambda: np.exp2(f[0]),
                    "rcp": lambda: 1 / f[0],
                }[kind[0]]()
            return self.write(destination, np.asarray(result, np.float32).view(np.uint32), active)
        u = [x & np.uint64(_ALL) for x in v]
        if kind[0] == "setp":
            compare = {"lt": np.less, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal}
            compare |= {"le": np.less_equal, "gt": np.greater}
            result = compare[kind[1]](u[0], u[1])
            if kind[2] == "and":
                result &= v[2].astype(bool)
            return self.write(destination, result, active)
        if name == "mul.bf16x2":
            parts = [
                _to_bf16(_bf16(u[0] >> shift & 65535) * _bf16(u[1] >> shift & 65535))
                for shift in (np.uint64(0), np.uint64(16))
            ]
            return self.write(
                destination, parts[0] | parts[1].astype(np.uint64) << np.uint64(16), active
            )
        if name in ("cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"):
            parts = [_to_bf16(_float(x.astype(np.uint32))).astype(np.uint32) for x in u]
            pair = parts[0] if len(parts) == 1 else parts[0] << 16 | parts[1]
            return self.write(destination, pair, active)
        result = {
            "mov": lambda: v[0],
            "cvt": lambda: v[0],
            "and": lambda: u[0] & u[1],
            "or": lambda: u[0] | u[1],
            "xor": lambda: u[0] ^ u[1],
            "shl": lambda: u[0] << u[1],
            "shr": lambda: u[0] >> u[1],
            "shf": lambda: (u[1] << np.uint64(32) | u[0]) >> (u[2] & np.uint64(31)),
            "add": lambda: v[0] + v[1],
            "sub": lambda: v[0] - v[1],
            "mul": lambda: u[0] * u[1],
            "mad": lambda: u[0] * u[1] + u[2],
            "div": lambda: u[0] // u[1],
            "rem": lambda: u[0] % u[1],
            "min": lambda: np.minimum(u[0], u[1]),
            "max": lambda: np.maximum(u[0], u[1]),
            "selp": lambda: np.where(v[2].astype(bool), u[0], u[1]),
            "popc": lambda: [int(x).bit_count() for x in u[0]],
            "match": lambda: [sum(1 << i for i in range(32) if u[0][i] == x) for x in u[0]],
            "vote": lambda: [
                {
                    "ballot": sum(1 << i for i in range(32) if v[0][i]),
                    "any": v[0].any(),
                    "all": v[0].all(),
                }[kind[2]]
            ]
            * 32,
            "redux": lambda: [getattr(u[0], kind[2])()] * 32,
            "shfl": lambda: u[0][u[1].astype(int) ^ (np.arange(32) * (kind[2] == "bfly"))],
            "prmt": lambda: _permuted(*u),
            "mapa": lambda: u[0] + u[1] * np.uint64(self.spaces["shared"].size),
        }[kind[0]]()
        wide = kind[-1] == "u64" or (kind[0] == "mul" and kind[1] == "wide")
        return self.write(destination, result, active, 64 if wide else 32)

    def address(self, text):
        base, _, offset = text.strip("[] ").partition("+")
        return self.value(base).astype(np.int64) + int(offset or 0)

    def move(self, kind, args, active):
        space = self.spaces[kind[1]]
        size = {"u8": 1, "u16": 2, "b16": 2}.get(kind[-1], 4)
        target, address = args if kind[0] == "ld" else args[::-1]
        names = target.strip("{} ").split(",")
        at = self.address(address)
        assert not (at[active] % (size * len(names))).any(), f"misaligned {kind} {args}"
        if kind[1] == "global":
            self.check(kind[0], at[active], size * len(names))
        for i, register in enumerate(names):
            where = at[:, None] + size * i + np.arange(size)
            if kind[0] == "ld":
                raw = np.zeros((32, 8), np.uint8)
                raw[active, :size] = space[where[active]]
                self.write(register, raw.view(np.uint64)[:, 0], active)
            else:
                raw = self.value(register)[:, None].view(np.uint8)
                space[where[active]] = raw[active, :size]

    def check(self, kind, at, size):
        """Earlier kernels may still write what is not at rest."""
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
            shared[to : to + size] = 255

            def land():
                shared[to : to + size] = memory[source : source + size]

            if self.hasty:
                land()
                land = lambda: None
            self.barriers[self.address(args[3])[lane]].copies.append((size, land))

    def multiply(self, args):
        """m16n8k16: what each lane holds of the matrices is in the PTX manual."""
        d, a, b, c = (x.strip("{} ").split(",") for x in args)
        g, q = np.arange(32) // 4, np.arange(32) % 4
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
                self.write(out, value.astype(np.float32).view(np.uint32), np.ones(32, bool))


def _permuted(a, b, selected):
    both, out = a | b << np.uint64(32), np.zeros(32, np.uint64)
    for i in range(4):
        byte = selected >> np.uint64(4 * i) & np.uint64(7)
        out |= (both >> byte * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out
