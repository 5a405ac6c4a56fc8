"""Launches a thread program in PTX on Hopper, through Pallas' Mosaic GPU back end."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def check_room(room: jax.Array, words: int, mesh) -> None:
    """Refuses a room (`ptx.EMPTY` so many times) of another size or type, and one for a mesh.

    Raises:
      ValueError: If it is refused.
    """
    if mesh is not None or (room.shape, room.dtype) != ((words,), jnp.int32):
        raise ValueError(
            f"room must be int32 {(words,)}, all -1, and there must be no mesh; got "
            f"{room.dtype} {room.shape}{'' if mesh is None else ' and a mesh'}."
        )


def launch(
    name: str,
    text: str,
    outs,
    inputs: tuple[jax.Array, ...],
    *,
    grid: int,
    warpgroups: int,
    shared_bytes: int = 16,
    cluster: int = 1,
):
    """Runs a program in every thread of a grid; compiles for Hopper on any machine.

    Args:
      name: Of the kernel, in profiles.
      text: The program, which says `ptx.NEXT` and `ptx.WAIT`. Its operands: the thread block;
        pointers to inputs, results and shared memory.
      outs: Shape and type of the result, or a tuple of them.
      inputs: Arrays in device memory; references for what it writes in place.
      grid: Thread blocks.
      warpgroups: Of a block, 128 threads each.
      shared_bytes: Shared memory of a block.
      cluster: Blocks of a cluster; they divide the grid.
    """
    # Here, because these change from one version of JAX to the next.
    from jax.experimental import pallas as pl
    from jax.experimental.mosaic.gpu import utils as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(*refs):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def thread(ctx, *refs):
            del ctx
            pointers = [mgpu.memref_ptr(ref) for ref in refs]
            mgpu.inline_ptx(text, mgpu.block_idx(), *pointers, convergent=True)

        thread(*refs)
        # The program has waited already. From this one Pallas learns of it.
        plgpu.griddepcontrol_wait()

    shape = {
        "grid": (grid // cluster,),
        "grid_names": ("block",),
        "num_threads": warpgroups,
        "thread_name": "warpgroup",
    }
    if cluster > 1:
        shape |= {"cluster": (cluster,), "cluster_names": ("part",)}
    lane = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    common = {"out_type": outs, "compiler_params": lane}
    shared = plgpu.SMEM((shared_bytes,), jnp.uint8)
    if not any(isinstance(x, jax.Ref) for x in inputs):
        run = plgpu.kernel(body, scratch_types=[shared], kernel_name=name, **common, **shape)
        return run(*inputs)

    # That takes no references.
    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), shared, collective_axes="warpgroup")

    return pl.kernel(scoped, mesh=plgpu.Mesh(kernel_name=name, **shape), name=name, **common)(
        *inputs
    )
