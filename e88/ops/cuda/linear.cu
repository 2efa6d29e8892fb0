// x W^T for few rows x, at the speed of reading W: as decoding needs it, with the residual sum and norm before it.
// One block owns 16 rows of W. Its warps share the columns in chunks of 32, hold their part of W in registers before x is
// known, and multiply on tensor cores, W being the A operand: lane = 4 * g + t holds 8 consecutive columns, from 8 * t,
// of rows g and g + 8, and the same columns of row g of x. Sums over warps go through shared memory.
//
// Set by the host: B rows of x, up to 8; D columns, a multiple of 8; WARPS; RESIDENT blocks of a multiprocessor; NORM, and
// ADD where there is an update.
#include "overlap.cuh"

constexpr int CHUNKS = (D + 31) / 32, MINE = (CHUNKS + WARPS - 1) / WARPS, HELD = MINE < 8 ? MINE : 8;
constexpr int PIECES = (D + 255) / 256;
// Rows of x in shared memory are 64 bytes off one another's banks.
constexpr int PITCH = (D + 63) / 64 * 64 + 32;

DEVICE u32 pack(float low, float high) {
  u32 x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE float low_half(u32 x) { return __uint_as_float(x << 16); }
DEVICE float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

DEVICE uint4 load_once(const u16* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// NORM: y = norm(stream) W^T, stream = x + update, in float32; block 0 writes the stream. Otherwise x is bf16 and y = x W^T.
// W: [N, D]. y: [B, N]. x and update are packed; update may be null where ADD is not set.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
e88_linear(const void* x, const u16* update, const float* __restrict__ norm, const u16* __restrict__ W, u16* y,
           float* stream, int N, float eps) {
  extern __shared__ __align__(16) u16 rows[];
  __shared__ float sums[WARPS][16][8], squares[B][PIECES];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * 16;
  let_next_begin();
  uint4 above[HELD], below[HELD];
  auto fetch = [&](int c, uint4& a, uint4& b) {
    const int column = (c * WARPS + warp) * 32 + 8 * t;
    a = b = make_uint4(0, 0, 0, 0);
    if (column < D && first + g < N) a = load_once(W + (i64)(first + g) * D + column);
    if (column < D && first + g + 8 < N) b = load_once(W + (i64)(first + g + 8) * D + column);
  };
#pragma unroll
  for (int c = 0; c < HELD; c++) fetch(c, above[c], below[c]);
  // W was written long before the launch that this one may overlap.
  wait_for_last();

  // Rows of x as bf16, and the sums of their squares by pieces of 256 columns.
  for (int item = warp; item < B * PIECES; item += WARPS) {
    const int n = item / PIECES, column = item % PIECES * 256 + 8 * lane;
    const bool inside = column < D;
    const i64 at = (i64)n * D + column;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if constexpr (NORM) {
      float h[8] = {0, 0, 0, 0, 0, 0, 0, 0}, square = 0;
      if (inside) {
        const float4 p = *(const float4*)((const float*)x + at), r = *(const float4*)((const float*)x + at + 4);
        const float4 v = __ldg((const float4*)(norm + column)), w = __ldg((const float4*)(norm + column + 4));
        h[0] = p.x, h[1] = p.y, h[2] = p.z, h[3] = p.w, h[4] = r.x, h[5] = r.y, h[6] = r.z, h[7] = r.w;
        if (ADD) {
          const uint4 u = *(const uint4*)(update + at);
          h[0] += low_half(u.x), h[1] += high_half(u.x), h[2] += low_half(u.y), h[3] += high_half(u.y);
          h[4] += low_half(u.z), h[5] += high_half(u.z), h[6] += low_half(u.w), h[7] += high_half(u.w);
          if (blockIdx.x == 0) {
            *(float4*)(stream + at) = make_float4(h[0], h[1], h[2], h[3]);
            *(float4*)(stream + at + 4) = make_float4(h[4], h[5], h[6], h[7]);
          }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) square += h[e] * h[e];
        packed = make_uint4(pack(h[0] * v.x, h[1] * v.y), pack(h[2] * v.z, h[3] * v.w), pack(h[4] * w.x, h[5] * w.y),
                            pack(h[6] * w.z, h[7] * w.w));
      }
#pragma unroll
      for (int other = 16; other; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
      if (lane == 0) squares[n][item % PIECES] = square;
    } else if (inside) {
      packed = *(const uint4*)((const u16*)x + at);
    }
    if (inside) *(uint4*)(rows + n * PITCH + column) = packed;
  }
  __syncthreads();

  float c[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int begin = 0; begin < MINE; begin += HELD) {
#pragma unroll
    for (int held = 0; held < HELD; held++) {
      const int column = ((begin + held) * WARPS + warp) * 32 + 8 * t;
      const uint4 a = above[held], b = below[held];
      uint4 v = make_uint4(0, 0, 0, 0);
      if (column < D && g < B) v = *(const uint4*)(rows + g * PITCH + column);
      multiply(c, a.x, b.x, a.y, b.y, v.x, v.y);
      multiply(c, a.z, b.z, a.w, b.w, v.z, v.w);
      if (begin + HELD + held < MINE) fetch(begin + HELD + held, above[held], below[held]);
    }
  }
  *(float2*)&sums[warp][g][2 * t] = make_float2(c[0], c[1]);
  *(float2*)&sums[warp][g + 8][2 * t] = make_float2(c[2], c[3]);
  __syncthreads();
  for (int item = threadIdx.x; item < 16 * B; item += 32 * WARPS) {
    const int n = item / 16, m = item % 16;
    if (first + m >= N) continue;
    float sum = 0, square = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w][m][n];
    if (NORM) {
#pragma unroll
      for (int p = 0; p < PIECES; p++) square += squares[n][p];
      sum *= rsqrtf(square / D + eps);
    }
    y[(i64)n * N + first + m] = (u16)pack(sum, 0);
  }
}
