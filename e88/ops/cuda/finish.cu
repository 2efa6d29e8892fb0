// Where several blocks share a head: the sum of their parts of dq and dk, and from it the gradients of the raw rows.
#include "tile.cuh"
#include "rows16.cuh"
#include "edges.cuh"

constexpr int FINISH_THREADS = 128;

// dq, dk: [SPLITS, tokens, H, K] parts. q, k, raw_dq, raw_dk: rows of H * K elements, tokens q_step, k_step, row_step apart.
extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
e88_finish(const element* __restrict__ q, const element* __restrict__ k, const float* __restrict__ dq,
           const float* __restrict__ dk, element* __restrict__ raw_dq, element* __restrict__ raw_dk, int q_step, int k_step,
           int row_step, int tokens, int H) {
  const i64 line = ((i64)blockIdx.x * FINISH_THREADS + threadIdx.x) / ROW_LANES, lines = 2ll * tokens * H;
  const int i = threadIdx.x % ROW_LANES * 8, is_key = line % 2, head = (int)(line / 2 % H);
  const i64 token = line / 2 / H;
  const bool inside = line < lines && i < K;
  float sum[8] = {};
  if (inside)
#pragma unroll
    for (int split = 0; split < SPLITS; split++) {
      const float4* p = (const float4*)((is_key ? dk : dq) + ((split * tokens + token) * H + head) * K + i);
      const float4 a = p[0], b = p[1];
      sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w, sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
    }
  raw_row_gradient(sum, load_8((is_key ? k + token * k_step : q + token * q_step) + head * K + i, inside));
  if (inside) store_piece((is_key ? raw_dk : raw_dq) + token * row_step + head * K + i, sum);
}
