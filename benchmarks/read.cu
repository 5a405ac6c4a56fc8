// How fast a Hopper reads when it does nothing else: tiles brought to shared memory, as the kernels bring weights.
//
// From the root: nvcc -O3 -std=c++20 -arch=sm_90a benchmarks/read.cu -o /tmp/read && /tmp/read
// One thread of each block asks for the next tile when one has come. What is varied: tiles under way, bytes and pieces of
// a tile, in turn or in runs, where a tile and its pieces begin in shared memory, cycles between two of them, and bytes
// of a launch.

#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>

struct Way {
  const char *what = "";
  int blocks = 132, bytes = 23040, scales = 1472, pieces = 1, stages = 3, offset = 0, apart = 0, cycles = 0;
  bool runs = false;
  long total = 2000l << 20;
};

__device__ void copy(uint32_t to, const char *from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra AGAIN; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__host__ __device__ int stride(const Way &way) {
  return (way.bytes + way.scales + way.pieces * way.apart + 127) / 128 * 128 + way.offset;
}

__global__ void read(const char *blocks, const char *scales, int tiles, Way way) {
  extern __shared__ __align__(128) char shared[];
  uint32_t first = (uint32_t)__cvta_generic_to_shared(shared), barriers = first + stride(way) * way.stages;
  for (int i = 0; i < way.stages; i++)
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + 8 * i));
  asm volatile("fence.mbarrier_init.release.cluster;");
  int all = gridDim.x, own = blockIdx.x, run = (tiles + all - 1) / all;
  int count = way.runs ? min(run, tiles - own * run) : (tiles - own + all - 1) / all;
  auto ask = [&](int i) {
    long tile = way.runs ? (long)own * run + i : own + (long)i * all;
    uint32_t to = first + stride(way) * (i % way.stages), barrier = barriers + 8 * (i % way.stages);
    int piece = way.bytes / way.pieces;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(way.bytes + way.scales));
    for (int j = 0; j < way.pieces; j++)
      copy(to + j * (piece + way.apart), blocks + tile * way.bytes + j * piece, piece, barrier);
    if (way.scales) copy(to + way.bytes + way.pieces * way.apart, scales + tile * way.scales, way.scales, barrier);
  };
  for (int i = 0; i < min(way.stages, count); i++) ask(i);
  for (int i = 0; i < count; i++) {
    wait(barriers + 8 * (i % way.stages), i / way.stages & 1);
    for (long long begin = clock64(); clock64() - begin < way.cycles;);
    if (i + way.stages < count) ask(i + way.stages);
  }
}

int main() {
  char *blocks, *scales;
  cudaMalloc(&blocks, 2400l << 20);
  cudaMalloc(&scales, 256l << 20);
  cudaFuncSetAttribute(read, cudaFuncAttributeMaxDynamicSharedMemorySize, 232000);
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  auto time = [&](Way way) {
    int tiles = way.total / (way.bytes + way.scales), shared = (stride(way) + 8) * way.stages;
    float best = 1e9;
    for (int i = 0; i < 5; i++) {
      cudaEventRecord(begin);
      read<<<way.blocks, 1, shared>>>(blocks, scales, tiles, way);
      cudaEventRecord(end);
      cudaEventSynchronize(end);
      float ms;
      cudaEventElapsedTime(&ms, begin, end);
      best = min(best, ms);
    }
    if (cudaError_t error = cudaGetLastError()) printf("%s: %s\n", way.what, cudaGetErrorString(error));
    printf("%-26s %3d blocks, %5d + %4d bytes in %2d, %d under way, %3d apart, %2d past 128, %4d cycles, %4ld MB: "
           "%7.1f us, %.2f TB/s\n",
           way.what, way.blocks, way.bytes, way.scales, way.pieces, way.stages, way.apart, way.offset, way.cycles,
           way.total >> 20, 1e3 * best, (double)tiles * (way.bytes + way.scales) / best / 1e9);
  };
  for (int stages : {1, 2, 3, 4, 8}) time({.what = "in turn", .stages = stages});
  for (int stages : {1, 2, 3, 4, 8}) time({.what = "in runs", .stages = stages, .runs = true});
  for (int offset : {16, 32, 64}) time({.what = "stages not at 128", .offset = offset});
  for (int pieces : {1, 4, 12}) time({.what = "no scales", .bytes = 24576, .scales = 0, .pieces = pieces});
  for (int apart : {0, 64, 128})
    time({.what = "rows of a product", .bytes = 46080, .scales = 0, .pieces = 8, .apart = apart});
  for (int blocks : {264, 396}) time({.what = "several blocks", .blocks = blocks, .stages = 2});
  for (int cycles : {400, 800, 1000, 1200}) time({.what = "with a pause", .cycles = cycles});
  for (long mb : {53, 106, 212}) time({.what = "short", .total = mb << 20});
}
